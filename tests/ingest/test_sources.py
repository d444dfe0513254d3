import gzip
import struct

import numpy as np
import pytest
from small_data import CLASSES, make_images, write_idx, write_idx_folder

from pipeline.config.dataset import SourceSettings
from pipeline.ingest.sources import fashion_mnist
from pipeline.ingest.sources.open import open_source
from pipeline.ingest.sources.source import SourceError

pytestmark = pytest.mark.spark


@pytest.fixture
def folder(tmp_path):
    return write_idx_folder(tmp_path / "idx", train_rows=25, test_rows=10)


def opened(spark, folder):
    return open_source(spark, SourceSettings(kind="idx", path=str(folder), classes=CLASSES), str(folder))


def test_what_is_known_before_reading(spark, folder):
    source = opened(spark, folder)
    assert (source.rows, source.pixel_shape, source.classes) == ({"train": 25, "test": 10}, (1, 12, 12), CLASSES)


def test_uncompressed_files_are_the_same_source(spark, folder):
    compressed = opened(spark, folder)
    for path in folder.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert opened(spark, folder).fingerprint == compressed.fingerprint


def test_another_image_is_another_fingerprint(spark, folder):
    before = opened(spark, folder).fingerprint
    images, _ = make_images(25, seed=9)
    write_idx(folder, "train-images-idx3-ubyte", images)
    assert opened(spark, folder).fingerprint != before


def rewrite(folder, name, change):
    path = folder / f"{name}.gz"
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "t10k-labels-idx1-ubyte.gz").unlink(), r"t10k-labels-idx1-ubyte: no such file, nor .*\.gz"),
        (
            lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(
                (f / "train-images-idx3-ubyte.gz").read_bytes()[:900]
            ),
            r"train-images-idx3-ubyte\.gz is cut or damaged",
        ),
        (
            lambda f: rewrite(f, "train-images-idx3-ubyte", lambda data: data[:-100]),
            r"train-images-idx3-ubyte\.gz is cut: its header says 3600 bytes of data, it has 3500",
        ),
        (
            lambda f: rewrite(f, "train-images-idx3-ubyte", lambda data: data + b"x"),
            r"train-images-idx3-ubyte\.gz is too long",
        ),
        (lambda f: rewrite(f, "t10k-images-idx3-ubyte", lambda data: data[:7]), r"t10k-images.* is cut: 7 bytes"),
        (
            lambda f: rewrite(f, "t10k-images-idx3-ubyte", lambda data: b"PNG!" + data[4:]),
            r"t10k-images.* is not an IDX file of 3 dimensions of bytes: it starts with 0x504e4721",
        ),
        (
            lambda f: write_idx(f, "train-labels-idx1-ubyte", np.zeros(24, np.uint8)),
            r"has 25 images, but .*train-labels-idx1-ubyte\.gz has 24 labels",
        ),
        (
            lambda f: write_idx(f, "t10k-images-idx3-ubyte", np.zeros((10, 8, 8), np.uint8)),
            "image sizes differ",
        ),
        (
            lambda f: [
                write_idx(f, "t10k-images-idx3-ubyte", np.zeros((0, 12, 12), np.uint8)),
                write_idx(f, "t10k-labels-idx1-ubyte", np.zeros(0, np.uint8)),
            ],
            r"t10k-images-idx3-ubyte\.gz has no images: give the files of a data set that has some",
        ),
    ],
)
def test_a_bad_file_is_named(spark, folder, damage, message):
    damage(folder)
    with pytest.raises(SourceError, match=message):
        opened(spark, folder)


def test_fashion_mnist_is_the_published_one(spark, fashion_mnist_files, tmp_path):
    source = open_source(spark, SourceSettings(kind="fashion_mnist", path=str(fashion_mnist_files)), str(tmp_path))
    assert source.rows == {"train": 60_000, "test": 10_000}
    assert source.pixel_shape == (1, 28, 28)
    assert len(source.classes) == 10


def test_an_altered_fashion_mnist_file_is_named_with_both_checksums(spark, fashion_mnist_files, tmp_path):
    for path in fashion_mnist_files.glob("*-ubyte*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    labels = next(tmp_path.glob("t10k-labels*"))
    data = gzip.decompress(labels.read_bytes())
    labels.write_bytes(gzip.compress(data[:-1] + bytes([data[-1] ^ 1])))
    with pytest.raises(
        fashion_mnist.FashionMnistError,
        match=r"t10k-labels-idx1-ubyte\.gz is not the published .*: SHA-256 [0-9a-f]{64}, expected 0402a96d",
    ):
        open_source(spark, SourceSettings(kind="fashion_mnist", path=str(tmp_path)), str(tmp_path))


def test_a_missing_folder_is_named(spark, tmp_path):
    with pytest.raises(fashion_mnist.FashionMnistError, match="nowhere: no such folder"):
        open_source(spark, SourceSettings(kind="fashion_mnist", path=str(tmp_path / "nowhere")), str(tmp_path))


def test_without_any_way_to_fetch_each_way_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "INSTALLED", "nowhere")
    monkeypatch.setattr(fashion_mnist, "ADDRESS", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(fashion_mnist.FashionMnistError) as error:
        fashion_mnist.locate(None, str(tmp_path / "cache"))
    assert "from debian package: apt-get and dpkg are not here" in str(error.value)
    assert "from public address" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_bad_download_is_not_kept_and_an_incomplete_cache_is_replaced(fashion_mnist_files, tmp_path, monkeypatch):
    def cut(folder):
        for path in fashion_mnist_files.glob("*-ubyte*"):
            (folder / path.name).write_bytes(path.read_bytes()[: 5000 if "t10k-labels" in path.name else None])

    def whole(folder):
        for path in fashion_mnist_files.glob("*-ubyte*"):
            (folder / path.name).symlink_to(path)

    monkeypatch.setattr(fashion_mnist, "INSTALLED", "nowhere")
    monkeypatch.setattr(fashion_mnist, "_from_debian_package", cut)
    monkeypatch.setattr(fashion_mnist, "_from_public_address", whole)
    incomplete = tmp_path / "cache" / "fashion-mnist"
    incomplete.mkdir(parents=True)
    (incomplete / "t10k-labels-idx1-ubyte.gz").touch()
    assert fashion_mnist.locate(None, str(tmp_path / "cache")) == str(incomplete)
    assert len(list(incomplete.glob("*-ubyte*"))) == 4
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["fashion-mnist"]


def test_idx_helper_writes_what_the_format_says(folder):
    data = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    assert struct.unpack(">4I", data[:16]) == (0x803, 25, 12, 12)
