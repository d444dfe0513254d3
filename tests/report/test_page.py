import json
import re
from html.parser import HTMLParser

import pytest
from small_comparisons import comparison_of, many_arms

from pipeline.report.comparison import Comparison
from pipeline.report.names import LEARNING_RATE
from pipeline.report.page import render
from pipeline.report.verdict import verdict

VOID = {"meta", "br", "link", "img", "input", "hr", "col"}
STUDIES = {
    "norms": comparison_of(seeds=3, confusion=True),
    "one arm, one seed, no search": comparison_of({}, seeds=1, rates=(0.1,), gradient_norms=False),
    "two arms, one seed": comparison_of(seeds=1),
    "all diverged": comparison_of(diverged={"none": 2, "batch": 2}),
    "baseline diverged": comparison_of(diverged={"none": 2}),
    "an arm diverged": comparison_of(diverged={"batch": 2}),
    "an arm did not learn": comparison_of(seeds=3, not_learned={"batch": 1}),
    "old runs": comparison_of(predictions=False),
    "balanced": comparison_of(metric="balanced_accuracy"),
    "never reached": comparison_of(target_accuracy=0.99),
    "no speed": comparison_of(speed=False),
    "28 arms": many_arms(diverged={"batch, rank_batch_size 2": 1}),
    "batch size": comparison_of({"train.rank_batch_size": [8, 64, 128]}),
    "rates": comparison_of({"model.norm": ["none", "batch"], LEARNING_RATE: [0.01, 0.1]}, rates=(0.1,)),
    "nine arms of one setting": comparison_of({"model.width": list(range(8, 80, 8))}),
}
ARM_KEYS = {
    "n", "diverged", "not_learned", "grade", "score_mean", "score_std", "difference_covers", "difference_p_adjusted",
    "difference_seeds_low", "difference_seeds_high", "difference_images_low", "difference_images_high",
    "difference_mcnemar_p", "best_accuracy_mean", "best_accuracy_std", "final_accuracy_mean", "final_accuracy_std",
    "final_balanced_accuracy_mean", "final_balanced_accuracy_std", "final_macro_f1_mean", "final_macro_f1_std",
    "final_loss_mean", "final_loss_std", "final_calibration_error_mean", "final_calibration_error_std",
    "difference_mean", "difference_low", "difference_high", "reached_target", "steps_to_target_mean",
    "steps_to_target_std", "steps_ratio", "seconds_to_target_mean", "seconds_to_target_std", "seconds_ratio",
    "highest_stable_rate", "images_per_second_mean", "images_per_second_std", "overhead", f"tuned/{LEARNING_RATE}",
}  # fmt: skip
RUN_KEYS = {
    "seed", "best_accuracy", "final_accuracy", "final_balanced_accuracy", "final_loss", "steps",
    "target", "steps_to_target", "images_to_target",
    "seconds_to_target", "images_per_second", "diverged", "learned",
}  # fmt: skip


