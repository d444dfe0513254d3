"""Looking into small networks in tests."""

from __future__ import annotations

from torch import nn

from pipeline.config.training import DiagnosticsSettings
from pipeline.distributed.worker import alone
from pipeline.training.diagnostics import Diagnostics


class RecordedEvents(list):
    """Events that were emitted, as dictionaries."""

    def __call__(self, kind, **fields):
        self.append({"kind": kind, "time": 0.0, **fields})


def mean_loss(images, labels, forward):
    return nn.functional.cross_entropy(forward(images), labels)


def make(model, worker=None, *, loss=mean_loss, **settings):
    events = RecordedEvents()
    settings = DiagnosticsSettings(**{"every_steps": 1, **settings})
    return Diagnostics(worker or alone("cpu"), model, settings, loss=loss, emit=events), events


def hooks_of(model):
    kinds = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
