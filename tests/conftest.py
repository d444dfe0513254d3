"""Data and sessions that several tests share."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import uuid
from pathlib import Path

import numpy as np
import pytest
from s3_server import S3Server, reserve_address
from small_data import dataset_settings, write_idx, write_idx_folder

from pipeline import storage
from pipeline.config.cluster import SparkSettings
from pipeline.config.settings import Settings
from pipeline.config.study import TrackingSettings

REPOSITORY = Path(__file__).parents[1]


S3_ADDRESS = pytest.StashKey()


def pytest_configure(config):
    """What processes that the tests start must find in their environment.

    Every JVM starts in half the processor time without the second compiler and a parallel collector.
    """
    os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
    config.stash[S3_ADDRESS] = reserve_address()


def pytest_collection_modifyitems(items):
    """Files that are marked as long come first, so that the processes of `make test` end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory) -> Path:
    """1,003 training and 301 test images: numbers that no batch, lane or worker count divides."""
    return write_idx_folder(tmp_path_factory.mktemp("idx"), train_rows=1003, test_rows=301)


@pytest.fixture(scope="session")
def spark(tmp_path_factory):
    """A real session with two slots; few partitions, since the tests' tables are small."""
    from pipeline.cluster.session import get_session

    conf = {
        "spark.sql.shuffle.partitions": "4",
        "spark.sql.warehouse.dir": str(tmp_path_factory.mktemp("warehouse")),
    }
    session = get_session(SparkSettings(master="local[2]", conf=conf), "sparknorm tests", trains=True)
    yield session
    session.stop()


@pytest.fixture(scope="session")
def dataset(spark, idx_folder, tmp_path_factory) -> str:
    """The path of an ingested dataset; tests must not change it."""
    from pipeline.ingest.job import ingest_dataset

    path = tmp_path_factory.mktemp("datasets") / "halves"
    ingest_dataset(spark, dataset_settings(path, idx_folder), cache=str(path.parent))
    return str(path)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An SQLite file with MLflow's tables and no runs. MLflow takes seconds to make them; tests copy the file."""
    import mlflow

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store_uri(empty_store, tmp_path) -> str:
    """The address of a new MLflow store in the test's folder, ``mlflow.db``."""
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"


@pytest.fixture
def settings(dataset, idx_folder, store_uri, tmp_path) -> Settings:
    """Complete settings of a study that takes seconds."""
    return Settings.model_validate(
        {
            "name": "small",
            "output": str(tmp_path / "runs"),
            "dataset": dataset_settings(Path(dataset), idx_folder).model_dump(),
            "model": {"network": "cnn", "norm": "batch", "depth": 3, "width": 4, "norm_groups": 2},
            "train": {"epochs": 2, "batch_size": 32, "lanes": 4, "evaluation_batch_size": 64},
            "workers": {"count": 2, "collective_timeout_seconds": 60},
            "tracking": TrackingSettings(uri=store_uri, artifacts=str(tmp_path / "artifacts")).model_dump(),
        }
    )


@pytest.fixture
def remote():
    """The address of a folder in memory, which fsspec treats as it treats an object store."""
    root = f"memory://{uuid.uuid4().hex}"
    yield root
    fs, inner = storage.filesystem(root)
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


@pytest.fixture(scope="session")
def s3(request, tmp_path_factory):
    """A real S3 server behind a proxy that makes faults where it is told to."""
    server = S3Server(tmp_path_factory.mktemp("s3"), request.config.stash[S3_ADDRESS])
    yield server
    server.close()


@pytest.fixture
def bucket(s3) -> str:
    """The address of a new bucket."""
    return s3.new_bucket()


@pytest.fixture(scope="session")
def fashion_mnist_files(tmp_path_factory) -> Path:
    """The folder of the real files: those of this machine, or fetched once into the repository's runs/cache."""
    from pipeline.ingest.sources import fashion_mnist

    return Path(fashion_mnist.locate(None, str(REPOSITORY / "runs" / "cache")))


@pytest.fixture(scope="session")
def fashion_mnist_part(fashion_mnist_files, tmp_path_factory) -> Path:
    """The first 6,000 and 1,000 real images, as IDX files."""
    folder = tmp_path_factory.mktemp("fashion-part")
    for prefix, rows in (("train", 6000), ("t10k", 1000)):
        for name, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
            source = next(fashion_mnist_files.glob(f"{prefix}-{name}-ubyte*"))
            data = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
            shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
            array = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)[:rows]
            write_idx(folder, f"{prefix}-{name}-ubyte", array)
    return folder
