"""Each test here runs on the CPU, and again on a GPU where there is one; `make gpu-test` runs them alone.

They need torch, numpy, pyarrow, pydantic, PyYAML, fsspec, tenacity and pytest, and neither Spark nor Java.
"""

from __future__ import annotations

import gc

import pytest
import torch
from small_shards import write_dataset

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    if request.param == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", 0)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda(request) -> torch.device:
    """For what only a GPU has."""
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    """A dataset of 512 images of 8 x 8 pixels whose only split is ``train``."""
    path = str(tmp_path_factory.mktemp("cuda") / "noise")
    write_dataset(path, (256, 256), shape=(3, 8, 8), row_group_rows=16)
    return path


@pytest.fixture
def held():
    """Bytes of GPU memory that are in use."""

    def bytes_in_use() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    return bytes_in_use
