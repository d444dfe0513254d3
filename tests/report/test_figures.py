import csv
import io
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.figure import Figure
from PIL import Image
from small_comparisons import CLASSES, comparison_of, many_arms, with_arms, with_runs

from pipeline.report.figures.confusion import confusion_matrices
from pipeline.report.figures.rates import _cells_of_search, _heat
from pipeline.report.figures.study import figures_of
from pipeline.report.figures.style import COLORS, DASHES, MARKERS, Drawing, line_styles
from pipeline.report.names import LEARNING_RATE

COMMON = ["learning_curves", "training_loss"]
ENDS = ["steps_to_target", "cost"]
STUDIES = {
    "norms": (
        comparison_of(confusion=True),
        [*COMMON, "learning_rates", "gradient_norms", *ENDS, "confusion_1_none", "confusion_2_batch"],
    ),
    "one arm, one seed, no search": (
        comparison_of({}, seeds=1, rates=(0.1,), gradient_norms=False),
        [*COMMON, *ENDS],
    ),
    "all diverged": (comparison_of(diverged={"none": 2, "batch": 2}), None),
    "never reached": (
        comparison_of(target_accuracy=0.99, gradient_norms=False, speed=False),
        [*COMMON, "learning_rates"],
    ),
    "many": (many_arms(diverged={"none, rank_batch_size 2": 1}), None),
    "batch size": (
        comparison_of({"train.rank_batch_size": [8, 64, 128]}, rates=(0.1,)),
        [*COMMON, "batch_size", "gradient_norms", *ENDS],
    ),
    "depth": (
        comparison_of({"model.norm": ["none", "batch"], "model.depth": [8, 20]}, gradient_norms=False),
        [*COMMON, "learning_rates", "depth", *ENDS],
    ),
    "rates": (
        comparison_of({"model.norm": ["none", "batch"], LEARNING_RATE: [0.01, 0.1, 1.0]}, rates=(0.1,)),
        [*COMMON, "learning_rates", "gradient_norms", *ENDS],
    ),
}


@pytest.fixture(scope="module", params=STUDIES, ids=str)
def study(request):
    comparison, names = STUDIES[request.param]
    return comparison, names, figures_of(comparison)


def test_each_figure_is_there_where_there_is_data_for_it(study):
    _, names, drawings = study
    found = [drawing.name for drawing in drawings]
    assert found == names if names else len(found) >= 5
    assert all(len(row) == len(drawing.columns) for drawing in drawings for row in drawing.rows)


def test_csv_is_what_is_drawn(study):
    for drawing in study[2]:
        header, *rows = csv.reader(io.StringIO(drawing.csv()))
        assert tuple(header) == drawing.columns
        assert rows == [["" if value is None else str(value) for value in row] for row in drawing.rows]


@pytest.mark.parametrize("name", ["norms", "all diverged", "many"])
def test_pictures_open_and_are_large_enough_to_read(name):
    for drawing in figures_of(STUDIES[name][0]):
        picture = Image.open(io.BytesIO(drawing.png()))
        picture.load()
        assert picture.format == "PNG"
        assert picture.width == 1050  # 7 inches
        assert 150 < picture.height < 2500
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_figures_on_one_page_share_no_identifier(study):
    seen = set()
    for drawing in study[2]:
        svg = drawing.svg()
        root = ElementTree.fromstring(svg)
        own = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(own) == len(set(own)) > 0
        assert not seen & set(own)
        seen |= set(own)
        assert {*re.findall(r'(?:href="|url\()#([^")]+)', svg)} <= set(own)
        assert root.get("aria-label") == drawing.title == root[0].text
        assert "<style" not in svg
        assert "#123456" not in svg
        assert "currentColor" in svg


def test_the_same_comparison_gives_the_same_bytes():
    first, second = figures_of(comparison_of())[0], figures_of(comparison_of())[0]
    assert (first.svg(), first.png()) == (second.svg(), second.png())


def drawing_of(comparison, name):
    return next(drawing for drawing in figures_of(comparison) if drawing.name == name)


