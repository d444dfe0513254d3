"""What each rank is said to wait for the others."""

import time
from functools import partial

import torch
from gpu_jobs import make_job
from ranks import run_ranks

from pipeline.training.job import Job
from pipeline.training.loop import fit

SLOW_SECONDS = 0.2


class Slow(torch.nn.Module):
    """Passes on its input; the gradient comes after a while, of the device's own time on a GPU.

    Not the output: over gloo a host waits there for the losses of all ranks, before its own backward pass.
    """

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(self.wait)
        return x

    def wait(self, grad):
        if grad.is_cuda:
            # Cycles at most so many a second: no GPU's clock is above 2.5 GHz.
            torch.cuda._sleep(int(SLOW_SECONDS * 2.5e9))
        else:
            time.sleep(SLOW_SECONDS)
        return grad


def slow_down(moment, rank):
    if moment.name == "network_built" and rank == 1:
        moment.model.append(Slow())


def rank_seconds(worker, job):
    hook = partial(slow_down, rank=worker.rank)
    return fit(worker, Job(**{**vars(job), "hook": hook})).ranks


def test_the_faster_rank_waits_for_the_slower_one(shards, tmp_path, device):
    job = make_job(shards, tmp_path / "job", epochs=1)
    fast, slow = run_ranks(rank_seconds, 2, job, device=device.type)[0]
    assert fast.steps == slow.steps == 16
    assert fast.all_reduce_seconds > 0.8 * SLOW_SECONDS * 15
    assert slow.all_reduce_seconds < 0.5 * fast.all_reduce_seconds
