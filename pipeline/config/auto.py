"""What ``auto`` stands for: numbers of a recipe that follow from the number of training images.

A recipe with fixed numbers trains a folder of 2,000 images for a few hundred steps, in which no learning rate shows
what it can do. The rules below hold the number of *steps* in a range instead. They are round numbers from the
literature and from arithmetic; none is fitted to a dataset.

- ``train.batch_size``: the largest of 256, 128, 64, 32 that leaves at least 50 steps an epoch, else 32. ImageNet
  recipes have 256 as their base, and larger batches need other learning rates (Goyal et al. 2017); with fewer than 16
  images for each of two workers batch norm's statistics get poor (Wu & He 2018, figure 1); with fewer than 50 steps
  an epoch, evaluations follow each other faster than a network changes. It is rounded up to a multiple of
  ``train.lanes``, and is at most the split.
- ``train.epochs``: 20, or as many as make 1,500 steps, but at most 60. Epochs after 60 of a small split show a network
  images that it knows by heart.
- ``train.warmup_epochs``: a twentieth of the epochs, 5% of all steps (Goyal et al. 2017: 5 of 90 epochs).
"""

from __future__ import annotations

from pydantic import ValidationError

from pipeline.config import dotted
from pipeline.config.or_auto import AUTO
from pipeline.config.settings import Settings, SettingsError, explain

BATCH_SIZES = (256, 128, 64, 32)
STEPS_PER_EPOCH = 50
LEAST_STEPS = 1_500
LEAST_EPOCHS, MOST_EPOCHS = 20, 60
WARMUP_SHARE = 0.05
NAMES = ("train.batch_size", "train.epochs", "train.warmup_epochs")


def batch_size_for(rows: int, lanes: int) -> int:
    """The global batch for a training split of so many rows, a multiple of ``lanes``; at most ``rows`` if possible."""
    size = next((size for size in BATCH_SIZES if rows // size >= STEPS_PER_EPOCH), BATCH_SIZES[-1])
    lane_batch = min(-(-size // lanes), rows // lanes)
    return lanes * max(1, lane_batch)


def epochs_for(rows: int, batch_size: int) -> int:
    """Passes over a training split of so many rows."""
    steps = max(1, rows // batch_size)
    return min(MOST_EPOCHS, max(LEAST_EPOCHS, -(-LEAST_STEPS // steps)))


def is_undecided(settings: Settings) -> bool:
    """Whether a setting, or a value in the grid, is ``auto``."""
    return any(_is_auto(settings, name) for name in NAMES)


def resolve(settings: Settings, rows: int) -> Settings:
    """Return the settings with numbers in the place of ``auto``, in the settings themselves and in the grid.

    Each follows from the others as they stand outside of the grid, so that arms differ in what the grid varies alone:
    two arms of other batch sizes train for the same number of epochs.

    Parameters
    ----------
    rows : of the training split

    Raises
    ------
    SettingsError
        A number that is found does not go with the other settings, or is in the grid already.
    """
    if not is_undecided(settings):
        return settings
    train = settings.train
    size = batch_size_for(rows, train.lanes)
    epochs = epochs_for(rows, size if train.batch_size == AUTO else train.global_batch)
    warmup = round(WARMUP_SHARE * (epochs if train.epochs == AUTO else train.epochs), 4)
    tree = settings.model_dump()
    grid = tree["compare"]["grid"]
    for name, value in zip(NAMES, (size, epochs, warmup), strict=True):
        if getattr(train, name.removeprefix("train.")) == AUTO:
            dotted.put(Settings, tree, name, value)
        if AUTO in grid.get(name, ()):
            grid[name] = tuple(value if each == AUTO else each for each in grid[name])
    return _checked(settings, tree, rows)


def words(written: Settings, settings: Settings, rows: int) -> str:
    """What ``auto`` stands for, as a sentence before training: the numbers that were not written, and no others.

    Parameters
    ----------
    written : as the settings were before `resolve`
    settings : that `resolve` returned
    rows : of the training split
    """
    train = settings.train
    texts = (
        f"batch size {train.global_batch}",
        f"{train.epochs} epochs",
        f"warm-up over {train.warmup_epochs:g} epochs",
    )
    listed = ", ".join(text for name, text in zip(NAMES, texts, strict=True) if _is_auto(written, name))
    return f"auto, for {rows:,} training images: {listed}"


def _is_auto(settings: Settings, name: str) -> bool:
    """Whether a setting of `NAMES`, or one of its values in the grid, is ``auto``."""
    return AUTO in (getattr(settings.train, name.removeprefix("train.")), *settings.compare.grid.get(name, ()))


def _checked(settings: Settings, tree: dotted.Tree, rows: int) -> Settings:
    try:
        resolved = Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(explain(error, f"with auto for {rows:,} training images")) from None
    resolved._listed = settings._listed
    return resolved
