"""Axes of a search's scores: which end is good, how far down they go, and how numbers are written on them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.ticker import Formatter, MaxNLocator, PercentFormatter, ScalarFormatter

from pipeline.report.comparison import Objective
from pipeline.report.learned import goodness
from pipeline.report.score_text import ScoreText

# Shares of the distance from the best to the median score that an axis reaches below the best, and the least depth.
_DEPTH, _LEAST_DEPTH = 3.0, 0.02


class TrialScore(Protocol):
    """A score of a trial."""

    @property
    def trial(self) -> int:
        """Its number."""

    @property
    def score(self) -> float:
        """At an evaluation of it."""


class ScoreScale:
    """An axis of scores, on which the worst are drawn at its edge: trials that did not learn would press all others
    together.

    best, edge : the scores between which it goes
    """

    def __init__(self, metric: Objective, scores: Sequence[float]):
        self._metric, self._unit = metric, ScoreText(metric)
        # The goodness of a goodness is the score again.
        good = [goodness(score, metric) for score in scores]
        best, middle = max(good), statistics.median(good)
        self.best = goodness(best, metric)
        self.edge = goodness(max(min(good), best - max(_DEPTH * (best - middle), _LEAST_DEPTH)), metric)

    @property
    def name(self) -> str:
        """``balanced accuracy``"""
        return self._unit.name

    @property
    def format(self) -> Formatter:
        return PercentFormatter(1, decimals=None) if self._unit.is_share else ScalarFormatter(useOffset=False)

    def place(self, score: float) -> float:
        """Where a score is drawn."""
        return max(score, self.edge) if self._unit.is_share else min(score, self.edge)

    def better(self, score: float, other: float) -> float:
        """The better one of two."""
        return max(score, other, key=lambda each: goodness(each, self._metric))

    def share(self, score: float) -> float:
        """From 0 at the edge to 1 at the best."""
        return (self.place(score) - self.edge) / (self.best - self.edge or 1)

    def beyond(self, points: Iterable[TrialScore]) -> str:
        """What a caption says of the trials that are drawn at the edge."""
        count = len({point.trial for point in points if self.place(point.score) != point.score})
        where = ("lower", "below") if self._unit.is_share else ("upper", "above")
        return f" At the {where[0]} edge: {count} that lie {where[1]}." if count else ""

    def limit(self, axes: Axes) -> None:
        """Let an axis go from the edge to the best, the higher number above."""
        low, high = sorted([self.edge, self.best])
        margin = 0.06 * (high - low or 0.01)
        axes.set_ylim(low - margin, high + margin)
        axes.yaxis.set_major_formatter(self.format)
        axes.yaxis.set_major_locator(MaxNLocator(5))
