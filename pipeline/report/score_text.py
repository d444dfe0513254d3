"""Scores of a search as text: shares in percent, differences of them in points, cross-entropies in nats."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.report.comparison import Objective
from pipeline.report.formats import signed


@dataclass(frozen=True)
class ScoreText:
    """How scores of a metric are written."""

    metric: Objective

    @property
    def is_share(self) -> bool:
        """Whether it goes from 0 to 1, and more is better; else less is."""
        return self.metric != "cross_entropy"

    @property
    def name(self) -> str:
        """``balanced accuracy``"""
        return self.metric.replace("_", " ") if self.is_share else "cross-entropy"

    @property
    def points(self) -> str:
        """The unit of differences."""
        return "points" if self.is_share else "nats"

    def text(self, score: float | None) -> str:
        """``91.20%`` or ``0.2345``."""
        return "unknown" if score is None else f"{score:.2%}" if self.is_share else f"{score:.4f}"

    def with_std(self, mean: float | None, std: float | None) -> str:
        """``91.20% ± 0.31``"""
        spread = "" if std is None else f" ± {100 * std:.2f}" if self.is_share else f" ± {std:.4f}"
        return self.text(mean) + spread

    def difference(self, value: float) -> str:
        """``−0.25`` in points or ``+0.0120`` in nats, without the unit."""
        return signed(100 * value) if self.is_share else f"{value:+.4f}".replace("-", "−")
