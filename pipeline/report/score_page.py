"""What `score` found -> one self-contained HTML page and a picture: counts, drift of inputs and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from pipeline.data.profile import Profile
from pipeline.report.drift import LARGE, MEDIUM_SHIFT, SLIGHT, SMALL_SHIFT, ChannelDrift, Drift, DriftFigure
from pipeline.report.figures.style import COLORS, WIDTH, Drawing
from pipeline.report.page import environment_of

_COLUMNS = ("of", "bin", "reference", "scored")
# Classes of which a figure names each.
_MOST_NAMES = 40
_CAPTIONS = {
    "brightness": "Images by the mean of their pixel values, 0 to 255.",
    "contrast": "Images by the standard deviation of their pixel values.",
    "predicted classes": "Images by the class of the largest probability.",
    "confidence": "Images by the largest probability.",
}


def page_of(name: str, result: dict[str, Any], drift: Drift | None, profile: Profile | None) -> str:
    """The page, as HTML.

    Parameters
    ----------
    name : of the study
    result : what ``score.json`` holds
    drift, profile : what was compared, and of what; None where nothing was
    """
    return (
        environment_of()
        .get_template("score.html.j2")
        .render(
            name=name,
            result=result,
            verdict=verdict(drift),
            drift=drift,
            profile=profile,
            slight=SLIGHT,
            large=LARGE,
            small_shift=SMALL_SHIFT,
            medium_shift=MEDIUM_SHIFT,
            drawings=[drawing_of(figure) for figure in drift.figures] if drift else [],
        )
    )


def verdict(drift: Drift | None) -> list[str]:
    """What has moved, in sentences, the furthest first."""
    if drift is None:
        return ["Nothing was compared with the training."]
    moved = sorted((each for each in drift.figures if each.state != "as before"), key=lambda each: -each.psi)
    channels = [each for each in drift.channels if each.state != "as before"]
    if not moved and not channels:
        return ["Inputs and predictions are as they were: nothing moved by more than chance."]
    sentences = [
        f"{each.name.capitalize()}: {each.state} from the {each.reference} split (index {each.psi:.3f}, by chance up "
        f"to {each.psi_by_chance:.3f})."
        for each in moved
    ]
    return [*sentences, *(_of_channel(each, drift.figures[0].reference) for each in channels)]


def _of_channel(channel: ChannelDrift, reference: str) -> str:
    by = "it had no deviation there" if channel.shift is None else f"by {channel.shift:+.2f} deviations"
    return (
        f"Pixels of channel {channel.channel}: {channel.state} from the {reference} split, from a mean of "
        f"{channel.reference_mean:.3f} to {channel.mean:.3f} ({by}, by chance up to {channel.shift_by_chance:.2f})."
    )


def picture_of(drift: Drift) -> bytes:
    """All figures as one PNG."""
    rows = [row for figure in drift.figures for row in _rows(figure)]
    size = (1.5 * WIDTH, sum(_height(figure) for figure in drift.figures[1:3]))

    def paint(page: Figure) -> None:
        for axes, figure in zip(page.subplots(2, 2).flat, drift.figures, strict=True):
            _paint(axes, figure)
            axes.set_title(f"{figure.name}: {figure.state} ({figure.psi:.3f})", loc="left")

    return Drawing("drift", "Drift", "", _COLUMNS, rows, size, paint).png()


def drawing_of(figure: DriftFigure) -> Drawing:
    """One figure of the page: shares of images in each bin, in the reference and here."""
    title = f"{figure.name.capitalize()}: {figure.state}"
    caption = (
        f"{_CAPTIONS[figure.name]} {figure.images:,} scored, against {figure.reference_images:,} of the "
        f"{figure.reference} split; population stability index {figure.psi:.4f}, by chance up to "
        f"{figure.psi_by_chance:.4f}; Jensen-Shannon distance {figure.js_distance:.3f}."
    )
    name = figure.name.replace(" ", "-")
    size = (WIDTH, _height(figure))
    return Drawing(name, title, caption, _COLUMNS, _rows(figure), size, lambda page: _paint(page.subplots(), figure))


def _rows(figure: DriftFigure) -> Sequence[tuple[Any, ...]]:
    return [(figure.name, *row) for row in zip(figure.bins, figure.reference_shares, figure.shares, strict=True)]


def _height(figure: DriftFigure) -> float:
    return max(2.6, 0.24 * min(len(figure.bins), _MOST_NAMES) + 0.9)


def _paint(axes: Any, figure: DriftFigure) -> None:
    """Two bars for each bin; of many classes those whose shares differ most."""
    places = range(len(figure.bins))
    if len(figure.bins) > _MOST_NAMES:
        by_difference = sorted(places, key=lambda at: -abs(figure.shares[at] - figure.reference_shares[at]))
        places = sorted(by_difference[:_MOST_NAMES])  # type: ignore[assignment]
    rows = range(len(places))
    bars = ((figure.reference_shares, COLORS[6], -0.2, figure.reference), (figure.shares, COLORS[1], 0.2, "scored"))
    for shares, color, shift, label in bars:
        widths = [100 * shares[at] for at in places]
        axes.barh([row + shift for row in rows], widths, height=0.38, color=color, label=label)
    axes.set_yticks(list(rows), [figure.bins[at] for at in places], fontsize=8)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_xlabel("share of the images, %")
    axes.legend(fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
