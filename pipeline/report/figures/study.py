"""A comparison -> its figures, each drawn from a table of its own."""

from __future__ import annotations

from pipeline.report.comparison import Comparison
from pipeline.report.figures.bars import cost, steps_to_target
from pipeline.report.figures.confusion import confusion_matrices
from pipeline.report.figures.curves import learning_curves, training_loss
from pipeline.report.figures.gradients import gradient_norms
from pipeline.report.figures.rates import learning_rates
from pipeline.report.figures.sizes import batch_size, depth
from pipeline.report.figures.style import Drawing

_FIGURES = (
    learning_curves, training_loss, learning_rates, batch_size, depth, gradient_norms, steps_to_target, cost,
)  # fmt: skip


def figures_of(comparison: Comparison) -> list[Drawing]:
    """The figures that there is data for, in the order in which a page shows them."""
    drawings = [drawing for figure in _FIGURES if (drawing := figure(comparison)) is not None]
    return [*drawings, *confusion_matrices(comparison)]
