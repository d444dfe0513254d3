import importlib.metadata
import pickle
import subprocess
import sys
import textwrap
import threading

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import petastorm_compat
from pipeline.data.petastorm_compat import make_batch_reader

FILES, ROWS, GROUP = 3, 50, 20  # row groups of 20, 20 and 10 rows in each file


class Bomb:
    """Makes a folder when it is unpickled, also by Petastorm's unpickler, which lets all of builtins through."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.target!r})",)


def table_of(file):
    ids = np.arange(file * ROWS, (file + 1) * ROWS)
    images = [bytes([i % 256, (i * 7) % 256, 3, 4]) for i in ids]
    return pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "label": pa.array(ids % 5, pa.int32()),
            "image": pa.array(images, pa.binary()),
            "name": pa.array([f"row {i}" for i in ids]),
        }
    )


def write(folder):
    """Three files below ``folder``, a path or URL of any fsspec filesystem; their URLs."""
    fs, path = fsspec.core.url_to_fs(folder)
    fs.makedirs(path, exist_ok=True)
    for file in range(FILES):
        with fs.open(f"{path}/part-{file}.parquet", "wb") as sink:
            pq.write_table(table_of(file), sink, row_group_size=GROUP)
    return [f"{folder}/part-{file}.parquet" for file in range(FILES)]


@pytest.fixture
def urls(tmp_path):
    return write(f"file://{tmp_path}/data")


@pytest.fixture
def memory_urls():
    yield write("memory://petastorm-test/data")
    fsspec.filesystem("memory").rm("/petastorm-test", recursive=True)


def batches(urls, **kwargs):
    settings = {"reader_pool_type": "thread", "workers_count": 1, "shuffle_row_groups": False, **kwargs}
    with make_batch_reader(urls, **settings) as reader:
        return list(reader)


def ids(urls, **kwargs):
    return [row for batch in batches(urls, **kwargs) for row in batch.id.tolist()]


ALL = list(range(FILES * ROWS))


def test_values_types_and_row_groups(urls):
    found = batches(urls)
    assert [len(batch.id) for batch in found] == [20, 20, 10] * FILES
    expected = pa.concat_tables([table_of(file) for file in range(FILES)])
    for column in ("id", "label", "image", "name"):
        values = np.concatenate([getattr(batch, column) for batch in found])
        assert values.tolist() == expected[column].to_pylist()
    assert found[0].label.dtype == np.int32
    assert type(found[0].image[0]) is bytes


@pytest.mark.parametrize("form", ["urls", "paths", "path objects", "folder url", "folder path", "folder/"])
def test_local_forms(urls, tmp_path, form):
    given = {
        "urls": urls,
        "paths": [url.removeprefix("file://") for url in urls],
        "path objects": [tmp_path / "data" / f"part-{file}.parquet" for file in range(FILES)],
        "folder url": f"file://{tmp_path}/data",
        "folder path": tmp_path / "data",
        "folder/": f"{tmp_path}/data/",
    }[form]
    assert ids(given) == ALL


def test_a_list_is_read_in_its_order(urls):
    assert ids(urls[::-1]) == [*range(100, 150), *range(50, 100), *range(50)]


@pytest.mark.parametrize("pool", ["thread", "dummy"])
def test_fsspec_urls(memory_urls, pool):
    assert ids(memory_urls, reader_pool_type=pool) == ALL
    assert ids("memory://petastorm-test/data", reader_pool_type=pool) == ALL
    assert ids(["/petastorm-test/data/part-1.parquet"], filesystem=fsspec.filesystem("memory")) == ALL[50:100]


@pytest.mark.parametrize(("pool", "workers"), [("dummy", 1), ("thread", 1), ("thread", 4), ("process", 2)])
def test_pools_read_everything_once(urls, pool, workers):
    assert sorted(ids(urls, reader_pool_type=pool, workers_count=workers)) == ALL


@pytest.mark.parametrize("seed", [None, 3])
def test_shards_are_disjoint_and_complete(urls, seed):
    parts = [ids(urls, cur_shard=shard, shard_count=4, seed=seed, shuffle_row_groups=True) for shard in range(4)]
    assert sorted(row for part in parts for row in part) == ALL
    # Petastorm gives a shard every shard_count-th row group, with any seed.
    assert sorted(parts[1]) == [*range(20, 40), *range(90, 100)]


def test_chosen_row_groups_in_their_order(urls):
    chosen = [(2, 0), (0, 2), (1, 1), (0, 0)]
    first = [*range(100, 120), *range(40, 50)]
    assert ids(urls, row_groups=chosen) == [*first, *range(70, 90), *range(20)]
    assert ids(urls, row_groups=chosen, cur_shard=1, shard_count=2) == [*range(40, 50), *range(20)]


def test_seeded_shuffling_of_row_groups(urls):
    orders = [ids(urls, shuffle_row_groups=True, seed=seed) for seed in (1, 1, 2)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[2]) == ALL != orders[2]


def test_epochs(urls):
    assert ids(urls, num_epochs=3) == ALL * 3
    with make_batch_reader(urls, num_epochs=None) as reader:
        assert sum(len(next(reader).id) for _ in range(40)) > 2 * len(ALL)


def test_schema_fields(urls):
    found = batches(urls, schema_fields=["id", "la.*"])
    assert set(found[0]._fields) == {"id", "label"}


def test_predicates(urls):
    petastorm_compat.load()
    from petastorm.predicates import in_lambda, in_set

    assert ids(urls, predicate=in_lambda(["label"], lambda label: label == 3)) == ALL[3::5]
    assert ids(urls, predicate=in_lambda(["label", "id"], lambda label, key: (label == 3) & (key < 9))) == [3, 8]
    assert ids(urls, predicate=in_lambda(["label"], lambda label: label == 9)) == []
    # Petastorm's other predicates are for single rows: its batch reader hands them whole columns.
    with pytest.raises(TypeError, match="unhashable"):
        ids(urls, predicate=in_set({3, 4}, "label"))


def test_transforms(urls):
    petastorm_compat.load()
    from petastorm.transform import TransformSpec, edit_field

    def to_arrays(rows):
        rows["image"] = [np.frombuffer(image, np.uint8).reshape(2, 2) for image in rows["image"]]
        return rows

    spec = TransformSpec(to_arrays, edit_fields=[edit_field("image", np.uint8, (2, 2))], removed_fields=["name"])
    found = batches(urls, transform_spec=spec)
    assert set(found[0]._fields) == {"id", "label", "image"}
    assert found[0].image.dtype == np.uint8
    assert found[0].image.shape == (20, 2, 2)
    assert found[0].image[7].tobytes() == table_of(0)["image"][7].as_py()


def test_local_disk_cache(urls, tmp_path):
    cache = {"cache_type": "local-disk", "cache_location": str(tmp_path / "cache")}
    cache |= {"cache_size_limit": 10**8, "cache_row_size_estimate": 100}
    first = ids(urls, **cache)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    # Files that now hold other rows are not read again: the second pass takes its rows from the cache.
    for url in urls:
        pq.write_table(table_of(9), url.removeprefix("file://"), row_group_size=GROUP)
    assert ids(urls, **cache) == first == ALL
    assert ids(urls) != ALL


@pytest.mark.parametrize("pool", ["thread", "dummy", "process"])
def test_a_pickle_in_a_dataset_is_never_loaded(urls, tmp_path, pool):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    keys = ("unischema", "num_row_groups_per_file", "rowgroups_index")
    table = table_of(0)
    table = table.replace_schema_metadata({f"dataset-toolkit.{key}.v1": bomb for key in keys})
    for name in ("part-0.parquet", "_common_metadata", "_metadata"):
        pq.write_table(table, tmp_path / "data" / name, row_group_size=GROUP)
    assert ids(tmp_path / "data", reader_pool_type=pool) == ALL
    assert ids([tmp_path / "data" / "part-0.parquet"], reader_pool_type=pool) == ALL[:50]
    assert not (tmp_path / "exploded").exists()
    from petastorm.etl.legacy import restricted_loads

    restricted_loads(bomb)
    assert (tmp_path / "exploded").exists()


def test_petastorms_own_unpickling_is_off(tmp_path):
    petastorm_compat.load()
    from petastorm.etl import dataset_metadata, rowgroup_indexing

    for module in (dataset_metadata, rowgroup_indexing):
        with pytest.raises(ValueError, match="not read"):
            module.depickle_legacy_package_name_compatible(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert not (tmp_path / "exploded").exists()


UNCHANGED = """
    import sys
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    def state():
        kept = {name: vars(module).copy() for name, module in (("numpy", np), ("pyarrow", pa), ("parquet", pq))}
        foreign = {name for name in sys.modules if name.startswith(("pyarrow.filesystem", "pyarrow.hdfs"))}
        return pq.ParquetDataset, hasattr(np, "string_"), hasattr(pa, "filesystem"), foreign, kept

    before = state()
    from pipeline.data.petastorm_compat import make_batch_reader
    assert "petastorm" not in sys.modules
    with make_batch_reader(sys.argv[1:], reader_pool_type="dummy") as reader:
        assert len(next(reader).id)
    after = state()
    assert before[:4] == after[:4], (before[:4], after[:4])
    for name, names in before[4].items():
        changed = [key for key, value in names.items() if after[4][name].get(key) is not value]
        assert not changed, (name, changed)
    assert "petastorm.hdfs.namenode" not in sys.modules
    assert not [name for name in ("pyspark", "mlflow", "torch") if name in sys.modules]
    try:
        import pyarrow.filesystem
    except ModuleNotFoundError:
        print("as before")