class Page(HTMLParser):
    """Numbers of cells, by what they belong to; fails where tags are not balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.arms, self.runs, self.tags = [], {}, {}, []
        self.links, self.tables, self.text, self._figure = [], {}, "", None
        self.headings = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)
        for kind, numbers in (("data-arm", self.arms), ("data-run", self.runs)):
            if kind in found:
                of = numbers.setdefault(found[kind], {})
                assert found["data-key"] not in of
                of[found["data-key"]] = json.loads(found["data-value"])
        if "data-figure" in found:
            self._figure = self.tables.setdefault(found["data-figure"], [])
        elif self._figure is not None and tag in ("td", "th"):
            self._figure.append(found.get("data-value", ""))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "details":
            self._figure = None

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self._figure is not None and self.open and self.open[-1] in ("td", "th") and not self._figure[-1]:
            self._figure[-1] = data


@pytest.fixture(scope="module", params=STUDIES, ids=str)
def study(request):
    comparison = STUDIES[request.param]
    text = render(comparison)
    return comparison, text, Page(text)


def flat(record):
    difference = {f"difference_{key}": value for key, value in record.get("difference", {}).items()}
    return {**record, **difference, **{f"tuned/{name}": value for name, value in record["tuned"].items()}}


def test_every_number_of_a_cell_is_the_comparisons(study):
    comparison, page = study[0].model_dump(mode="json", exclude_unset=True), study[2]
    assert page.arms.keys() == {arm["arm"] for arm in comparison["arms"]}
    for arm in comparison["arms"]:
        expected = flat(arm)
        for key, value in page.arms[arm["arm"]].items():
            assert value == expected.get(key), key
    records = [*comparison["runs"], *comparison["search"]]
    assert page.runs.keys() == {record["run_id"] for record in records}
    for record in records:
        expected = flat(record)
        for key, value in page.runs[record["run_id"]].items():
            assert value == expected[key], key


def test_no_number_that_is_known_is_left_out(study):
    comparison, page = study[0].model_dump(mode="json", exclude_unset=True), study[2]
    for arm in comparison["arms"]:
        known = {key for key, value in flat(arm).items() if value is not None} & ARM_KEYS
        assert known <= page.arms[arm["arm"]].keys()
    if len({arm["global_batch"] for arm in comparison["arms"]}) > 1:
        assert all("global_batch" in page.arms[arm["arm"]] for arm in comparison["arms"])
    for run in comparison["runs"]:
        known = {key for key, value in flat(run).items() if value is not None} & RUN_KEYS
        assert known <= page.runs[run["run_id"]].keys()


def test_the_page_stands_alone(study):
    _, text, page = study
    assert page.tags[0] == ("html", {"lang": "en"})
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.findall(r"url\((?!#)|@import|@font-face", text)
    for wrong in ("None", "NaN", "nan", "inf%", "Infinity"):
        assert wrong not in re.sub(r"<[^>]*>", " ", text.replace("None,", "")), wrong


def test_identifiers_are_unique_and_found(study):
    _, text, page = study
    own = [found["id"] for _, found in page.tags if "id" in found]
    assert len(own) == len(set(own))
    assert {*re.findall(r"url\(#([^)]+)\)", text), *(link[1:] for link in page.links)} <= set(own)


def test_each_figure_offers_its_numbers(study):
    from pipeline.report.figures.study import figures_of

    comparison, _, page = study
    drawings = figures_of(comparison)
    assert [drawing.name for drawing in drawings] == list(page.tables)
    for drawing in drawings:
        shown = page.tables[drawing.name][len(drawing.columns) :]
        values = [value for row in drawing.rows for value in row]
        assert len(shown) == len(values)
        for text, value in zip(shown, values, strict=True):
            if isinstance(value, bool):
                assert text == str(value).lower()
            elif isinstance(value, (int, float)):
                assert float(text) == value
            else:
                assert text == ("–" if value is None else value)


def test_figures_and_tables_can_be_read_by_machines_and_on_a_phone(study):
    _, text, page = study
    pictures = [found for tag, found in page.tags if tag == "svg"]
    assert all(found["role"] == "img" and found["aria-label"] for found in pictures)
    assert text.count('<div class="wide"') == sum(tag == "table" for tag, _ in page.tags) + len(pictures)
    assert '<meta name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    assert "break-inside: avoid" in text


def test_warnings_gaps_and_the_way_of_measuring_are_said(study):
    comparison, _, page = study
    words = " ".join(page.text.split())
    for phrase in (*comparison.warnings, *comparison.not_measured, *(line.text for line in verdict(comparison))):
        assert phrase in words
    assert "2 trials ran at once" in words
    assert "p-values are corrected for the number of arms (Holm), intervals are not" in words
    assert {line.id for line in comparison.verdict} <= {found.get("id") for _, found in page.tags}
    assert "is chosen on the images that judge it" in words
    assert "Seconds are those of optimizer steps" in words
    assert comparison.mlflow.parent_run_id in words
    metric = "Accuracy" if comparison.metric == "accuracy" else "Balanced accuracy"
    order = ["Arms", "Beyond accuracy", f"{metric} on the test split", "Every run", "Not measured here",
             "How it was measured"]  # fmt: skip
    assert [heading for heading in page.headings if heading in order] == order


def test_names_of_arms_are_escaped():
    text = comparison_of().model_dump_json(exclude_unset=True)
    comparison = Comparison.model_validate_json(text.replace('"batch"', '"<b>, \\"x\\" & y"'))
    page = Page(render(comparison))
    assert '<b>, "x" & y' in page.arms
    assert verdict(comparison)[0].text.startswith('<b>, "x" & y was the most accurate')


def test_trials_of_a_search_say_their_seeds_where_these_differ():
    comparison = comparison_of()
    again = comparison.search[0].model_copy(update={"seed": 1001, "best_accuracy": 0.5, "final_accuracy": 0.5})
    page = render(comparison.model_copy(update={"search": (*comparison.search, again)}))
    assert "1001" in page
    assert "1001" not in render(comparison)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_page_names_the_split_that_was_evaluated(split):
    page = Page(render(comparison_of().model_copy(update={"evaluated_on": split})))
    assert f"best of the {split} evaluations*" in page.text
