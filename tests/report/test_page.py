import json
import re
from html.parser import HTMLParser

import pytest
from small_comparisons import comparison_of, many_arms

from pipeline.report.names import LEARNING_RATE
from pipeline.report.page import render, verdict

VOID = {"meta", "br", "link", "img", "input", "hr", "col"}
STUDIES = {
    "norms": comparison_of(seeds=3),
    "one arm, one seed, no search": comparison_of({}, seeds=1, rates=(0.1,), gradient_norms=False),
    "two arms, one seed": comparison_of(seeds=1),
    "all diverged": comparison_of(diverged={"none": 2, "batch": 2}),
    "baseline diverged": comparison_of(diverged={"none": 2}),
    "an arm diverged": comparison_of(diverged={"batch": 2}),
    "never reached": comparison_of(target_accuracy=0.99),
    "no speed": comparison_of(speed=False),
    "28 arms": many_arms(diverged={"batch, rank_batch_size 2": 1}),
    "batch size": comparison_of({"train.rank_batch_size": [8, 64, 128]}),
    "rates": comparison_of({"model.norm": ["none", "batch"], LEARNING_RATE: [0.01, 0.1]}, rates=(0.1,)),
    "nine arms of one setting": comparison_of({"model.width": list(range(8, 80, 8))}),
}
ARM_KEYS = {
    "n", "diverged", "best_accuracy_mean", "best_accuracy_std", "final_accuracy_mean", "final_accuracy_std",
    "difference_mean", "difference_low", "difference_high", "reached_target", "steps_to_target_mean",
    "steps_to_target_std", "steps_ratio", "seconds_to_target_mean", "seconds_to_target_std", "seconds_ratio",
    "highest_stable_rate", "images_per_second_mean", "images_per_second_std", "overhead", f"tuned/{LEARNING_RATE}",
}  # fmt: skip
RUN_KEYS = {
    "seed", "best_accuracy", "final_accuracy", "steps", "target", "steps_to_target", "images_to_target",
    "seconds_to_target", "images_per_second", "diverged",
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
    comparison, _, page = study
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
    comparison, _, page = study
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
    for phrase in (*comparison["warnings"], *comparison["not_measured"], *verdict(comparison)):
        assert phrase in words
    assert "2 trials ran at once" in words
    assert "not corrected for the number of arms" in words
    assert "Seconds are those of optimizer steps" in words
    assert comparison["mlflow"]["parent_run_id"] in words
    order = ["Arms", "Accuracy on the test split", "Every run", "Not measured here", "How it was measured"]
    assert [heading for heading in page.headings if heading in order] == order


def test_names_of_arms_are_escaped():
    comparison = json.loads(json.dumps(comparison_of()).replace('"batch"', '"<b>, \\"x\\" & y"'))
    page = Page(render(comparison))
    assert '<b>, "x" & y' in page.arms
    assert verdict(comparison)[0].startswith('<b>, "x" & y was the most accurate')


def test_verdict_of_two_arms():
    comparison = comparison_of(seeds=3)
    none, batch = comparison["arms"]
    lines = verdict(comparison)
    assert lines[0] == (
        f"Batch norm was the most accurate: {100 * batch['best_accuracy_mean']:.2f}% ± "
        f"{100 * batch['best_accuracy_std']:.2f} (n = 3) on the test split; the baseline, no normalization, had "
        f"{100 * none['best_accuracy_mean']:.2f}% ± {100 * none['best_accuracy_std']:.2f} (n = 3)."
    )
    difference = {key: 100 * value for key, value in batch["difference"].items()}
    assert difference["low"] > 0
    assert lines[1].startswith(
        f"Batch norm was {difference['mean']:.2f} points above no normalization, 95% interval "
        f"{difference['low']:+.2f} to {difference['high']:+.2f} (n = 3); it needed 1/"
    )
    assert lines[1].endswith("training time to reach the best accuracy of no normalization.")
    assert lines[2] == (
        "Highest stable learning rate of those tried: 0.1 for no normalization; at least 0.5 for batch norm."
    )
    assert lines[3].startswith("Training time for an image against no normalization: batch norm +")
    assert len(lines) == 4


def with_arm(comparison, **changes):
    comparison["arms"][1] |= changes
    return verdict(comparison)[1]


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (14.2, "needed 1/14 of the steps"), (1200.0, "needed 1/1,200 of the steps"), (2.5, "needed 1/2.5 of the steps"),
        (1.25, "needed 20% fewer steps"), (1.001, "needed as many steps"), (0.8, "needed 25% more steps"),
        (0.25, "needed 4 times the steps"),
    ],
)  # fmt: skip
def test_ratios_in_words(ratio, text):
    assert f"it {text} and 10% more training time to reach" in with_arm(
        comparison_of(), steps_ratio=ratio, seconds_ratio=1 / 1.1
    )


