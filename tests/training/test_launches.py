"""What a step asks torch for beside the network and the update: on a GPU each of it takes the host a launch.

The counts are the CPU's, where nothing is fused; what is beside the network is the same on both.
"""

from collections import Counter

import pytest
import torch
from gpu_jobs import AUGMENT, PHOTOGRAPHS, make_job
from small_shards import write_dataset
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.augment import AugmentSettings
from pipeline.distributed.worker import alone
from pipeline.training.assembly import assemble


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("launches") / "noise")
    write_dataset(path, (128,), shape=(3, 8, 8), row_group_rows=16)
    return path


class Asked(TorchDispatchMode):
    """Counts the operations within its block, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def of_a_bare_loop(training, batch_size, bf16):
    """A step as one writes it by hand, of the same network and optimizer."""
    images = torch.randn(batch_size, 3, 8, 8).to(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.long)
    with Asked() as asked:
        training.state.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = training.state.model(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        training.state.optimizer.step()
    return asked.counts.total()


@pytest.mark.parametrize(
    ("options", "most"),
    [
        # Images to floats of mean 0, the loss to float64 and, with rank 0's word, to the host; views are free.
        ({}, 15),
        ({"bf16": True}, 15),
        ({"optimizer": "adamw"}, 15),
        ({"optimizer": "lamb"}, 15),
        ({"weight_ema": 0.9}, 16),
        ({"clip_norm": 1.0}, 23),
        ({"augment": AUGMENT}, 80),
        ({"augment": PHOTOGRAPHS}, 350),
    ],
    ids=["plain", "bf16", "adamw", "lamb", "averaged", "clipped", "augmented", "photographs"],
)
def test_little_is_asked_for_beside_the_network(options, most, noise, tmp_path):
    job = make_job(noise, tmp_path / "job", **{"augment": AugmentSettings(), **options})
    with assemble(alone("cpu"), job) as training:
        training.step.warm_up()
        training.checkpoints.restore()
        with training.loader.batches(0) as read:
            batches = training.step.data.ahead(read)
            training.step.take(batches)  # makes the optimizer's buffers
            with Asked() as asked:
                training.step.take(batches)
        bare = of_a_bare_loop(training, 32, options.get("bf16", False))
    assert bare > 100
    assert asked.counts.total() - bare <= most, asked.counts
