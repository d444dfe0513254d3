"""torch's own batch norm, kept in a network of one's own: it computes as before, and ranks can join its statistics."""

from __future__ import annotations

from torch import nn

from models.norms.base import MeanVarianceNorm


class _KeptNorm(MeanVarianceNorm):
    """What evaluation by several ranks, exact statistics and folding ask of a norm layer with running statistics.

    It has no ``__init__`` of its own: a layer of torch becomes one by a change of its class.
    """

    num_features: int

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.num_features


class KeptBatchNorm1d(nn.BatchNorm1d, _KeptNorm):  # type: ignore[misc]
    """`torch.nn.BatchNorm1d` that is a `RunningNorm`."""


class KeptBatchNorm2d(nn.BatchNorm2d, _KeptNorm):  # type: ignore[misc]
    """`torch.nn.BatchNorm2d` that is a `RunningNorm`."""


class KeptBatchNorm3d(nn.BatchNorm3d, _KeptNorm):  # type: ignore[misc]
    """`torch.nn.BatchNorm3d` that is a `RunningNorm`."""


_KEPT: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: KeptBatchNorm1d,
    nn.BatchNorm2d: KeptBatchNorm2d,
    nn.BatchNorm3d: KeptBatchNorm3d,
}


def join_statistics_of_torch(network: nn.Module) -> list[str]:
    """Let ranks join the running statistics of torch's batch norm layers, which stay as they are in all else.

    Returns
    -------
    list of str
        The names of other layers that keep running statistics, of which each rank has its own; not of
        `torch.nn.SyncBatchNorm`, which gives all ranks the same.
    """
    others = []
    for name, module in network.named_modules():
        if isinstance(module, (MeanVarianceNorm, nn.SyncBatchNorm)) or getattr(module, "running_mean", None) is None:
            continue
        if type(module) in _KEPT:
            module.__class__ = _KEPT[type(module)]
        else:
            others.append(name)
    return others


def check_synchronized(network: nn.Module) -> None:
    """Check that a network can be trained by several ranks on CPUs.

    Raises
    ------
    ValueError
        It has a `torch.nn.SyncBatchNorm`, which takes its statistics over ranks on GPUs alone.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    if names:
        raise ValueError(
            f"{names[0]} is a torch.nn.SyncBatchNorm, which several workers can use on GPUs alone: set model.norm to "
            "batch and model.norm_statistics to world, which does the same on CPUs, too"
        )
