"""Numbers as text, for tables and sentences."""

from __future__ import annotations

UNKNOWN = "–"


def plain(value: object) -> str:
    """A value as a person would write it: 0.1, batch; a dash for None."""
    return UNKNOWN if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def signed(points: float) -> str:
    """Percentage points with their sign: +0.25, −1.50."""
    return f"{points:+.2f}".replace("-", "−")


def signed_percent(share: float) -> str:
    """A share with its sign, in whole percent: 0.1 is +10%."""
    return f"{round(100 * share):+d}%".replace("-", "−")