def records(comparison, name):
    drawing = drawing_of(comparison, name)
    return [dict(zip(drawing.columns, row, strict=True)) for row in drawing.rows]


def test_curves_are_means_over_seeds_between_the_worst_and_the_best():
    comparison = comparison_of(seeds=3)
    found = [record for record in records(comparison, "learning_curves") if record["arm"] == "batch"]
    runs = [run for run in comparison.runs if run.arm == "batch"]
    for number, record in enumerate(found):
        accuracies = [run.curve[number].accuracy for run in runs]
        assert record["steps"] == runs[0].curve[number].step
        assert math.isclose(record["accuracy_mean"], sum(accuracies) / 3)
        assert (record["accuracy_min"], record["accuracy_max"]) == (min(accuracies), max(accuracies))
    base = [run.final_accuracy for run in comparison.runs if run.arm == "none"]
    assert math.isclose(found[0]["target_mean"], sum(base) / 3)


def test_evaluations_below_the_axis_of_accuracies_are_triangles_at_its_edge():
    def from_first(accuracy):
        def curve(run):
            return tuple(
                point.model_copy(update={"step": step, "accuracy": accuracy if step == 1 else 0.8})
                for step, point in enumerate(run.curve * 3, start=1)
            )

        return with_runs(comparison_of(), curve=curve, train_loss=lambda run: run.train_loss * 3)

    comparison = from_first(0.1)
    drawing, figure = drawing_of(comparison, "learning_curves"), Figure()
    drawing.paint(figure)
    (axes,) = figure.axes
    triangles = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "v"]
    low = axes.get_ylim()[0]
    assert low > 0.1
    assert [[[1, low]]] * 2 == [points for points in triangles if points]
    assert "Triangles at the lower edge" in drawing.caption
    assert "Triangles" not in drawing_of(from_first(0.8), "learning_curves").caption


def test_curves_fill_their_figure():
    """An empty line that is not clipped made the layout keep room for the figure's corner."""
    drawing = drawing_of(comparison_of(), "training_loss")  # none of its points is below the axis
    figure = Figure(figsize=drawing.size, layout="constrained")
    drawing.paint(figure)
    figure.draw_without_rendering()
    place = figure.axes[0].get_position()
    assert (place.width > 0.8, place.height > 0.6) == (True, True), place


def test_curves_of_steps_of_different_size_are_over_images():
    comparison = comparison_of({"train.rank_batch_size": [8, 64]})
    found = records(comparison, "learning_curves")
    ends = {run.arm: run.curve[-1].step * run.global_batch for run in comparison.runs}
    assert {record["arm"]: record["images"] for record in found} == ends
    assert "the axis counts images" in drawing_of(comparison, "learning_curves").caption
    assert "images_mean" in drawing_of(comparison, "steps_to_target").columns


def test_runs_of_one_evaluation_have_no_curves():
    comparison = with_runs(
        comparison_of(), curve=lambda run: run.curve[-1:], train_loss=lambda run: run.train_loss[-1:]
    )
    names = {drawing.name for drawing in figures_of(comparison)}
    assert not names & set(COMMON)
    assert "learning_rates" in names


def test_a_run_that_diverged_is_left_out_of_the_mean_unless_all_of_its_arm_did():
    found = records(comparison_of(diverged={"none": 1, "batch": 2}), "learning_curves")
    none, batch = ([record for record in found if record["arm"] == arm] for arm in ("none", "batch"))
    assert ({record["n"] for record in none}, none[-1]["diverged"]) == ({1}, False)
    assert batch[-1]["diverged"] is True
    assert batch[-1]["accuracy_mean"] == 0.1
    assert batch[-1]["steps"] < none[-1]["steps"]


def test_the_search_shows_what_was_tried_chosen_and_diverged():
    comparison = comparison_of()
    found = {(record["arm"], record["learning_rate"]): record for record in records(comparison, "learning_rates")}
    assert len(found) == 6
    for trial in comparison.search:
        record = found[trial.arm, trial.learning_rate]
        assert record["accuracy"] == trial.best_accuracy
        assert record["diverged"] == trial.diverged
    chosen = {arm: rate for (arm, rate), record in found.items() if record["chosen"]}
    assert chosen == {arm.arm: arm.tuned[LEARNING_RATE] for arm in comparison.arms}
    svg = drawing_of(comparison, "learning_rates").svg()
    assert "diverged" in svg
    assert "87.0" in svg


