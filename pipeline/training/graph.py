"""A step recorded as CUDA graphs: of a small batch, launching the kernels one by one takes longer than they do."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import nn

from pipeline.training.batch import Part

# Passes before the recording, in which libraries choose their kernels and allocate their workspaces.
_WARM_UP_PASSES = 3
# The reader's thread may allocate pinned memory while this one records.
_MODE = "thread_local"


class PassGraph:
    """Forward and backward pass over a batch of one size, recorded once. They are two graphs, so that the host can wait
    for the loss while the device computes the backward pass.

    The gradients of the parameters stay where they were recorded: nothing may set ``.grad`` afterwards.

    Parameters
    ----------
    model : the network whose parameters ``loss`` depends on, all on one CUDA device
    loss : (images, labels) -> scalar
    example : images and labels in the sizes, dtypes and memory formats of those to come

    Attributes
    ----------
    loss : the mean loss of the batch that was computed last, float64 (1,) on the device

    Raises
    ------
    ValueError
        The network cannot be recorded.
    """

    def __init__(self, model: nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], example: Part):
        self._images, self._labels = (values.clone() for values in example)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._model = model
        self._warm_up(loss)
        model.zero_grad(set_to_none=True)
        try:
            # A recording that fails leaves its own stream as the current one.
            with torch.cuda.stream(torch.cuda.current_stream()):
                self._record(loss)
        except RuntimeError as error:
            _end_recording()
            if isinstance(error, torch.OutOfMemoryError):
                raise  # it has a cause, and an explanation, of its own
            raise ValueError(
                "train.cuda_graphs: this network cannot be recorded as a CUDA graph, since its forward or backward "
                f"pass makes the host wait for the device or is not the same every time ({error}): set it to false"
            ) from error

    def _warm_up(self, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        stream = _stream(self._images.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_PASSES):
                self._model.zero_grad(set_to_none=True)
                loss(self._images, self._labels).backward()
        torch.cuda.current_stream().wait_stream(stream)

    def _record(self, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        pool, stream = torch.cuda.graph_pool_handle(), _stream(self._images.device)
        with torch.cuda.graph(self._forward, pool=pool, stream=stream, capture_error_mode=_MODE):
            scalar = loss(self._images, self._labels)
            self.loss = scalar.detach().double().view(1)
        with torch.cuda.graph(self._backward, pool=pool, stream=stream, capture_error_mode=_MODE):
            scalar.backward()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Launch the forward pass: afterwards `loss` is that of this batch."""
        self._images.copy_(images, non_blocking=True)
        self._labels.copy_(labels, non_blocking=True)
        self._forward.replay()

    def backward(self) -> None:
        """Launch the backward pass of the batch that `forward` took: ``.grad`` of every parameter is then its own."""
        self._backward.replay()


class UpdateGraph:
    """An optimizer's step, recorded once: afterwards only the learning rates of its groups change.

    Parameters
    ----------
    optimizer : one of `make_optimizer` that has taken a step, with gradients that stay in their place
    update : what is recorded: the optimizer's step, and what is done to the gradients before it
    """

    def __init__(self, optimizer: torch.optim.Optimizer, update: Callable[[], None]):
        groups = optimizer.param_groups
        device = next(parameter for group in groups for parameter in group["params"]).device
        self._rates = [torch.zeros((), device=device) for _ in groups]
        self._graph = torch.cuda.CUDAGraph()
        rates = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
            with torch.cuda.graph(self._graph, stream=_stream(device), capture_error_mode=_MODE):
                update()
        finally:
            for group, value in zip(groups, rates, strict=True):
                group["lr"] = value

    def step(self, learning_rates: Iterable[float]) -> None:
        """Launch the update, with a learning rate for each group."""
        for rate, value in zip(self._rates, learning_rates, strict=True):
            rate.fill_(value)
        self._graph.replay()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of this process on which recordings are made: cuBLAS keeps a workspace for each that it sees."""
    return torch.cuda.Stream(device)


def _end_recording() -> None:
    """Random numbers of the device are taken for recorded until a recording ends, which one that failed does not."""
    with suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the graph is empty
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            pass
