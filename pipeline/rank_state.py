"""What differs between the ranks of a training: buffers of norms, and random states.

Saved for every rank in every checkpoint, so that a restarted gang goes on with the same bits. A gang of another size
cannot: it gets the statistics of all ranks together, and random states of its own.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.worker import Worker


def capture(worker: Worker, model: nn.Module) -> dict[str, Any]:
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


def restore(worker: Worker, model: nn.Module, ranks: list[dict[str, Any]], *, seed: int, step: int) -> None:
    """Take up this rank's part of what all ranks captured, or a part of the whole where the number of ranks changed."""
    if len(ranks) != worker.world_size:
        _load(model, joint_buffers([rank["buffers"] for rank in ranks]))
        seed_all(worker, seed, step)
        return
    mine = ranks[worker.rank]
    _load(model, mine["buffers"])
    torch.set_rng_state(mine["torch"].cpu())
    if mine["cuda"] is not None and worker.device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"].cpu(), worker.device)
    version, words, gauss = mine["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = mine["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))


def seed_all(worker: Worker, seed: int, step: int = 0) -> None:
    """Random states of their own for each rank: dropout must not drop the same units everywhere.

    Python workers are used for one training after the other, so that without this the state would depend on the past.
    """
    words = np.random.SeedSequence([seed, worker.rank, step]).generate_state(3, np.uint32)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


def joint_buffers(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Buffers of all ranks' rows together: means of means, and variances by the law of total variance.

    Ranks count alike, since each has seen the same number of rows. Computed in float64. What is no running statistic
    is the same on all ranks and taken from the first.
    """
    joint = dict(ranks[0])
    for name in ranks[0]:
        prefix, _, leaf = name.rpartition("running_mean")
        if leaf or f"{prefix}running_var" not in joint:
            continue
        means = torch.stack([rank[name].double() for rank in ranks])
        variances = torch.stack([rank[f"{prefix}running_var"].double() for rank in ranks])
        joint[name] = means.mean(0).to(joint[name].dtype)
        total = variances.mean(0) + means.var(0, unbiased=False)
        joint[f"{prefix}running_var"] = total.to(joint[name].dtype)
    return joint


def _load(model: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    own = dict(model.named_buffers())
    for name, value in buffers.items():
        own[name].copy_(value)
