"""The one way into a training from outside, for tests of faults: a function that is called at documented moments.

``Job.hook`` is that function. Every rank calls it with a `Moment`; what it raises, the training raises there. It
travels to the executors with the job, so it has to pickle, and it is no part of a job's identity. A training without a
hook does nothing for it but compare it with None.

=====================  =============================================================================================
name                   when
=====================  =============================================================================================
``network_built``      The network is on its device. It may be changed in place: its norms are not yet connected to
                       the ranks, and it is not yet compiled, wrapped or known to an optimizer. First moment.
``restored``           The newest checkpoint, if there was one, is loaded; the first step comes next.
``before_data``        A step begins, in phase "data loading"; its batch is not yet taken.
``after_step``         A step has changed the weights; ``loss`` is that of its global batch.
``after_evaluation``   An evaluation is part of the progress.
``checkpoint_begun``   Rank 0 has copied the state and writes it in the background, until ``wait_until_written()``.
``before_write``       Rank 0's thread is about to write a checkpoint. What is raised counts as the storage's failure.
``after_write``        It was written, or that has failed.
=====================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

    from pipeline.distributed.worker import Worker
    from pipeline.training.job import Job

Name = Literal["network_built", "restored", "before_data", "after_step", "after_evaluation", "checkpoint_begun",
               "before_write", "after_write"]  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """Where a training is when it calls its hook.

    step : optimizer steps done; of ``before_write`` and ``after_write``, those that the checkpoint is of
    model : the bare network, at ``network_built``
    loss : mean over the global batch, at ``after_step``
    wait_until_written : returns when no checkpoint is being written, at ``checkpoint_begun``
    """

    name: Name
    worker: Worker
    job: Job
    steps_per_epoch: int
    step: int = 0
    model: nn.Module | None = None
    loss: float | None = None
    wait_until_written: Callable[[], None] | None = None


Hook = Callable[[Moment], None]
# What the parts of a training call, as ``call("after_step", step=3, loss=0.5)``; None where there is no hook.
CallHook = Callable[..., None] | None


def bind(worker: Worker, job: Job, steps_per_epoch: int) -> CallHook:
    """What the parts of this training call at their moments; None where the job has no hook."""
    hook = job.hook
    if hook is None:
        return None

    def call(name: Name, **of_this_moment: object) -> None:
        hook(Moment(name, worker, job, steps_per_epoch, **of_this_moment))  # type: ignore[arg-type]

    return call
