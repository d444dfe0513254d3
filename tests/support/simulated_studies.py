"""Comparisons drawn from a model with a known truth: every image's correctness, without a training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from pipeline.report.comparison import ComparedRun
from pipeline.report.differences import PredictionsOf
from pipeline.report.intervals import Spread, image_covariance, mean_score, spread_of
from pipeline.training.predictions import Predictions

# Images of each class of a test split with one large class, and what a class adds to how easy its images are.
LONG_TAIL = np.array([560, 180, 100, 70, 50, 40])
CLASS_EASE = np.array([0.6, 0.3, 0.0, -0.2, -0.4, -0.6])
DIFFICULTY = 1.5


@dataclass(frozen=True)
class SimulatedStudy:
    """Two arms, several seeds, the same images.

    differences : (seeds, images) int8, arm's correctness minus the baseline's
    labels : (images,) of the classes where the metric is balanced accuracy, else None
    truth : difference of the metric in expectation over seeds and images
    """

    differences: np.ndarray
    labels: np.ndarray | None
    truth: float

    @property
    def by_seed(self) -> np.ndarray:
        return mean_score(self.differences, self.labels)

    def spread(self) -> Spread:
        return spread_of(self.by_seed, image_covariance(self.differences, self.labels))

    def spreads(self, first: int) -> Iterator[Spread]:
        """Of the first seeds: ``first`` of them, one more, ... all."""
        by_seed, covariance = self.by_seed, image_covariance(self.differences, self.labels)
        for n in range(first, len(by_seed) + 1):
            yield spread_of(by_seed[:n], covariance[:n, :n])


def simulated_study(
    rng: np.random.Generator, *, seeds: int, images: int = 1000, balanced: bool = False, gap: float | None = None,
    seed_deviation: float | None = None,
) -> SimulatedStudy:  # fmt: skip
    """A study of which a probit model says the probability that an image is right.

    The latent value of an image is how good the arm is, plus how easy the image is for all networks, plus how well it
    suits the arm, plus what the seed does to the arm, plus noise of its own for every training.

    Parameters
    ----------
    gap : of the arms' latent means; None: a random one, from nothing to several points either way
    seed_deviation : standard deviation of what a seed does; None: a random one, from hardly any to much more than what
        images do
    """
    interaction, seed_sd = rng.uniform(0.1, 0.7), 10 ** rng.uniform(-2.3, -0.9)
    seed_sd = seed_sd if seed_deviation is None else seed_deviation
    gap = rng.normal(0, 0.25) if gap is None else gap
    counts = LONG_TAIL * images // LONG_TAIL.sum() if balanced else np.array([images])
    labels = np.repeat(np.arange(len(counts)), counts)
    ease = CLASS_EASE[: len(counts)] if balanced else np.zeros(1)
    levels = np.array([rng.uniform(0.8, 3.0)])
    levels = np.array([levels[0], levels[0] + gap])
    common = DIFFICULTY * rng.standard_normal(len(labels)) + ease[labels]
    suits = interaction * rng.standard_normal((2, 1, len(labels)))
    of_seeds = seed_sd * rng.standard_normal((2, seeds, 1))
    right = rng.random((2, seeds, len(labels)), np.float32) < ndtr(
        (levels[:, None, None] + common + suits + of_seeds).astype(np.float32)
    )
    scale = np.sqrt(1 + DIFFICULTY**2 + interaction**2 + seed_sd**2)
    expected = ndtr((levels[:, None] + ease) / scale).mean(axis=1)
    return SimulatedStudy(
        right[1].astype(np.int8) - right[0], labels if balanced else None, float(expected[1] - expected[0])
    )


@dataclass(frozen=True)
class SimulatedArms:
    """Several arms, the first of them the baseline, as a study of accuracies has them.

    runs : of every arm and seed
    truths : of each arm's difference from the baseline in expectation over seeds and images, by its name
    """

    runs: list[ComparedRun]
    predictions: PredictionsOf
    truths: dict[str, float]


def simulated_arms(
    rng: np.random.Generator, *, gaps: tuple[float, ...] | None, others: int = 3, seeds: int, images: int = 400
) -> SimulatedArms:
    """Arms of which the same model says the probability that an image is right; see `simulated_study`.

    Parameters
    ----------
    gaps : of the latent means of the arms to that of the baseline; None: random ones for ``others`` arms
    """
    gaps = tuple(rng.normal(0, 0.25, others)) if gaps is None else gaps
    interaction, seed_sd = rng.uniform(0.1, 0.7), 10 ** rng.uniform(-2.3, -0.9)
    levels = rng.uniform(0.8, 3.0) + np.array([0.0, *gaps])
    suits = interaction * rng.standard_normal((len(levels), 1, images))
    of_seeds = seed_sd * rng.standard_normal((len(levels), seeds, 1))
    latent = levels[:, None, None] + DIFFICULTY * rng.standard_normal(images) + suits + of_seeds
    right = rng.random(latent.shape) < ndtr(latent)
    expected = ndtr(levels / np.sqrt(1 + DIFFICULTY**2 + interaction**2 + seed_sd**2))
    names = ["baseline", *(f"arm {number}" for number in range(1, len(levels)))]
    nothing = np.zeros(images, np.float32)
    zeros, ids = np.zeros(images, np.int32), np.arange(images)
    runs, predictions = [], {}
    for arm, of_arm in zip(names, right, strict=True):
        for seed, correct in enumerate(of_arm):
            run = {"arm": arm, "seed": seed, "score": float(correct.mean()), "learned": True, "diverged": False}
            runs.append(ComparedRun.model_construct(**run))
            predictions[arm, seed] = Predictions(ids, zeros, (~correct).astype(np.int32), nothing, nothing)
    return SimulatedArms(runs, predictions, dict(zip(names, (expected - expected[0]).tolist(), strict=True)))
