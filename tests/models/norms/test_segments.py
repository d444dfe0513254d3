"""Where Triton cannot compile, segments are normalized by torch's own operations."""

import subprocess

import pytest
import torch

from models.norms import segments


class NoCompiler:
    """As `segment_kernels` where there is no compiler."""

    @staticmethod
    def normalize(*_):
        raise subprocess.CalledProcessError(1, ["gcc", "main.c"])


def test_a_machine_without_a_compiler_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(segments, "segment_kernels", NoCompiler)
    segments.kernels_work.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"^Triton cannot compile .*gcc.*install a C compiler and Python's headers"
        ):
            assert not segments.kernels_work(torch.device("cpu"))
        assert not segments.kernels_work(torch.device("cpu"))
    finally:
        segments.kernels_work.cache_clear()


def test_kernels_that_can_be_launched_are_taken(monkeypatch):
    monkeypatch.setattr(segments, "segment_kernels", segments._WholeTensors)
    segments.kernels_work.cache_clear()
    try:
        assert segments.kernels_work(torch.device("cpu"))
    finally:
        segments.kernels_work.cache_clear()
