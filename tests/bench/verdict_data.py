"""The small real studies of `verdicts`: which there are, and their datasets.

The pictures are those of Fashion-MNIST at half their size and scikit-learn's digits. ``BENCH_IMAGES`` names a file that
has them both, for a machine without either: ``python tests/bench/verdict_data.py FILE.npz`` makes it.
"""

from __future__ import annotations

import gzip
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "support"))


SEEN, HELD_OUT, FRESH = "seen", "held out", "fresh"
# What a file of images has: arrays of these names, pixels uint8 (rows, 1, H, W) and labels int64.
PARTS = ("train", "t10k", "digits")


@dataclass(frozen=True)
class Data:
    """What a study is of.

    rows : training images
    tail : the largest class has this many times the images of the smallest
    major : share of one class; 0: none stands out
    noise : share of training and validation labels that are drawn at random
    largest : the class that is the largest one, of a tail or of ``major``
    nuisance : what is done to all its images, those of the truth too (see `spoil`)
    group : ``held out`` are those that were looked at only when everything was decided; ``fresh`` those that were
        defined when searches got further seeds
    """

    name: str
    rows: int = 2000
    tail: float = 1.0
    major: float = 0.0
    noise: float = 0.0
    digits: bool = False
    seed: int = 0
    group: str = SEEN
    largest: int = 0
    nuisance: Literal["none", "blur", "patch", "speckle", "dim"] = "none"

    @property
    def file(self) -> str:
        """Its name as one of a file."""
        return self.name.replace(" ", "-").replace(",", "").replace("%", "")


STUDIES = [
    Data("even"),
    Data("even, held out", rows=3000, seed=10, group=HELD_OUT),
    Data("tail of 10", tail=10),
    Data("tail of 20, held out", tail=20, seed=11, group=HELD_OUT),
    Data("one class of 60%", major=0.6),
    Data("one class of 60%, held out", major=0.6, rows=1500, seed=12, group=HELD_OUT),
    Data("digits", digits=True),
    Data("digits, held out", digits=True, seed=13, group=HELD_OUT),
    Data("wrong labels, 20%", noise=0.2),
    Data("wrong labels, 30%, held out", noise=0.3, seed=14, group=HELD_OUT),
    Data("tail of 50", tail=50),
    Data("tail of 100, held out", tail=100, rows=3000, seed=15, group=HELD_OUT),
    Data("tail of 10, small", tail=10, rows=1000),
    Data("even, small, held out", rows=1000, seed=16, group=HELD_OUT),
    Data("wrong labels, 40%", noise=0.4),
    Data("tail of 10, larger, held out", tail=10, rows=4000, seed=17, group=HELD_OUT),
]

# Defined when a search had got its further seeds, with kinds of trouble that no study before had: other shares of wrong
# labels, other tails, classes that are hard as the largest one, and images that are spoiled.
STUDIES += [
    Data("wrong labels, 25%, fresh", noise=0.25, seed=30, group=FRESH),
    Data("wrong labels, 35%, fresh", noise=0.35, rows=2500, seed=31, group=FRESH),
    Data("wrong labels, 40%, fresh", noise=0.4, rows=3000, seed=32, group=FRESH),
    Data("wrong labels, 25%, small, fresh", noise=0.25, rows=1000, seed=33, group=FRESH),
    Data("wrong labels, 15%, tail of 5, fresh", noise=0.15, tail=5, seed=34, group=FRESH),
    Data("tail of 15 of shirts, fresh", tail=15, largest=6, seed=35, group=FRESH),
    Data("tail of 30 of sneakers, fresh", tail=30, largest=7, rows=3000, seed=36, group=FRESH),
    Data("tail of 70 of coats, fresh", tail=70, largest=4, rows=4000, seed=37, group=FRESH),
    Data("45% of shirts, fresh", major=0.45, largest=6, seed=38, group=FRESH),
    Data("75% of bags, fresh", major=0.75, largest=8, rows=3000, seed=39, group=FRESH),
    Data("blur, fresh", nuisance="blur", seed=40, group=FRESH),
    Data("blur, tail of 10 of dresses, fresh", nuisance="blur", tail=10, largest=3, seed=41, group=FRESH),
    Data("patches, fresh", nuisance="patch", rows=2500, seed=42, group=FRESH),
    Data("speckle, wrong labels, 10%, fresh", nuisance="speckle", noise=0.1, seed=43, group=FRESH),
    Data("dim, 50% of trousers, fresh", nuisance="dim", major=0.5, largest=1, rows=1500, seed=44, group=FRESH),
    Data("digits, wrong labels, 20%, fresh", digits=True, noise=0.2, seed=45, group=FRESH),
]


