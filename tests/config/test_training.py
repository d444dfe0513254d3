import math

import pytest

from pipeline.config.augment import AugmentSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings


@pytest.mark.parametrize(
    ("lanes", "sizes"), [(1, (1,)), (2, (1, 2)), (7, (1, 7)), (12, (1, 2, 3, 4, 6, 12)), (16, (1, 2, 4, 8, 16))]
)
def test_world_sizes_divide_the_lanes(lanes, sizes):
    assert TrainSettings(lanes=lanes).world_sizes == sizes


def test_the_global_batch_follows_from_the_workers():
    assert TrainSettings().for_workers(4).global_batch == 512
    assert TrainSettings(rank_batch_size=32).for_workers(4).global_batch == 128
    assert TrainSettings(batch_size=64).for_workers(4).global_batch == 64
    assert TrainSettings(rank_batch_size=32, batch_size=64).for_workers(2).global_batch == 64
    with pytest.raises(ValueError, match="call for_workers"):
        _ = TrainSettings().global_batch


def test_a_batch_that_cannot_be_cut_into_lanes_is_refused_with_one_that_can():
    with pytest.raises(ValueError, match="batch_size 64 is not rank_batch_size 32 x 4 workers: set one of the two"):
        TrainSettings(rank_batch_size=32, batch_size=64).for_workers(4)
    with pytest.raises(ValueError, match="rank_batch_size 30 x 2 workers is not a multiple of lanes 16: use 32"):
        TrainSettings(rank_batch_size=30).for_workers(2)
    with pytest.raises(ValueError, match="batch_size 250 is not a multiple of lanes 16: use 256"):
        TrainSettings(batch_size=250)


def test_a_warm_up_that_never_ends_is_refused_where_there_is_one():
    with pytest.raises(ValueError, match="warmup_epochs 5 is more than epochs 1: learning_rate would never be reached"):
        TrainSettings(epochs=1, warmup_epochs=5)
    assert TrainSettings(epochs=1, warmup_epochs=1).warmup_epochs == 1
    assert TrainSettings(epochs="auto", warmup_epochs=5).warmup_epochs == 5
    assert TrainSettings(epochs=1, warmup_epochs=5, schedule="one_cycle").warmup_epochs == 5
    assert TrainSettings(epochs=4, warmup_epochs=5, first_cycle_epochs=1).warmup_epochs == 5


@pytest.mark.parametrize("number", [math.inf, math.nan])
@pytest.mark.parametrize(
    ("section", "names"),
    [
        (TrainSettings, ("learning_rate", "weight_decay", "warmup_epochs", "clip_norm", "base_batch_size")),
        (ModelSettings, ("norm_eps", "norm_scale_init", "init_scale", "norm_r_max")),
        (AugmentSettings, ("mixup", "cutmix")),
    ],
)
def test_numbers_that_nothing_computes_with_are_refused(section, names, number):
    for name in names:
        with pytest.raises(ValueError, match=name):
            section(**{name: number})
    with pytest.raises(ValueError, match="mean"):
        ModelSettings(mean=(number,))


def test_seeds_are_such_that_weights_can_be_drawn_with():
    assert TrainSettings(seed=2**46).seed == 2**46
    with pytest.raises(ValueError, match="seed"):
        TrainSettings(seed=2**46 + 1)


def test_a_class_has_one_weight_which_is_a_number():
    with pytest.raises(ValueError, match=r"names the class 1 twice: give it one weight"):
        TrainSettings(class_weights={1: 2, "1": 3})
    with pytest.raises(ValueError, match="is neither none, balanced, nor a mapping"):
        TrainSettings(class_weights={"shirt": True})


def test_images_are_not_shifted_out_of_sight():
    AugmentSettings(shift=27).check(image_shape=(1, 28, 32), lane_rows=4, reader="arrow")
    with pytest.raises(
        ValueError, match=r"train\.augment\.shift 28 can move images of 28 x 32 wholly out of sight: use"
    ):
        AugmentSettings(shift=28).check(image_shape=(1, 28, 32), lane_rows=4, reader="arrow")