def test_learning_rates_that_make_arms_are_shown_from_the_runs():
    comparison = STUDIES["rates"][0]
    found = records(comparison, "learning_rates")
    assert [(record["arm"], record["learning_rate"]) for record in found] == [
        (norm, rate) for norm in ("no normalization", "batch norm") for rate in (0.01, 0.1, 1.0)
    ]
    assert [record["accuracy"] for record in found] == [arm.score_mean for arm in comparison.arms]
    assert [record["chosen"] for record in found] == [True, False, False] * 2


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 0.5, 0.7, 0.85, 0.9, 1.0])
def test_the_text_of_a_cell_can_be_told_from_it(accuracy):
    def light(color):
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(light(color) for color in _heat(accuracy, best=1.0, worst=0.0))
    assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG AA


def test_error_is_drawn_against_batch_size_for_each_norm():
    comparison = STUDIES["many"][0]
    found = records(comparison, "batch_size")
    assert len(found) == 28
    assert list(dict.fromkeys(record["line"] for record in found)) == [
        "no normalization", "batch norm", "group norm", "layer norm",
    ]  # fmt: skip
    for record, arm in zip(found, comparison.arms, strict=True):
        assert record["batch_size"] == arm.values["train.rank_batch_size"]
        assert record["error_mean"] == 1 - arm.score_mean
        assert record["error_std"] == arm.score_std
    assert found[0]["diverged"] == 1


def test_gradient_norms_are_geometric_means_and_zero_stays_zero():
    medians = {0: (0.5, 0.0, None), 1: (0.02, 1.0, None)}  # of the first three layers, by seed

    def changed(run):
        first = zip(run.gradient_norms, medians[run.seed] if run.arm == "batch" else (), strict=False)
        layers = [layer.model_copy(update={"median": median}) for layer, median in first]
        return (*layers, *run.gradient_norms[len(layers) :])

    comparison = with_runs(comparison_of(), gradient_norms=changed)
    found = records(comparison, "gradient_norms")
    batch = {record["layer"]: record for record in found if record["arm"] == "batch"}
    assert math.isclose(batch["0"]["gradient_norm"], 0.1)
    assert batch["1.stem.0"]["gradient_norm"] == 0.0
    assert "1.stem.1" not in batch
    # Without norm layers a network has fewer layers; those of the same name are drawn one above the other.
    none = {record["layer"]: record["layer_number"] for record in found if record["arm"] == "none"}
    assert none["1.stages.0.0"] == batch["1.stages.0.0"]["layer_number"] == 4
    drawing_of(comparison, "gradient_norms").png()


def test_gradient_norms_that_are_all_zero_can_be_drawn():
    comparison = with_runs(
        comparison_of(),
        gradient_norms=lambda run: tuple(layer.model_copy(update={"median": 0.0}) for layer in run.gradient_norms),
    )
    assert drawing_of(comparison, "gradient_norms").png()


def test_an_arm_that_never_arrived_is_named_so():
    comparison = comparison_of(level={"batch": 0.7})
    assert [record["reached"] for record in records(comparison, "steps_to_target")] == [2, 0]
    assert ">never<" in drawing_of(comparison, "steps_to_target").svg()


def test_confusion_matrices_show_every_class_with_its_recall():
    comparison = comparison_of(confusion=True, level={"batch": 0.8})
    assert drawing_of(comparison, "confusion_2_batch").title == "Confusion: batch norm"
    found = {(record["label"], record["prediction"]): record for record in records(comparison, "confusion_2_batch")}
    matrix = comparison.arm("batch").confusion
    assert len(found) == 20  # ten pairs of classes that are mistaken, and each class itself
    for label, row in zip(CLASSES, matrix, strict=True):
        for guess, images in zip(CLASSES, row, strict=True):
            record = found.get((label, guess), {"images": 0, "share": 0})
            assert record["images"] == images
            assert record["share"] == images / sum(row)
    svg = drawing_of(comparison, "confusion_2_batch").svg()
    assert all(f">{name}<" in svg for name in CLASSES)
    assert f">{matrix[0][0] / 2000:.1%}<" in svg


