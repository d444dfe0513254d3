"""The gate on made predictions: what passes, what does not, and the words for it."""

import numpy as np
import pytest

from pipeline.config.registry import RegistrySettings
from pipeline.report.gate import Seen, judge
from pipeline.report.registration import Registration
from pipeline.report.registration_page import headline, render_registration

LABELS = np.repeat([0, 1, 2], 100)


def seen(version, wrong=(), *, milliseconds=1.0, labels=LABELS):
    """A model that has every image right but these."""
    predictions = labels.copy()
    predictions[list(wrong)] = (predictions[list(wrong)] + 1) % 3
    return Seen(version, predictions, milliseconds)


def gate(challenger, champion=None, labels=LABELS, **bounds):
    settings = RegistrySettings(**bounds)
    return judge(labels, challenger, champion, split="test", classes=("a", "b", "c"), settings=settings)


def test_equal_models_pass_and_every_image_is_counted_once():
    report = gate(seen("2", [0, 1, 100]), seen("1", [0, 150, 200]))
    assert report.passes
    assert (report.both_right, report.only_challenger_right, report.only_champion_right, report.neither_right) == (
        295, 2, 2, 1,
    )  # fmt: skip
    assert report.p_value == 1.0
    assert [each.challenger for each in report.classes] == [0.98, 0.99, 1.0]
    assert [each.champion for each in report.classes] == [0.99, 0.99, 0.99]


def test_less_accurate_by_more_than_the_bound():
    report = gate(seen("2", [0, 100, 200]), seen("1"))
    assert report.reasons == (
        "99.00% right against 100.00% of version 1: more than registry.max_accuracy_drop, 0.5 points, below",
    )
    assert gate(seen("2", [0, 100, 200]), seen("1"), max_accuracy_drop=0.02).passes  # p = 0.25


@pytest.mark.parametrize(("right", "champion"), [(895, 900), (890, 895), (945, 950), (985, 990), (994, 999)])
def test_less_accurate_by_just_the_bound_passes(right, champion):
    """Half a point of a thousand images is five; as floats the shares differ by a little more."""
    labels = np.repeat([0, 1, 2], [400, 300, 300])
    models = [seen(name, range(1000 - count), labels=labels) for name, count in (("2", right), ("1", champion))]
    assert gate(*models, labels=labels, significance=0.01).passes
    labels = np.repeat([0, 1, 2], [100, 5, 5])
    assert gate(seen("2", range(5), labels=labels), seen("1", labels=labels), labels=labels, max_accuracy_drop=0.5,
                significance=0.2, max_recall_drop=0.05).reasons == (
        "95.45% right against 100.00% of version 1: less accurate beyond chance (McNemar's p = 0.062 < 0.2)",
    )  # fmt: skip


def test_less_accurate_beyond_chance_fails_within_the_bound():
    wrong = [*range(3), *range(100, 103), *range(200, 203)]
    report = gate(seen("2", wrong), seen("1"), max_accuracy_drop=0.1)
    assert report.p_value == pytest.approx(2 * 0.5**9)
    assert report.reasons == (
        "97.00% right against 100.00% of version 1: less accurate beyond chance (McNemar's p = 0.0039 < 0.05)",
    )


def test_better_may_be_required():
    assert gate(seen("2"), seen("1", [0]), require="better").reasons == (
        "100.00% right against 99.67% of version 1: not better beyond chance (McNemar's p = 1), and registry.require "
        "is better",
    )
    assert gate(seen("2"), seen("1", range(10)), require="better").passes


def test_a_class_may_not_fall_though_others_rise():
    report = gate(seen("2", range(12)), seen("1", range(100, 112)))
    assert report.p_value == 1.0
    assert report.reasons == (
        "class a: 88.00% of its images right against 100.00%, more than registry.max_recall_drop, 5 points, below "
        "(p = 0.00049)",
    )
    labels = np.repeat([0, 1, 2], [4, 100, 100])  # of four images, one is a quarter
    assert gate(seen("2", [0], labels=labels), seen("1", [40], labels=labels), labels).passes


def test_time_for_an_image():
    report = gate(seen("2", milliseconds=3.2), seen("1", milliseconds=2.0))
    assert report.reasons == (
        "an image takes 3.20 ms, 1.60 times the champion's 2.00 ms: more than registry.max_latency_ratio, 1.5",
    )
    assert gate(seen("2", milliseconds=9.0), seen("1"), max_latency_ratio=None).passes


def test_without_a_champion_it_has_to_have_learned():
    assert gate(seen("1")).passes
    constant = Seen("1", np.zeros(300, int), 1.0)
    report = gate(constant)
    assert report.reasons == (
        "it has not learned: an accuracy of 33.33% is no better than the best constant answer, 33.33%, beyond chance",
    )
    assert (report.champion, report.p_value, report.latency_ratio) == (None, None, None)


def test_a_class_without_images_has_no_recall():
    labels = np.repeat([0, 1], 100)
    report = gate(seen("2", labels=labels), seen("1", labels=labels), labels)
    assert report.passes
    last = report.classes[2]
    assert (last.images, last.challenger, last.champion, last.p_value) == (0, None, None, None)


def test_the_page_shows_the_decision_both_models_and_each_class():
    report = gate(seen("2", [0, 100, 200]), seen("1"))
    made = Registration(
        model="<pets>", version="2", is_new=True, decision="rejected", why=report.reasons, champion="1",
        champion_before="1", aliases={"champion": "1", "challenger": "2"}, uri="models:/pets@champion", origin=None,
        gate=report, notes=("look",),
    )  # fmt: skip
    page = render_registration(made)
    assert headline(made) == "Version 2 of <pets> did not pass the gate."
    assert "&lt;pets&gt;, version 2" in page
    assert "<pets>" not in page
    for text in (report.reasons[0], "look", "Both on the same 300 images of test", "p = 0.25", "challenger: version 2"):
        assert text in page
    assert page.count("<tr>") == 2 + 1 + 2 + 1 + 3 + 1
    alone = made.model_copy(update={"gate": gate(seen("1")), "decision": "first", "champion_before": None})
    assert "McNemar" not in render_registration(alone)
