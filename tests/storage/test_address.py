"""Paths and URLs for which no filesystem can be found."""

from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import pipeline.__main__ as commands
from pipeline import storage
from pipeline.data import petastorm_compat
from pipeline.ingest.sources.read_ahead import read_ahead
from pipeline.ingest.sources.source import spark_path
from pipeline.storage.writable import prepare_output

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("path", "right"),
    [("dbfs:/mnt/x", "/dbfs/mnt/x, its mount"), ("s3:/bucket/x", "s3://bucket/x"), ("abfss:/a@b/x", "abfss://a@b/x")],
)
def test_one_slash_is_no_local_folder(path, right):
    for ask in (storage.is_local, storage.absolute, storage.exists):
        with pytest.raises(storage.AddressError) as refused:
            ask(path)
        assert str(refused.value) == f"{path} is neither a path nor a URL: write {right}"


@pytest.mark.spark
def test_one_slash_after_a_scheme_is_one_for_spark(spark):
    assert spark_path(spark, "dbfs:/mnt/table") == "dbfs:/mnt/table"


@pytest.mark.parametrize("path", ["a/b", "file:/a/b", "file:///a/b", "/a/s3:/b", "c:/a", "a:b/c"])
def test_local_paths(path):
    assert storage.is_local(path)
    assert storage.absolute(path) == str(Path(path.removeprefix("file://").removeprefix("file:")).absolute())


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("dbfs://mnt/x", "'instance' and 'token'; on Databricks write /dbfs/..., or /Volumes/..."),
        ("hf://datasets/x", "Install huggingface_hub to access HfFileSystem"),
        ("ftpx://host/x", "Protocol not known: ftpx"),
        ("tar://x", ""),
        ("hdfs://host/x", ""),
    ],
)
def test_drivers_that_cannot_be_made_are_one_line(path, says, capsys):
    with pytest.raises(SystemExit):
        commands.main(lambda: commands.app(["ingest", "-c", str(QUICKSTART), "-o", f"output={path}"]))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path} cannot be opened: ")
    assert line.endswith(says)


def test_a_driver_that_meets_nobody_is_an_outage_and_named():
    with pytest.raises(storage.UnreachableError, match=r"^ftp://127.0.0.1:1/x cannot be reached from .* refused$"):
        storage.exists("ftp://127.0.0.1:1/x")


@pytest.mark.parametrize("call", [
    lambda path: prepare_output(path, "train.json"),
    lambda path: storage.publish(f"{path}/f", b"new"),
    lambda path: storage.create(f"{path}/f", b"new"),
    storage.remove, storage.remove_file, storage.names, storage.exists, storage.absolute, storage.open_file,
])  # fmt: skip
def test_a_path_with_two_colons_touches_no_other_folder(tmp_path, call):
    """fsspec takes `a::b` for a chain, and opens `a`."""
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "one.png").write_bytes(b"precious")
    with pytest.raises(storage.AddressError, match=f"^{photos}::v2(/f)? has :: in it.*give the folder"):
        call(f"{photos}::v2")
    assert (photos / "one.png").read_bytes() == b"precious"


@pytest.mark.parametrize("path", ["a::b", "s3://b/a::b", "zip://x::file:///y", "simplecache::a", "ftp://[::1]/x",
                                  "simplecache::s3://b/x::y", "simplecache::simplecache::s3://b/x"])  # fmt: skip
def test_chains_are_refused(path):
    with pytest.raises(storage.AddressError, match="has :: in it"):
        storage.filesystem(path)
    with pytest.raises(storage.AddressError, match="has :: in it"):
        petastorm_compat._resolve([path], storage_options=None, filesystem=None, row_groups=None)


def test_a_url_that_is_read_through_a_cache_is_no_other(tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    assert storage.read_bytes(f"simplecache::file://{tmp_path}/file") == b"1"


def test_a_picture_with_two_colons_in_its_name_is_set_aside(remote):
    items = [{"path": name, "size": 1, "problem": None} for name in ("a::b.png", "c.png")]
    storage.publish(f"{remote}/c.png", b"c")
    assert [found[1:] for found in read_ahead(items, remote)] == [(None, True), (b"c", False)]


class OldStore(MemoryFileSystem):
    """As s3fs before 2024.12, which drops what it does not know."""

    protocol = "r2"

    def pipe_file(self, path, value, **options):
        super().pipe_file(path, value)


def test_a_driver_that_would_overwrite_claims_is_refused():
    fsspec.register_implementation("r2", OldStore, clobber=True)
    with pytest.raises(storage.AddressError, match=r"^r2://bucket/claim cannot be claimed .* install a newer one"):
        storage.create("r2://bucket/claim", b"mine")
    assert not storage.exists("r2://bucket/claim")