def test_an_interval_around_zero_is_no_difference():
    line = with_arm(comparison_of(), difference={"mean": 0.001, "low": -0.002, "high": 0.004, "n": 2})
    assert line.startswith(
        "Between batch norm and no normalization no difference could be seen: +0.10 points, 95% interval −0.20 to "
        "+0.40 (n = 2);"
    )


def test_one_seed_says_nothing_about_chance():
    line = verdict(comparison_of(seeds=1))[1]
    assert "points above no normalization with a single seed, so nothing can be said about chance; it needed" in line
    many = verdict(many_arms(seeds=1))
    assert any(line.endswith("with a single seed, nothing can be said about chance.") for line in many)


def test_an_arm_that_did_not_arrive_everywhere():
    assert "(in 1 of 2 runs)." in with_arm(comparison_of(), reached_target=1)
    never = {"reached_target": 0, "steps_to_target_mean": None, "steps_ratio": None, "seconds_ratio": None}
    assert with_arm(comparison_of(), **never).endswith("it never reached the best accuracy of no normalization.")
    assert verdict(comparison_of(target_accuracy=0.99))[1].endswith(
        "it never reached 99%, and neither did the baseline."
    )
    line = verdict(comparison_of(target_accuracy=0.895))[1]
    assert re.search(r"it reached 89\.5% after \d+ steps, which the baseline never did\.$", line)


def test_arms_with_the_same_figures_share_the_first_place():
    comparison = comparison_of()
    for number, arm in enumerate(comparison["arms"]):
        arm["best_accuracy_mean"] = 0.9 + number * 1e-6
    assert verdict(comparison)[0].startswith(
        "No normalization and batch norm were equally accurate, and no arm was more so: 90.00% ± "
    )


def test_arms_that_diverged():
    every = verdict(comparison_of(diverged={"none": 2, "batch": 2}))
    assert every[0] == "Every run of every arm diverged: the comparison says nothing about accuracy."
    assert every[1].startswith("Highest stable learning rate of those tried: ")
    assert len(every) == 2
    base = verdict(comparison_of(diverged={"none": 2}))
    assert base[0].startswith("Batch norm was the most accurate")
    assert base[1] == "All runs of the baseline, no normalization, diverged: differences from it are not given."
    assert "No normalization diverged in 2 of 2 runs." in base
    other = verdict(comparison_of(diverged={"batch": 2}))
    assert other[0].startswith("No normalization, the baseline, was the most accurate")
    assert "Batch norm diverged in 2 of 2 runs." in other
    assert not any("points" in line for line in other)


def test_an_arm_alone_has_nothing_to_be_compared_with():
    lines = verdict(STUDIES["one arm, one seed, no search"])
    assert len(lines) == 1
    assert re.fullmatch(r"Batch norm, the only arm, had \d\d\.\d\d% \(n = 1\) on the test split\.", lines[0])


def test_steps_of_another_size_are_said_to_be():
    line = verdict(comparison_of({"train.rank_batch_size": [8, 64]}, target_accuracy=0.8))[1]
    assert ", steps of 128 images instead of 16, to reach" in line


def test_of_many_arms_the_verdict_is_short():
    comparison = STUDIES["28 arms"]
    lines = verdict(comparison)
    assert lines[0].startswith("Batch norm with rank batch size 128 was the most accurate: ")
    kinds = ["no normalization", "batch norm", "group norm", "layer norm"]
    assert [line.partition(":")[0] for line in lines[1:5]] == [f"Best of {kind}" for kind in kinds]
    assert re.match(r"Best of batch norm: rank batch size 128, 91\.\d\d% ± ", lines[2])
    assert lines[5].startswith("Of 27 other arms, ")
    assert "1 of 28 arms had runs that diverged: batch norm with rank batch size 2." in lines
    assert len(lines) <= 10
    counts = [int(number) for number in re.findall(r"(\d+) (?:were|below|no)", lines[5])]
    assert sum(counts) == 27
    assert all(len(line) < 400 for line in lines)


def test_many_arms_of_one_setting_have_no_groups():
    lines = verdict(STUDIES["nine arms of one setting"])
    assert not any(line.startswith("Best of") for line in lines)
    assert len(lines) <= 6
