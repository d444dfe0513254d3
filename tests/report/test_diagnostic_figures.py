import pytest

from pipeline.report.figures.diagnostics import draw

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("layers", [2, 30])
def test_plots(layers):
    values = {f"{kind}/1.{n}": 0.1 * n for n in range(layers) for kind in ("gradient_norm", "dead_units")}
    values |= {"smoothness/loss": 1.0, "smoothness/loss_at_1": 2.0, "smoothness/beta": None}
    events = [
        {"kind": "diagnostics", "step": 1, "values": values},
        {"kind": "step", "step": 1, "loss": 1.0},
        {"kind": "diagnostics", "step": 5, "values": values | {"activation_drift/1.0": 0.2}},
        {"kind": "diagnostics", "step": 4, "values": {"statistics_gap_mean/1.1": 0.2, "gradient_norm/1.0": None}},
        {"kind": "diagnostics", "step": 5, "values": values},
    ]
    drawn = draw(events)
    assert sorted(drawn) == [
        "activation_drift.png", "dead_units.png", "gradient_norms.png", "smoothness.png", "statistics_gap.png",
    ]  # fmt: skip
    assert all(picture.startswith(PNG) for picture in drawn.values())


def test_there_is_nothing_to_draw_where_nobody_looked():
    assert draw([{"kind": "step", "step": 1, "loss": 1.0}]) == {}
