"""A manifest with damaged bytes, or any JSON in the place of any value, is the same manifest or one named error."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from pipeline.data import load_manifest, manifest, versions
from pipeline.data.manifest import DatasetError, Image, Ingested, Manifest, Shard, Split

texts = some.text(max_size=10) | some.sampled_from(["raw", "train", "a\nb", "manifest.json", "\ud800"])
scalars = some.none() | some.booleans() | some.integers() | some.floats() | texts | some.sampled_from([2, 10, 12])
values = some.recursive(
    scalars, lambda inner: some.lists(inner, max_size=3) | some.dictionaries(texts, inner, max_size=3), max_leaves=6
)
NO_CONTENT = {"spark_application": True, "sources": {"__all__": {"state"}}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two versions of a dataset, without its shards."""
    folder = str(tmp_path_factory.mktemp("any"))
    shard = Shard(path="train/part-0.parquet", rows=10, bytes=100, sha256="00", row_groups=(6, 4))
    split = Split(
        rows=10, label_counts=(7, 3), pixel_sums=((9,), (81,)), mean=(0.5,), std=(0.25,), shards=(shard,)
    )  # fmt: skip
    first = Manifest(
        name="x", settings_digest="sha256:0", spark_application="local-1", image=Image(encoding="raw", shape=(1, 4, 4)),
        classes=("a", "b"), input_rows=12, set_aside={"wrong_size": 2}, quarantine=("quarantine/0.parquet",),
        sources=(Ingested(settings_digest="sha256:0", state="sha256:1", rows=12),), splits={"train": split},
    )  # fmt: skip
    first = versions.publish(folder, first)
    versions.publish(folder, manifest.next_version(first, first), before=first)
    return folder


def ends_well(dataset, version, whole):
    """Whether what is read is what was published; else it must be an error of one line that names the file."""
    try:
        read = load_manifest(dataset, version)
    except DatasetError as error:
        text = str(error)
        assert text.startswith(dataset)
        assert "\n" not in text, text
        assert "manifest" in text
        assert len(text) < 1_000, text
        text.encode()
        return False
    assert read.model_dump(exclude=NO_CONTENT) == whole.model_dump(exclude=NO_CONTENT)
    return True


def put_anywhere(tree, at, value, how):
    """Replace or delete the value of a number in the order of the tree, or add one beside it."""
    places = []

    def walk(inner):
        items = list(inner.items()) if isinstance(inner, dict) else list(enumerate(inner))
        for key, item in items:
            places.append((inner, key))
            if isinstance(item, (dict, list)):
                walk(item)

    walk(tree)
    inner, key = places[at % len(places)]
    if how == "delete":
        del inner[key]
    elif how == "add" and isinstance(inner, dict):
        inner[str(value)[:10]] = value
    else:
        inner[key] = value


def check(path, version, count):
    """Damage the file of one version; returns how many inputs there were, and how many were read."""
    outcomes, data, folder = [], path.read_bytes(), str(path.parent)
    whole = load_manifest(folder, version)
    profile = settings(max_examples=count, deadline=None, derandomize=count < 1_000, database=None)

    def read_with(damaged):
        path.write_bytes(damaged)
        outcomes.append(ends_well(folder, version, whole))

    @profile
    @given(some.integers(0, len(data)), some.integers(0, 40), some.binary(max_size=8), some.integers(0, 9))
    def any_bytes(at, length, inserted, alone):
        read_with(data[:at] + inserted + data[at + length :] if alone else inserted)

    @profile
    @given(some.integers(0, 200), values, some.sampled_from(["replace", "delete", "add"]))
    def any_json(at, value, how):
        tree = json.loads(data)
        put_anywhere(tree, at, value, how)
        read_with(json.dumps(tree).encode())

    try:
        for same in (data, json.dumps(json.loads(data)).encode(), data.replace(b'"local-1"', b'"local-2"')):
            read_with(same)
        assert outcomes == [True, True, True]
        any_bytes()
        any_json()
        for text in ("[" * 100_000, '{"format":1,"a":' * 20_000, "1" * 5_000, '{"format": 1, "version": 1e400}'):
            read_with(text.encode())
        for old, new in ((b'"train": {', b'"a\\nb": {'), (b'"digest": "', b'"digest": "\\n' + b"x" * 5_000)):
            assert old in data
            read_with(data.replace(old, new))
            read_with(data.replace(old, new).replace(b'"rows": 2', b'"rows": "a'))
            read_with(data.replace(old, new).replace(b'"rows": ', b'"rows": 1'))
    finally:
        path.write_bytes(data)
    return len(outcomes), sum(outcomes)


FILES = [(versions.FILE_NAME, 2), (versions.file_name(1), 1)]


@pytest.mark.parametrize(("name", "version"), FILES)
def test_the_same_manifest_or_one_error(dataset, name, version):
    check(Path(dataset, name), version, 80)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "version"), FILES)
def test_the_same_manifest_or_one_error_many_times(dataset, name, version):
    inputs, read = check(Path(dataset, name), version, 3_000)
    print(f"\n{inputs} damaged manifests, {read} of them read as they were")
