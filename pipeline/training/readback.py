"""A few numbers of a step, brought to the host while the device goes on."""

from __future__ import annotations

import torch
import torch.distributed as dist


class Readback:
    """Copies a small tensor from a device, without waiting for what is launched after it.

    On CUDA it goes to pinned memory, and an event tells when it is there: a host that reads the loss between forward
    and update waits for the forward pass at most, while the device has the whole backward pass before it. On CPU
    nothing is copied.

    Parameters
    ----------
    count : float64 numbers that are read at once, at most
    """

    def __init__(self, device: torch.device, count: int):
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._arrived = torch.cuda.Event()
            self._host = torch.empty(count, dtype=torch.float64, pin_memory=True)
            self._stream = torch.cuda.Stream(device)

    def begin(self, values: torch.Tensor, pending: dist.Work | None) -> None:
        """Begin to read ``values``, float64, once ``pending`` (a sum over ranks, if there is one) is done."""
        self._values, self._pending = values, pending
        if not self._cuda:
            return
        if pending is None:
            self._copy(values)
            return
        # What is launched next need not wait for the other ranks: the sum is waited for on a stream of its own.
        self._stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(self._stream):
            pending.wait()  # NCCL: the stream waits, and not the host
            self._copy(values)
            values.record_stream(self._stream)

    def _copy(self, values: torch.Tensor) -> None:
        self._host[: len(values)].copy_(values, non_blocking=True)
        self._arrived.record()

    def wait(self) -> list[float]:
        """The numbers, once they are here."""
        if self._cuda:
            self._arrived.synchronize()
            return self._host[: len(self._values)].tolist()
        if self._pending is not None:
            self._pending.wait()
        return self._values.tolist()