"""


def test_nothing_is_left_changed_for_other_code(urls):
    """In a fresh interpreter, where nothing has imported petastorm yet."""
    script = textwrap.dedent(UNCHANGED)
    done = subprocess.run([sys.executable, "-c", script, *urls], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "as before"), done.stderr


@pytest.mark.parametrize("found", [None, "0.13.1", "0.9.8"])
def test_another_petastorm_is_one_clear_error(urls, monkeypatch, found):
    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(petastorm_compat.importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"pip install 'sparknorm\[petastorm\]'"):
        make_batch_reader(urls)


def test_what_is_not_supported_is_said(urls, memory_urls, tmp_path):
    with pytest.raises(ValueError, match="filters is not supported here, use predicate"):
        make_batch_reader(urls, filters=[("label", "=", 1)])
    with pytest.raises(ValueError, match="at least one URL"):
        make_batch_reader([])
    with pytest.raises(ValueError, match="of one filesystem"):
        make_batch_reader([urls[0], memory_urls[0]])
    write(f"{tmp_path}/hive/year=2024")
    with pytest.raises(ValueError, match=r"is partitioned \(year=2024\)"):
        make_batch_reader(f"{tmp_path}/hive")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no Parquet files"):
        make_batch_reader(tmp_path / "empty")


@pytest.mark.parametrize("pool", ["thread", "dummy", "process"])
def test_a_damaged_file_is_named(urls, tmp_path, pool):
    damaged = tmp_path / "data" / "part-1.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    chosen = [(file, 0) for file in range(FILES)]
    with pytest.raises(OSError, match=r"part-1\.parquet, row group 0"):
        batches(urls, row_groups=chosen, reader_pool_type=pool)
    with pytest.raises(OSError, match=r"part-1\.parquet"):
        batches(urls)
    damaged.unlink()
    with pytest.raises(FileNotFoundError, match=r"part-1\.parquet"):
        batches(urls, row_groups=chosen, reader_pool_type=pool)


def test_leaving_early_stops_the_workers(urls):
    before = threading.active_count()
    with make_batch_reader(urls, workers_count=4, num_epochs=None) as reader:
        next(reader)
        assert threading.active_count() > before
    assert threading.active_count() == before
