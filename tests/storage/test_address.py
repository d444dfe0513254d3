"""Paths and URLs for which no filesystem can be found."""

from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import pipeline.__main__ as commands
from pipeline import storage
from pipeline.ingest.sources.source import spark_path

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
    ],
)
def test_drivers_that_cannot_be_made_are_one_line(path, says, capsys):
    with pytest.raises(SystemExit):
        commands.main(lambda: commands.app(["ingest", "-c", str(QUICKSTART), "-o", f"output={path}"]))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path} cannot be opened: ")
    assert line.endswith(says)


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
