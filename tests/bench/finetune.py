"""How many epochs pretrained weights save: networks that start from a checkpoint against those that start from nothing.

A network is trained on ten classes and then on five others, of which there are few images, in two ways: from scratch
for ``EPOCHS`` epochs, and from the checkpoint for 0.3 of them, with a new head. Counted are the epochs until the
fine-tuned network is as good on the test split as the one from scratch of the same seed was at its end; against all
epochs from scratch, and against those until that one itself was first as good. A network that never is counts as all
of the epochs from scratch. Each way has the best of three learning rates, chosen on the validation split with a seed of
its own. The pictures are real: Fashion-MNIST at half its size and scikit-learn's digits.

Trainings run one after the other in this process, without Spark, Java and MLflow.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from results import Result, compare, leave

sys.path.append(str(Path(__file__).parents[1] / "support"))

from small_splits import write_splits
from verdict_data import images

SEEDS = range(int(os.environ.get("BENCH_SEEDS", "5")))
RATES, RATE_SEED = (0.02, 0.1, 0.3), 100
EPOCHS, SHARE = 20, 0.3
SIZES = (200, 400)  # training images of the five classes
BATCH = 16
SIDE = 14
FASHION, DIGITS = "train", "digits"


@dataclass(frozen=True)
class Transfer:
    """What a network is trained on first, and what then: classes by the set of pictures that they are of.

    validation, test : images to choose rates by, and to judge by; of digits there are no more
    """

    name: str
    first: dict[str, tuple[int, ...]]
    then: dict[str, tuple[int, ...]]
    validation: int
    test: int


TRANSFERS = (
    Transfer(
        "five digits after ten of Fashion-MNIST", {FASHION: tuple(range(10))}, {DIGITS: (0, 1, 2, 3, 4)}, 150, 350
    ),
    Transfer(
        "five of Fashion-MNIST after five others and five digits",
        {FASHION: (0, 1, 2, 5, 8), DIGITS: (5, 6, 7, 8, 9)},
        {FASHION: (3, 4, 6, 7, 9)},
        1000,
        2000,
    ),
)


def run(work: Path) -> None:
    """Train all networks; print, plot and write the results."""
    results: list[Result] = []
    pairs = []
    for number, transfer in enumerate(TRANSFERS):
        folder = work / f"finetune-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        first = _write(transfer.first, folder / "first", {"train": 6000, "validation": 500, "test": 500})
        checkpoint = _train(first, folder / "pretrained", epochs=8, rate=0.1, seed=0, batch=32).checkpoint
        for rows in SIZES:
            found = _measure(transfer, rows, checkpoint, folder / str(rows))
            name = f"{transfer.name}, {rows} images"
            tuned, scratch, whole = f"sparknorm, fine-tuned: {name}", f"from scratch: {name}", f"all epochs: {name}"
            results += [
                Result(tuned, "epochs", [epochs for epochs, _, _, _ in found]),
                Result(scratch, "epochs", [epochs for _, epochs, _, _ in found]),
                Result(whole, "epochs", [float(EPOCHS)]),
                Result(f"{tuned}, accuracy at the end", "%", [100 * accuracy for _, _, accuracy, _ in found]),
                Result(f"{scratch}, accuracy at the end", "%", [100 * accuracy for _, _, _, accuracy in found]),
            ]
            pairs += [(tuned, whole), (tuned, scratch)]
        shutil.rmtree(folder, ignore_errors=True)
    title = f"epochs to the accuracy of {EPOCHS} epochs from scratch, n = {len(SEEDS)} seeds"
    leave("finetune", results + [compare(results, *pair) for pair in pairs], title)


def _measure(transfer: Transfer, rows: int, checkpoint: str, folder: Path) -> list[tuple[float, float, float, float]]:
    """For each seed the epochs to the final accuracy from scratch, fine-tuned and from scratch, and both at the end."""
    then = _write(
        transfer.then, folder / "then", {"train": rows, "validation": transfer.validation, "test": transfer.test}
    )
    ways = {"scratch": {"epochs": EPOCHS}, "tuned": {"epochs": round(SHARE * EPOCHS), "weights": checkpoint}}
    rates = {name: _best_rate(then, folder / name, **way) for name, way in ways.items()}
    found = []
    for seed in SEEDS:
        curves = {
            name: [point.accuracy for point in _train(then, folder / f"{name}-{seed}", **way, rate=rates[name],
                                                      seed=seed).curve]
            for name, way in ways.items()
        }  # fmt: skip
        goal = curves["scratch"][-1]
        reached = [next((n for n, a in enumerate(curves[way], 1) if a >= goal), EPOCHS) for way in ("tuned", "scratch")]
        found.append((float(reached[0]), float(reached[1]), curves["tuned"][-1], goal))
        print(f"{transfer.name}, {rows}, seed {seed}, rates {rates}: {found[-1]}", file=sys.stderr, flush=True)
    return found


def _best_rate(dataset: str, folder: Path, **way: Any) -> float:
    runs = {
        rate: _train(dataset, folder / f"rate-{rate}", **way, rate=rate, seed=RATE_SEED, evaluate_on="validation")
        for rate in RATES
    }
    return max(runs, key=lambda rate: (runs[rate].final_accuracy, -(runs[rate].final_loss or 0)))


def _train(
    dataset: str,
    folder: Path,
    *,
    epochs: int,
    rate: float,
    seed: int,
    weights: str | None = None,
    evaluate_on: str = "test",
    batch: int = BATCH,
) -> Any:
    from pipeline.config.model import ModelSettings
    from pipeline.config.training import TrainSettings
    from pipeline.distributed.worker import alone
    from pipeline.training import fit
    from pipeline.training.job import Job

    model = ModelSettings(network="resnet", depth=8, width=16, weights=weights)
    train = TrainSettings(
        seed=seed, epochs=epochs, batch_size=batch, lanes=8, learning_rate=rate, evaluate_on=evaluate_on,
        augment={"shift": 1},
    )  # fmt: skip
    return fit(alone("cpu"), Job(dataset, str(folder.absolute()), model, train))


def _write(classes: dict[str, Sequence[int]], folder: Path, rows: dict[str, int]) -> str:
    """A dataset of so many images of these classes, drawn once for all seeds; of digits there are 180 of each."""
    random = np.random.default_rng(0)
    pixels, labels = [], []
    for part, numbers in classes.items():
        of_part, known = _images(part)
        for number in numbers:
            chosen = random.permutation(np.flatnonzero(known == number))[: sum(rows.values())]
            pixels.append(of_part[chosen])
            labels.append(np.full(len(chosen), len(labels)))
    order = random.permutation(sum(map(len, labels)))
    all_pixels, all_labels = np.concatenate(pixels)[order], np.concatenate(labels)[order]
    splits, first = {}, 0
    for name, count in rows.items():
        splits[name] = (all_pixels[first : first + count], all_labels[first : first + count])
        first += count
    write_splits(str(folder), splits, classes=len(labels), row_group_rows=20)
    return str(folder.absolute())


@cache
def _images(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (rows, 1, 14, 14), and labels."""
    from PIL import Image

    pixels, labels = images(part)
    if pixels.shape[-1] == SIDE:
        return pixels, labels
    large = [np.asarray(Image.fromarray(one[0]).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for one in pixels]
    return np.stack(large)[:, None], labels
