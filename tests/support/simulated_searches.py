"""Searches for a rate by candidates with a known truth: curves, noise between seeds, noise of images, and failures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.study.halving import Choice, Extend, Repeat, next_move
from pipeline.study.rung_scores import RungScore, rung_units, units_of
from pipeline.study.search import plan_rungs

# The natural logarithm of the factor between two rates of a grid, as of 0.02, 0.1, 0.5.
STEP = np.log(5)
# Accuracy that is lost for each nat of cross-entropy, about what small networks on small pictures show.
ACCURACY_PER_NAT = 0.3
EPOCHS, SEEDS = 20, 3


@dataclass(frozen=True)
class SimulatedCandidate:
    """A rate: what its trainings lose, and how far their seeds lie apart.

    lost : of accuracy against the best rate of the grid, in expectation over the seeds of whole trainings
    seed_deviation : of the mean cross-entropy of a whole training, in nats
    failing : share of its seeds at which it collapses
    """

    lost: float
    seed_deviation: float
    failing: float


class SimulatedSearch:
    """An arm's search of which everything is known.

    The loss of a rate is a parabola over its logarithm, whose place and curvature are drawn. Short trainings have
    their best rate elsewhere and cost more. A seed moves a candidate's cost, by more the higher the rate and the
    shorter the training, and it moves it alike at all rungs; every rung adds something of its own. Images have their
    own difficulty, which all share, suit some candidates better, and have noise of each training.

    Parameters
    ----------
    noise : how many times as far as otherwise the seeds lie apart
    """

    def __init__(self, random: np.random.Generator, *, count: int = 3, noise: float = 1.0):
        self.random = random
        self.images = int(random.choice([250, 500, 1000]))
        self.places = STEP * (np.arange(count) - (count - 1) / 2)
        self.best = random.uniform(self.places[0] - STEP / 2, self.places[-1] + STEP / 2)
        self.curvature = 10 ** random.uniform(-2.7, -1.7)
        self.shift = random.normal(0.1, 0.2)  # of the best rate's logarithm, with every halving of a training
        self.level = random.uniform(0.4, 1.6)
        deviation = noise * 10 ** random.uniform(-2.4, -1.4)
        risk = random.choice([0.0, 0.1]) * noise
        means = self._means(1.0)
        highest = self.places - self.places.mean()
        self.candidates = [
            SimulatedCandidate(
                ACCURACY_PER_NAT * (mean - means.min()),
                deviation * float(np.exp(0.3 * place)),
                min(0.5, risk) if place == highest.max() else 0.0,
            )
            for place, mean in zip(highest, means, strict=True)
        ]
        self.difficulty = random.gamma(1.0, 1.0, self.images)
        self.suits = random.normal(0, random.uniform(0.1, 0.4), (count, self.images))
        self.of_images = random.uniform(0.1, 0.4)
        self.effects: dict[tuple[int, int], tuple[float, bool]] = {}

    def _means(self, part: float) -> np.ndarray:
        """Mean cost in nats of each candidate after a whole schedule of this part of a training."""
        distance = self.places - self.best - self.shift * np.log2(part)
        return self.level * (1 + 0.3 * (part**-0.3 - 1)) + self.curvature / ACCURACY_PER_NAT * distance**2

    def score(self, candidate: int, seed: int, part: float) -> RungScore:
        """What a candidate shows with a seed, the first is 0, after this part of a training."""
        about = self.candidates[candidate]
        key = candidate, seed
        if key not in self.effects:
            self.effects[key] = self.random.standard_normal(), self.random.random() < about.failing
        effect, fails = self.effects[key]
        if fails:
            return RungScore(np.full(self.images, 2.3) + self.difficulty, learned=False)
        own = 0.8 * effect + 0.6 * self.random.standard_normal()
        mean = self._means(part)[candidate] + about.seed_deviation * part**-0.25 * own
        noise = self.random.normal(0, self.of_images, self.images)
        return RungScore(mean * self.difficulty + self.suits[candidate] + noise, learned=True)

    def lost(self, candidate: int) -> float:
        """Accuracy that a choice loses against the best of the grid, in expectation over seeds, failures included."""
        worth = [-each.lost - 0.3 * each.failing for each in self.candidates]
        return max(worth) - worth[candidate]


@dataclass(frozen=True)
class Outcome:
    """What a search chose, and what it trained as a share of the trainings that are compared.

    lost : accuracy against the best of the grid
    """

    lost: float
    cost: float
    choice: Choice


def run_simulated(search: SimulatedSearch, *, search_seeds: int) -> Outcome:
    """Run the search's own moves; with a single seed they are those that it made before it had repeats."""
    count = len(search.candidates)
    plan = plan_rungs(
        share=0.5, epochs=EPOCHS, seeds=SEEDS, epoch_steps=[100] * count, extends=True, search_seeds=search_seeds
    )
    scores: list[list[list[RungScore]]] = [[[]] for _ in range(count)]
    while True:
        first, repeats = [of_seeds[0] for of_seeds in scores], [of_seeds[1:] for of_seeds in scores]
        move = next_move(first, list(search.places), plan.budget, repeats=repeats)
        if isinstance(move, Choice):
            break
        assert not isinstance(move, Extend)
        seed = move.seed if isinstance(move, Repeat) else 0
        for candidate in move.candidates:
            while len(scores[candidate]) <= seed:
                scores[candidate].append([])
            of_seed = scores[candidate][seed]
            part = float(plan.first_epochs) * rung_units(len(of_seed)) / EPOCHS
            of_seed.append(search.score(candidate, seed, part))
    units = sum(units_of(len(of_seed)) for of_seeds in scores for of_seed in of_seeds)
    assert units <= plan.budget.units
    cost = units * float(plan.first_epochs) / (EPOCHS * SEEDS)
    return Outcome(search.lost(move.candidate), cost, move)
