"""What a dataset can teach, and what a comparison on it can show: known from the manifest, before training."""

from __future__ import annotations

import math

from pipeline.config.settings import Settings
from pipeline.data.manifest import DatasetError, Manifest

# Recall of a class is a share of its images: of one image it is 0 or 1. Fewer images than these measure nothing.
LEAST_OF_A_CLASS = 2
LEAST_IMAGES = 30
# A dataset with fewer images says what can be known from it.
SMALL_DATASET = 1_000
# Of two networks, the share of images on which one alone is right, for each of the two.
RIGHT_ALONE = 0.1
_MOST_NAMES = 5


def check_classes(manifest: Manifest, evaluate_on: str, *, compared: bool) -> list[str]:
    """Check that there are classes to tell apart, and that the evaluated split can measure each of them.

    Parameters
    ----------
    evaluate_on : the split that is evaluated
    compared : whether trainings are compared by it; a single training is only warned of what the split cannot measure

    Returns
    -------
    Sentences that a person should read before training.

    Raises
    ------
    DatasetError
        The training split has images of one class alone, or the evaluated split is too small for a comparison.
    """
    train = manifest.split("train")
    present = [number for number, rows in enumerate(train.label_counts) if rows]
    if len(present) < 2:
        only = manifest.classes[present[0]] if present else "none"
        raise DatasetError(
            f"dataset {manifest.name}: split 'train' has images of one class alone, {only!r}; a classifier needs at "
            "least two: ingest images of other classes, in folders or with labels of their own"
        )
    problems = [text for text in (_too_few(manifest, evaluate_on), _missing(manifest, evaluate_on)) if text]
    if problems and compared:
        raise DatasetError(problems[0])
    return problems + small_dataset(manifest, evaluate_on)


def check_comparison(settings: Settings, manifest: Manifest, *, chooses: bool) -> list[str]:
    """`check_classes` for a comparison, with what its search and its seeds leave open.

    Parameters
    ----------
    chooses : whether tuned values or evaluations are chosen on ``compare.search_on``
    """
    options = settings.compare
    sentences = check_classes(manifest, settings.train.evaluate_on, compared=True)
    if chooses:
        sentences += filter(None, (_too_few(manifest, options.search_on), _missing(manifest, options.search_on)))
    return sentences


def small_dataset(manifest: Manifest, evaluate_on: str) -> list[str]:
    """What can be known from a dataset of few images, as a sentence; none of a dataset that is large enough.

    The difference of two accuracies over n images has the variance (a + b) / n, where a and b are the shares of images
    that one network alone and the other alone gets right (McNemar 1947, for a = b). With a = b = 0.1, a difference
    below 1.96 sqrt(0.2 / n) is within the 95% that the choice of the n images explains.
    """
    images = sum(split.rows for split in manifest.splits.values())
    if images >= SMALL_DATASET:
        return []
    rows, points = manifest.split(evaluate_on).rows, 100 * smallest_difference(manifest.split(evaluate_on).rows)
    return [
        f"Dataset {manifest.name} has {images:,} images, {rows} of them in the {evaluate_on} split: that split cannot "
        f"show differences in accuracy below {points:.1f} points (1.96 sqrt(2 x {RIGHT_ALONE} / "
        f"{rows}), if each of two networks alone is right on {RIGHT_ALONE:.0%} of the images)."
    ]


def smallest_difference(rows: int) -> float:
    """Smallest difference in accuracy, from 0 to 1, that so many images can show: see `small_dataset`."""
    return 1.96 * math.sqrt(2 * RIGHT_ALONE / rows)


def one_seed(settings: Settings) -> list[str]:
    """What a comparison with a single seed leaves open, as a sentence."""
    if len(settings.compare.all_seeds) > 1:
        return []
    return [
        f"compare.seeds has one seed, {settings.compare.all_seeds[0]}: nothing can be said about how much of a "
        "difference is chance; three seeds or more can say it."
    ]


def _too_few(manifest: Manifest, split: str) -> str | None:
    rows = manifest.split(split).rows
    if rows >= LEAST_IMAGES:
        return None
    return (
        f"dataset {manifest.name}: split {split!r} has {rows} images, and below {LEAST_IMAGES} an accuracy says "
        f"nothing: ingest more images, or {_larger(split)}"
    )


def _missing(manifest: Manifest, split: str) -> str | None:
    """The classes of which the training split has images and this one not enough."""
    trained, there = manifest.split("train").label_counts, manifest.split(split).label_counts
    few = [number for number, rows in enumerate(there) if trained[number] and rows < LEAST_OF_A_CLASS]
    if not few:
        return None
    it, these = ("them", "these classes") if len(few) > 1 else ("it", "this class")
    names = ", ".join(f"{manifest.classes[number]!r} ({there[number]})" for number in few[:_MOST_NAMES])
    more = f" and {len(few) - _MOST_NAMES} other classes" if len(few) > _MOST_NAMES else ""
    return (
        f"dataset {manifest.name}: split {split!r} has fewer than {LEAST_OF_A_CLASS} images of {names}{more}, which "
        f"split 'train' has; recall and balanced accuracy of {it} cannot be measured: ingest more images of {these}, "
        f"leave {it} out, or {_larger(split)}"
    )


def _larger(split: str) -> str:
    return f"a larger dataset.{split}_share" if split in ("validation", "test") else "evaluate another split"
