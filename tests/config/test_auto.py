"""`auto`: numbers of a recipe from the number of training images."""

import pytest

from pipeline.config import SettingsError, load_settings
from pipeline.config.auto import batch_size_for, epochs_for, is_undecided, resolve, words
from pipeline.config.dataset import ReaderSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.training.job import Job

FOLDER = "conf/folder.yaml"
AUTO = ("train.batch_size=auto", "train.epochs=auto", "train.warmup_epochs=auto")


def load(*overrides, path="conf/quickstart.yaml"):
    return load_settings(path, [*AUTO, *overrides])


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs"),
    [
        (300, 32, 60),  # 9 steps an epoch: 60 epochs are 540 steps
        (800, 32, 60),
        (1_000, 32, 49),  # 31 steps an epoch: 1,519 steps
        (3_040, 32, 20),  # the training split of 3,800 images: 95 steps an epoch
        (3_200, 64, 30),
        (6_400, 128, 30),
        (12_800, 256, 30),
        (55_000, 256, 20),
        (1_281_167, 256, 20),
    ],
)
def test_small_splits_train_long_in_small_batches(rows, batch_size, epochs):
    assert batch_size_for(rows, lanes=16) == batch_size
    assert epochs_for(rows, batch_size) == epochs


@pytest.mark.parametrize("rows", [1, 7, 30, 100, 999, 1_600, 4_321, 20_000, 10**6])
@pytest.mark.parametrize("lanes", [1, 3, 4, 16, 48, 100])
def test_the_batch_is_cut_into_lanes_and_fits_the_split(rows, lanes):
    size = batch_size_for(rows, lanes)
    assert size % lanes == 0
    assert size <= max(rows, lanes)
    assert size < 256 + lanes
    if rows >= 50 * 32:
        assert size >= 32
    if rows >= 50 * (32 + lanes):
        assert rows // size >= 35  # 50, but for the rounding to lanes


def test_settings_get_the_numbers():
    settings = resolve(load("train.lanes=8"), 3_040)
    train = settings.train
    assert (train.batch_size, train.rank_batch_size, train.epochs, train.warmup_epochs) == (32, None, 20, 1.0)
    assert not is_undecided(settings)
    assert settings.compare == load("train.lanes=8").compare
    assert resolve(settings, 10) == settings
    assert words(load(), settings, 3_040) == (
        "auto, for 3,040 training images: batch size 32, 20 epochs, warm-up over 1 epochs"
    )


def test_what_was_written_is_not_said_to_be_auto():
    written = load("train.epochs=3", "train.batch_size=64")
    assert words(written, resolve(written, 1_000), 1_000) == (
        "auto, for 1,000 training images: warm-up over 0.15 epochs"
    )
    written = load("train.epochs=3", "train.warmup_epochs=0", "train.batch_size=[64, auto]")
    assert words(written, resolve(written, 1_000), 1_000) == "auto, for 1,000 training images: batch size 64"


def test_what_is_set_stays_and_decides_the_rest():
    settings = resolve(load("train.batch_size=64"), 1_000)
    assert (settings.train.batch_size, settings.train.epochs) == (64, 60)  # 15 steps an epoch
    settings = resolve(load("train.batch_size=null", "train.rank_batch_size=16"), 1_000)  # two workers
    assert (settings.train.global_batch, settings.train.epochs) == (32, 49)
    settings = resolve(load("train.epochs=10"), 1_000)
    assert (settings.train.epochs, settings.train.warmup_epochs) == (10, 0.5)
    settings = resolve(load("train.warmup_epochs=0"), 1_000)
    assert (settings.train.epochs, settings.train.warmup_epochs) == (49, 0)


def test_arms_differ_in_what_the_grid_varies_alone():
    settings = resolve(load("train.batch_size=[auto, 128]", "model.norm=batch"), 2_000)
    assert settings.compare.grid["train.batch_size"] == (32, 128)
    arm = settings.with_values({"train.batch_size": 128})
    assert (arm.train.batch_size, arm.train.epochs) == (128, 25)
    with pytest.raises(SettingsError, match=r"train\.batch_size lists \[32, 128\]"):
        settings.require_single_run()


def test_an_auto_that_the_grid_lists_as_a_number_too():
    with pytest.raises(
        SettingsError, match=r"with auto for 2,000 training images: .*train\.batch_size lists a value twice"
    ):
        resolve(load("train.batch_size=[auto, 32]"), 2_000)


def test_a_number_that_does_not_go_with_the_rest():
    with pytest.raises(SettingsError, match=r"for 2,000 training images: train\.accumulate 7 does not divide"):
        resolve(load("train.accumulate=7"), 2_000)


def test_two_ways_to_say_how_large_a_batch_is():
    with pytest.raises(SettingsError, match="batch_size auto and rank_batch_size 64 both say how large a batch is"):
        load("train.rank_batch_size=64")


def test_auto_is_read_back_as_it_was_written(tmp_path):
    from pipeline.config.effective import effective_yaml

    (tmp_path / "all.yaml").write_text(effective_yaml(load()))
    assert load_settings(tmp_path / "all.yaml") == load()


@pytest.mark.parametrize("name", ["epochs", "batch_size", "warmup_epochs"])
def test_a_training_is_never_asked_to_guess(name):
    train = TrainSettings(**{"batch_size": 32, name: "auto"})
    with pytest.raises(ValueError, match=rf"train\.{name} is auto, which stands for a number only with a dataset"):
        Job("data", "folder", ModelSettings(), train, reader=ReaderSettings())


@pytest.mark.parametrize(
    "value", ["train.epochs=0", "train.epochs=Auto", "train.warmup_epochs=-1", "train.batch_size=0"]
)
def test_values_that_are_neither(value):
    with pytest.raises(SettingsError, match=value.partition("=")[0].replace(".", r"\.")):
        load_settings("conf/quickstart.yaml", [value])


def test_the_folder_recipe_fits_any_number_of_images():
    for rows in (100, 1_000, 3_040, 50_000):
        settings = resolve(load_settings(FOLDER), rows)
        assert not is_undecided(settings)
        assert settings.train.epochs >= 20