def test_names_with_dollars_are_no_formulas_and_powers_of_ten_stay_some():
    names = ("$5_and_$10", r"$\x$", *CLASSES[2:])
    comparison = comparison_of(confusion=True)
    dataset = comparison.dataset.model_copy(update={"class_names": names})
    (drawing, *_) = confusion_matrices(comparison.model_copy(update={"dataset": dataset}))
    svg = drawing.svg()
    assert all(f">{name}<" in svg for name in names)
    assert drawing.png().startswith(b"\x89PNG")

    def powers(figure):
        axes = figure.subplots()
        axes.set_yscale("log")
        axes.plot([1, 2], [1e-3, 10], label="a $_b_$")
        axes.legend()

    svg = Drawing("powers", "Powers", "", (), (), (4, 3), powers).svg()
    assert ">a $_b_$<" in svg
    assert ">$" not in svg  # beside the text, matplotlib writes the formula as a comment


@pytest.mark.parametrize("classes", [1, 2, 30])
def test_confusion_matrices_of_few_and_many_classes_can_be_drawn(classes):
    """The last class has no images."""
    matrix = [[7 * (row == column) + (row + column) % 3 for column in range(classes)] for row in range(classes)]
    matrix[-1] = [0] * classes
    names = tuple(f"a class with a long name, {number}" for number in range(classes))
    comparison = with_arms(comparison_of({}), {"confusion": matrix})
    dataset = comparison.dataset.model_copy(update={"class_names": names, "classes": classes})
    (drawing,) = confusion_matrices(comparison.model_copy(update={"dataset": dataset}))
    assert drawing.rows[-1] == ("batch", names[-1], names[-1], 0, None)
    assert classes > 2 or ">no images<" in drawing.svg()
    assert Image.open(io.BytesIO(drawing.png())).height < 2500


@pytest.mark.parametrize("name", ["norms", "many"])
def test_colour_is_never_the_only_sign(name):
    styles = line_styles({arm.arm: arm.values for arm in STUDIES[name][0].arms})
    panels = {style.panel for style in styles.values()}
    assert len(panels) == (4 if name == "many" else 1)
    for panel in panels:
        lines = [style for style in styles.values() if style.panel == panel]
        assert len({style.color for style in lines}) == len({(style.marker, str(style.dash)) for style in lines})
        assert len({style.label for style in lines}) == len(lines)


def test_thirty_arms_of_one_setting_have_styles_of_their_own():
    styles = line_styles({f"width {n}": {"model.width": n} for n in range(30)}).values()
    assert {style.panel for style in styles} == {""}
    assert len({style.color for style in styles}) == 30
    assert len(COLORS) == len(MARKERS) > len(DASHES)


def test_seeds_of_one_rate_are_averaged_in_the_map_of_rates_and_those_that_came_less_far_left_out():
    comparison = comparison_of()
    first = comparison.search[0]
    seeds = [first.model_copy(update={"rungs": rungs, "seed": seed, "best_accuracy": accuracy})
             for rungs, seed, accuracy in ((2, 1000, 0.8), (2, 1001, 0.6), (1, 1002, 0.1))]  # fmt: skip
    cells = _cells_of_search(comparison.model_copy(update={"search": (*seeds, *comparison.search[1:])}))
    assert (cells[0].accuracy, cells[0].trials, cells[0].diverged) == (pytest.approx(0.7), 3, 0)
    fallen = [seed.model_copy(update={"diverged": True}) for seed in seeds[:2]]
    cells = _cells_of_search(comparison.model_copy(update={"search": (*fallen, *comparison.search[1:])}))
    assert (cells[0].trials, cells[0].diverged) == (2, 2)
