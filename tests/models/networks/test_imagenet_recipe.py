"""conf/imagenet.yaml is the recipe that it says it is."""

from pathlib import Path

import pytest
from small_imagenet import outline

from pipeline.config import load_settings
from pipeline.training.optimizer import Schedule

RECIPE = Path(__file__).parents[3] / "conf" / "imagenet.yaml"


@pytest.mark.parametrize("workers", [1, 8, 16])
def test_the_learning_rate_is_scaled_with_the_workers_and_warms_up_for_five_epochs(workers):
    """Goyal et al. 2017, sections 2.1, 2.2 and 5.1: 0.1 for each 256 images, from 0.1 over 5 of 90 epochs."""
    settings = load_settings(RECIPE, [f"workers.count={workers}"])
    steps = 1_281_167 // settings.train.global_batch
    schedule = Schedule(settings.train, steps)
    peak = 0.1 * workers
    assert settings.train.global_batch == 256 * workers
    assert schedule.learning_rate(0) == pytest.approx(0.1 if workers > 1 else 0, abs=0.002 * workers)
    assert schedule.learning_rate(5 * steps - 1) == pytest.approx(peak)
    assert max(map(schedule.learning_rate, range(90 * steps))) == pytest.approx(peak)
    assert schedule.learning_rate(90 * steps - 1) < 1e-3 * peak
    assert (settings.train.weight_decay, settings.train.momentum, settings.model.zero_init) == (1e-4, 0.9, True)


def test_its_network_is_resnet50():
    model = load_settings(RECIPE, ["model.norm=batch"]).model
    assert sum(p.numel() for p in outline(model.network, model.norm).parameters()) == 25_557_032