def write(data: Data, path: str) -> None:
    """The dataset of a study: training images, a quarter as many to choose by, and half as many to judge by."""
    from small_splits import write_splits

    random = np.random.default_rng(data.seed)
    pixels, labels = images("digits" if data.digits else "train")
    order = random.permutation(len(labels))
    pixels, labels = pixels[order], labels[order]
    sizes = {"train": data.rows, "validation": data.rows // 4, "test": data.rows // 2}
    if data.digits:
        sizes = {"train": 1000, "validation": 297, "test": 500}
    classes, taken, splits = int(labels.max()) + 1, np.zeros(len(labels), bool), {}
    for name, rows in sizes.items():
        chosen = _choose(labels, taken, counts_of(data, rows, classes))
        taken[chosen] = True
        known = labels[chosen].copy()
        if data.noise and name != "test":
            wrong = random.random(len(known)) < data.noise
            known[wrong] = random.integers(0, classes, wrong.sum())
        splits[name] = (spoil(pixels[chosen], data.nuisance, random), known)
    write_splits(path, splits, classes=classes, row_group_rows=max(8, data.rows // 40))


def unseen(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Images that no study has, of which every class has a thousand, spoiled as those of the study; and labels."""
    pixels, labels = images("t10k")
    return spoil(pixels, data.nuisance, np.random.default_rng(data.seed + 1_000)), labels


def spoil(pixels: np.ndarray, nuisance: str, random: np.random.Generator) -> np.ndarray:
    """Images with their trouble.

    ``blur``: each pixel is the mean of three by three; ``patch``: five by five pixels somewhere are black; ``speckle``:
    normal noise of 40 of 255; ``dim``: each image has 20 to 100% of its brightness.

    Parameters
    ----------
    pixels : uint8 (rows, 1, H, W)
    """
    rows, _, height, width = pixels.shape
    if nuisance == "blur":
        padded = np.pad(pixels.astype(np.float32), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
        parts = [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
        return np.mean(parts, axis=0).astype(np.uint8)
    if nuisance == "patch":
        y, x = np.mgrid[:height, :width]
        top = random.integers(0, (height - 4, width - 4), (rows, 2))[:, :, None, None]
        covered = (y >= top[:, 0]) & (y < top[:, 0] + 5) & (x >= top[:, 1]) & (x < top[:, 1] + 5)
        return np.where(covered[:, None], 0, pixels).astype(np.uint8)
    if nuisance == "speckle":
        return np.clip(pixels + random.normal(0, 40, pixels.shape), 0, 255).astype(np.uint8)
    if nuisance == "dim":
        return (pixels * random.uniform(0.2, 1.0, (rows, 1, 1, 1))).astype(np.uint8)
    return pixels


def counts_of(data: Data, rows: int, classes: int) -> np.ndarray:
    """Images of each class, at least three."""
    place = (np.arange(classes) - data.largest) % classes  # the largest class has place 0
    shares = data.tail ** (-place / (classes - 1))
    if data.major:
        shares = np.where(place == 0, data.major, (1 - data.major) / (classes - 1))
    return np.maximum(3, np.round(rows * shares / shares.sum())).astype(int)


def _choose(labels: np.ndarray, taken: np.ndarray, counts: np.ndarray) -> np.ndarray:
    free = [np.flatnonzero((labels == label) & ~taken)[:count] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(free))


@cache
def images(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of Fashion-MNIST's training or test images (``t10k``) at half their size, or of the digits."""
    if file := os.environ.get("BENCH_IMAGES"):
        with np.load(file) as arrays:
            return arrays[f"{part}_pixels"], arrays[f"{part}_labels"]
    if part == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        return (found.images * 15.9).astype(np.uint8)[:, None], found.target.astype(np.int64)
    from pipeline.ingest.sources import fashion_mnist

    folder = Path(fashion_mnist.locate(None, "runs/cache"))
    pictures, labels = (next(folder.glob(f"{part}-{kind}*")) for kind in ("images", "labels"))
    pixels = np.frombuffer(_bytes(pictures), np.uint8, offset=16).reshape(-1, 14, 2, 14, 2).mean((2, 4))
    return pixels.astype(np.uint8)[:, None], np.frombuffer(_bytes(labels), np.uint8, offset=8).astype(np.int64)


def _bytes(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def pack(file: str) -> None:
    """Write all images into one file, for ``BENCH_IMAGES``."""
    arrays = {}
    for part in PARTS:
        arrays[f"{part}_pixels"], arrays[f"{part}_labels"] = images(part)
    np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    pack(sys.argv[1])
