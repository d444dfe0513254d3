"""What the host waits for: of a step its loss, of an evaluation its counts; copies to a GPU that nothing waits for."""

import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from gpu_jobs import PHOTOGRAPHS, make_job, no_waiting

from pipeline.data.reader import Batch
from pipeline.distributed.worker import alone
from pipeline.training import norm_statistics
from pipeline.training.assembly import assemble

STEPS = {
    **{norm: ({"norm": norm}, {}) for norm in ("batch", "batch_renorm", "switchable", "power", "group")},
    "lanes": ({"norm_statistics": "lane"}, {}),
    "averaged": ({}, {"weight_ema": 0.9}),
    "clipped, in parts": ({}, {"clip_norm": 1.0, "accumulate": 2}),
    "clipped by layer": ({"norm": "none"}, {"clip_adaptive": 0.01}),
    "adamw": ({}, {"optimizer": "adamw"}),
    "photographs": ({"input_size": 6}, {"augment": PHOTOGRAPHS, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_nothing_but_its_loss(name, shards, tmp_path, cuda):
    """The loss comes by an event."""
    model, options = STEPS[name]
    with assemble(alone("cuda"), make_job(shards, tmp_path / "job", model, bf16=True, **options)) as training:
        training.step.warm_up()
        training.checkpoints.restore()
        with training.loader.batches(0) as read:
            batches = training.step.data.ahead(read)
            training.step.take(batches)
            with no_waiting():
                for _ in range(5):
                    training.step.take(batches)


def test_batches_that_are_copied_ahead_are_those_that_were_read(shards, tmp_path, device):
    """Also where the GPU is far behind the host, so that copies and what uses them are queued together."""
    with assemble(alone(device.type), make_job(shards, tmp_path / "job")) as training:
        with training.loader.batches(0) as batches:
            expected = [(batch.images.cpu().clone(), batch.labels.cpu().clone()) for batch in batches]
        found = []
        with training.loader.batches(0) as batches:
            for images, labels, *_ in training.step.data.ahead(batches):
                if device.type == "cuda":
                    torch.cuda._sleep(10_000_000)  # some milliseconds
                found.append((images.clone(), labels.clone()))
    assert len(found) == 32
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(values.cpu(), read) for values, read in zip(one, other, strict=True))


def test_a_copy_that_takes_long_is_waited_for_by_the_device(shards, tmp_path, cuda):
    large = torch.randint(0, 256, (64, 3, 512, 512), dtype=torch.uint8).pin_memory()
    read = [Batch(large.roll(by, 0).pin_memory(), torch.full((64,), by).pin_memory()) for by in range(6)]
    with assemble(alone("cuda"), make_job(shards, tmp_path / "job")) as training, no_waiting():
        sums = [batch.images[0].long().sum() for batch in training.step.data.ahead(iter(read))]
    assert [int(value) for value in sums] == [int(batch.images[0].long().sum()) for batch in read]


def test_precise_statistics_wait_for_nothing(shards, tmp_path, device):
    with assemble(alone(device.type), make_job(shards, tmp_path / "job")) as training:
        model = training.state.model
        images = [
            images
            for batch in itertools.islice(_batches(training), 3)
            for images, _ in training.step.data.parts(batch, 0)
        ]
        norm_statistics.precise(training.worker, model, images[:1])
        with no_waiting() if device.type == "cuda" else warnings.catch_warnings():
            norm_statistics.precise(training.worker, model, images)
        layer = next(iter(norm_statistics.layers(model).values()))
        assert layer.running_mean.abs().sum() > 0


def _batches(training):
    with training.loader.batches(0) as batches:
        yield from batches


@pytest.mark.parametrize("statistics", ["running", "precise"])
def test_an_evaluation_waits_for_its_counts_alone(statistics, shards, tmp_path, cuda):
    with assemble(alone("cuda"), make_job(shards, tmp_path / "job", evaluation_statistics=statistics)) as training:
        training.step.warm_up()
        training.checkpoints.restore()
        training.evaluator.run()  # its images stay on the device
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                training.evaluator.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in said if "synchroniz" in str(each.message)]) <= 1


AFTER_ANOTHER = """
import sys
sys.path[:0] = sys.argv[3:]
from gpu_jobs import make_job
from pipeline.distributed.worker import alone
from pipeline.training.loop import fit
for deterministic in (False, True):
    job = make_job(sys.argv[1], f"{sys.argv[2]}/{deterministic}", epochs=1, deterministic=deterministic)
    fit(alone("cuda"), job)
"""


def test_a_deterministic_training_may_follow_another_in_one_process(shards, tmp_path, cuda):
    """torch looks once in a process whether products of cuBLAS are the same each time."""
    command = [sys.executable, "-c", AFTER_ANOTHER, shards, str(tmp_path), *sys.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
