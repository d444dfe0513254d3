"""The state in which the ranks of a training differ: buffers of norms, and random states.

A checkpoint holds it for every rank, so that a restarted gang goes on with the same bits. A gang of another size
cannot: it gets the statistics of all ranks together, and new random states.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

from models.saved_state import make_buffers
from pipeline.distributed.worker import Worker
from pipeline.training import norm_statistics
from pipeline.training.checkpoint import State


def capture(worker: Worker, model: nn.Module) -> State:
    """This rank's buffers and random states, as `torch.load(weights_only=True)` can read them back."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "buffers": {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(worker.device) if worker.device.type == "cuda" else None,
        "python": [version, list(words), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }


def restore(worker: Worker, model: nn.Module, ranks: list[State], *, seed: int, step: int) -> None:
    """Take up what this rank has captured; where the number of ranks changed, the statistics of all ranks together.

    Parameters
    ----------
    ranks : what `capture` returned, in rank order
    seed, step : of the training, for new random states where the number of ranks changed
    """
    make_buffers(model, ranks[min(worker.rank, len(ranks) - 1)]["buffers"])
    if len(ranks) != worker.world_size:
        norm_statistics.load(model, joint_buffers(model, [rank["buffers"] for rank in ranks]))
        seed_all(worker, seed, step)
        return
    state = ranks[worker.rank]
    norm_statistics.load(model, state["buffers"])
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and worker.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), worker.device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))


def seed_all(worker: Worker, seed: int, step: int = 0) -> None:
    """Seed each rank otherwise: dropout must not drop the same units everywhere.

    Python workers are used for one training after the other, so that without this the state would depend on the past.
    """
    words = np.random.SeedSequence([seed, worker.rank, step]).generate_state(3, np.uint32)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


def joint_buffers(model: nn.Module, ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Buffers of all ranks' rows together, by name. Each rank counts alike, since each has seen as many rows.

    A buffer that is no running statistic is the same on all ranks, and taken from the first.
    """
    return {**ranks[0], **norm_statistics.join(model, ranks, [1] * len(ranks))}
