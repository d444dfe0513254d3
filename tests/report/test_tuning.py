"""A search's verdict, page and figures."""

import csv
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import small_tunings
from small_tunings import JUDGE, SPACE, tuning_of

from pipeline.report.confirmation import confirmed_trials, verdict_of
from pipeline.report.confirmation import test_figure as figure_of
from pipeline.report.figures.score_scale import ScoreScale
from pipeline.report.figures.tune import figures_of
from pipeline.report.tune_page import render
from pipeline.report.tuning import SeedScore, Tuning
from pipeline.study.tuning.summary import metrics_of


@pytest.fixture(scope="module")
def tuning():
    return tuning_of()


def test_the_winner_is_the_best_with_new_seeds_and_not_the_best_of_the_search():
    """With seeds that lie far apart, the one that was first in the search is not always first again."""
    winners = set()
    for seeds in (2, 3, 4):
        found = tuning_of(seeds=seeds, seed_deviation=0.02)
        means = [each.mean for each in found.confirmed]
        assert found.winner == found.confirmed[0].number
        assert means == sorted(means, reverse=True)
        winners.add(found.winner == max(found.complete, key=lambda trial: trial.score).number)
    assert False in winners


def test_a_choice_among_noise_is_called_so(tuning):
    text = " ".join(tuning.verdict)
    assert "It was chosen among noise: it cannot be told from trial" in text
    assert re.search(r"[−+]\d\.\d\d points \[[−+]\d+\.\d\d, [−+]\d+\.\d\d\]", text)
    winner = tuning.confirmed[0]
    assert ("figures flatters" in text) == (winner.searched_score > winner.mean)
    assert text.count("test split") == 1


def test_a_winner_beyond_chance_is_called_so():
    clear = tuning_of(seed_deviation=1e-6)
    text = " ".join(clear.verdict)
    assert "It is better than trials" in text
    assert "noise" not in text
    for other in clear.confirmed[1:]:
        assert other.difference.p_adjusted <= 0.05
        assert other.difference.p_adjusted >= other.difference.p_value


def test_a_trial_that_diverges_with_a_seed_does_not_win_and_it_is_said(tuning):
    winner, second, *rest = tuning.confirmed
    run = second.runs[0].model_copy(update={"diverged": True})
    fallen = second.model_copy(update={"runs": (run, *second.runs[1:])})
    text = " ".join(verdict_of(tuning.model_copy(update={"confirmed": (winner, fallen, *rest)})))
    assert "diverged with 1 of 3 seeds" in text


def test_of_how_many_seeds_a_difference_is_stands_beside_it(tuning):
    winner, second, third, *_ = tuning.confirmed
    second = second.model_copy(update={"difference": second.difference.model_copy(update={"n": 1, "p_adjusted": 1.0})})
    third = third.model_copy(update={"difference": None})
    text = " ".join(verdict_of(tuning.model_copy(update={"confirmed": (winner, second, third)})))
    assert re.search(
        r"points \[.*\] over 1 of 3 seeds, with which both have learned; not known, since with no seed", text
    )
    assert "over 3 of 3" not in " ".join(tuning.verdict)


def test_without_a_confirmation_nothing_is_said_of_the_test_split():
    text = " ".join(tuning_of(confirm=0).verdict)
    assert "was not confirmed with other seeds" in text
    assert "test split" not in text
    assert "chance may have chosen it" in text


def test_one_confirmed_trial_and_one_seed():
    text = " ".join(tuning_of(confirm=1, seeds=1).verdict)
    assert "with 1 new seed." in text
    assert "No other trial was trained again" in text


def test_a_winner_that_diverged_as_all_others_is_better_than_none(tuning):
    winner, *others = (
        each.model_copy(
            update={"difference": None, "runs": tuple(run.model_copy(update={"diverged": True}) for run in each.runs)}
        )
        for each in tuning.confirmed
    )
    assert "It is better" not in " ".join(verdict_of(tuning.model_copy(update={"confirmed": (winner, *others)})))


def test_a_trial_that_did_not_learn_is_behind_one_that_did_and_it_is_said():
    """Its losses are finite, but its answers are those of one class for all images."""
    made = tuning_of()
    runs = [
        small_tunings.run_of(made.trials[number], seed, score)
        for seed in (7, 8)
        for number, score in ((0, 0.9), (1, 0.1))
    ]
    found = confirmed_trials(runs, {0: 0.9, 1: 0.85}, {}, JUDGE)
    assert [(each.number, [run.learned for run in each.runs]) for each in found] == [(0, [True] * 2), (1, [False] * 2)]
    tuning = made.model_copy(update={"confirmed": tuple(found), "winner": 0})
    text = " ".join(verdict_of(tuning))
    assert "It is better than trial 1, the next best, which learned with no seed." in text
    assert "cannot be told" not in text
    assert render(tuning).count("(did not learn)") == 2
    both_bad = tuning.model_copy(update={"confirmed": (found[1], found[1].model_copy(update={"number": 2}))})
    text = " ".join(verdict_of(both_bad))
    assert "with 2 new seeds, did not learn with 2 of 2 seeds." in text
    assert "not known, since with no seed both have learned, did not learn with 2 of 2 seeds" in text


def test_of_a_single_seed_nothing_is_said_of_chance_between_seeds(tuning):
    winner, *others = tuning.confirmed
    behind = {"mean": -0.1, "p_adjusted": 1e-6, "covers": "images", "n": 1}
    others = [each.model_copy(update={"difference": each.difference.model_copy(update=behind)}) for each in others]
    text = " ".join(verdict_of(tuning.model_copy(update={"confirmed": (winner, *others)})))
    assert "beyond what the choice of images explains; a single seed says nothing" in text
    assert "beyond what seeds and images explain" not in text


def test_the_result_is_read_back(tuning):
    assert Tuning.model_validate_json(tuning.model_dump_json(exclude_unset=True)) == tuning


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text, self.scripts = [], [], 0

    def handle_starttag(self, tag, _):
        self.scripts += tag == "script"
        if tag not in ("meta", "br", "path", "use", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_of_cross_entropy_less_is_better_everywhere():
    """The same search twice, once by accuracy and once by one minus that in nats: what is chosen is the same."""
    share, nats = tuning_of(seed_deviation=0.02), tuning_of(seed_deviation=0.02, metric="cross_entropy")
    assert [each.number for each in nats.confirmed] == [each.number for each in share.confirmed]
    means = [each.mean for each in nats.confirmed]
    assert means == sorted(means)
    for one, other in zip(share.confirmed[1:], nats.confirmed[1:], strict=True):
        assert other.difference.mean == pytest.approx(-one.difference.mean)
        assert other.difference.mean > 0
    text = " ".join(nats.verdict)
    assert re.search(r"is taken: cross-entropy 0\.\d{4} ± 0\.\d{4} on the validation split", text)
    assert re.search(r"differences? from it (is|are) \+0\.\d{4} nats \[[−+]\d\.\d{4}, \+\d\.\d{4}\]", text)
    assert "%" not in text
    assert re.search(r"On the test split, by which nothing was chosen, it has 0\.0990 ± 0\.0010", text)
    assert metrics_of(nats)["tune/best_searched_score"] == min(trial.score for trial in nats.complete)
    page = render(nats)
    assert "Searched for the lowest cross-entropy on the validation split" in page
    assert "against the winner, nats" in page
    clear = tuning_of(seed_deviation=1e-6, metric="cross_entropy")
    assert "It is better than trials" in " ".join(clear.verdict)


def test_a_search_that_flatters_is_called_so_in_either_unit():
    for metric, words in (("accuracy", r"\+\d\.\d\d points"), ("cross_entropy", r"−0\.\d{4} nats")):
        found = tuning_of(confirm=1, metric=metric)  # its runs are 0.004 worse than the search, on average
        assert re.search(rf"In the search it had [\d.%]+, {words}: the best of 24 figures flatters\.", found.verdict[2])


def test_a_cross_entropy_that_is_not_finite_is_unknown_and_last():
    runs = [_run(number, seed, loss) for number, loss in ((0, 0.3), (1, None), (2, 0.2)) for seed in (1, 2)]
    judge = JUDGE._replace(metric="cross_entropy")
    found = confirmed_trials(runs, {0: 0.3, 1: 0.1, 2: 0.2}, {}, judge)
    assert [each.number for each in found] == [2, 0, 1]
    assert (found[2].mean, found[2].runs[0].score, found[2].runs[0].diverged) == (None, None, True)
    tuning = tuning_of(metric="cross_entropy").model_copy(update={"confirmed": tuple(found), "winner": 2})
    text = " ".join(verdict_of(tuning))
    assert text.startswith("Trial 2 is taken: cross-entropy 0.2000")
    assert "trials 0 and 1" in text
    assert "unknown (diverged)" in render(tuning)
    assert Tuning.model_validate_json(tuning.model_dump_json(exclude_unset=True)) == tuning


def test_a_seed_whose_last_loss_alone_is_not_finite_has_fallen_as_in_the_search():
    """The training came to its end, so nothing says that it diverged; its difference from any other is infinite."""
    losses = {0: (0.3, 0.31, 0.32), 1: (0.2, None, 0.22), 2: (0.1, None, 0.12)}
    runs = [_run(number, seed, losses[number][seed]) for seed in range(3) for number in losses]
    runs = [run.model_copy(update={"diverged": False}) for run in runs]
    found = confirmed_trials(runs, {0: 0.3, 1: 0.2, 2: 0.1}, {}, JUDGE._replace(metric="cross_entropy"))
    assert [each.number for each in found] == [0, 2, 1]
    assert [run.fallen for run in found[1].runs] == [None, "diverged", None]
    assert (found[1].difference.n, found[1].difference.mean) == (2, pytest.approx(-0.2))
    tuning = tuning_of(metric="cross_entropy").model_copy(update={"confirmed": tuple(found), "winner": 0})
    text = " ".join(verdict_of(tuning))
    assert "It is better" not in text
    assert text.count("over 2 of 3 seeds, with which both have learned, diverged with 1 of 3 seeds") == 2
    json.dumps(tuning.model_dump(mode="json"), allow_nan=False)


@pytest.mark.parametrize(
    ("metric", "bad", "words"),
    [
        (
            "accuracy",
            0.1,
            "it has 36.67% ± 46.19 (3 new seeds, did not learn with 1 of 3 seeds, diverged with 1 of 3 seeds)",
        ),
        ("cross_entropy", None, "it has 0.9000 (3 new seeds, mean over 1 of them, did not learn with 1 of 3 seeds"),
    ],
)
def test_of_seeds_that_fell_on_the_test_split_the_sentence_and_the_page_speak(metric, bad, words):
    how = [{"diverged": False}, {"diverged": True}, {"diverged": False, "learned": False}]
    runs = [SeedScore(seed=n, score=bad if n else 0.9, run_id=f"t{n}", **fields) for n, fields in enumerate(how)]
    made = tuning_of(metric=metric).model_copy(update={"test": figure_of("test", runs)})
    assert words in verdict_of(made)[-1]
    assert f"({words.partition(' (')[2]}" in render(made)
    sound = figure_of(
        "test", [run.model_copy(update={"score": 0.9, "diverged": False, "learned": True}) for run in runs]
    )
    assert verdict_of(made.model_copy(update={"test": sound}))[-1].endswith("(3 new seeds).")


def test_over_how_many_seeds_a_confirmed_mean_is_stands_beside_it():
    runs = [_run(0, seed, loss) for seed, loss in enumerate((0.3, None, 0.32))]
    found = confirmed_trials(runs, {0: 0.3}, {}, JUDGE._replace(metric="cross_entropy"))
    text = verdict_of(tuning_of(metric="cross_entropy").model_copy(update={"confirmed": tuple(found), "winner": 0}))[0]
    assert text.endswith("split with 3 new seeds, mean over 2 of them, diverged with 1 of 3 seeds.")


def _run(number, seed, loss):
    trial = tuning_of().trial(number)
    run = small_tunings.run_of(trial, seed, 0.9)
    return run.model_copy(update={"final_loss": loss, "diverged": loss is None})


def test_the_axes_of_a_cross_entropy_cut_off_what_is_high():
    scale = ScoreScale("cross_entropy", [0.2, 0.21, 0.22, 0.23, 5.0])
    assert (scale.best, scale.place(0.21), scale.place(5.0)) == (0.2, 0.21, scale.edge)
    assert 0.23 < scale.edge < 0.4
    assert (scale.share(0.2), scale.share(5.0), scale.better(0.3, 0.2)) == (1, 0, 0.2)
    assert scale.beyond([SimpleNamespace(trial=4, score=5.0)]) == " At the upper edge: 1 that lie above."
    share = ScoreScale("accuracy", [0.9, 0.89, 0.88, 0.1])
    assert (share.best, share.place(0.1), share.better(0.3, 0.2)) == (0.9, share.edge, 0.3)
    assert share.beyond([SimpleNamespace(trial=4, score=0.1)]) == " At the lower edge: 1 that lie below."


@pytest.mark.parametrize("metric", ["accuracy", "cross_entropy"])
@pytest.mark.parametrize("confirm", [0, 1, 3])
def test_the_page_is_whole_and_needs_nothing_else(confirm, metric):
    made = tuning_of(confirm=confirm, metric=metric)
    page = render(made)
    tags = _Tags()
    tags.feed(page)
    assert (tags.open, tags.scripts) == ([], 0)
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    text = "".join(tags.text)
    for line in made.verdict:
        assert line in text
    for name, words in made.space.items():
        assert name in text
        assert words in text
    assert "Every trial" in text
    assert text.count("diverged") >= sum(trial.state == "diverged" for trial in made.trials)


def test_the_figures_are_drawn_from_their_numbers(tuning):
    drawings = {drawing.name: drawing for drawing in figures_of(tuning)}
    assert set(drawings) == {"history", "curves", "importance", "slices", "norm_settings"}
    for drawing in drawings.values():
        assert drawing.png().startswith(b"\x89PNG")
        assert "<svg" in drawing.svg()
    rows = list(csv.DictReader(drawings["slices"].csv().splitlines()))
    assert {row["setting"] for row in rows} == set(SPACE)
    of_eps = {int(row["trial"]) for row in rows if row["setting"] == "model.norm_eps"}
    assert of_eps == {trial.number for trial in tuning.trials if trial.values["model.norm"] == "batch"}
    norms = list(csv.DictReader(drawings["norm_settings"].csv().splitlines()))
    assert {(row["norm_setting"], row["setting"]) for row in norms} == {
        (norm, other)
        for norm in SPACE
        if norm.startswith("model.norm")
        for other in ("train.learning_rate", "train.batch_size")
    }
    curves = list(csv.DictReader(drawings["curves"].csv().splitlines()))
    assert len(curves) == sum(len(trial.curve) for trial in tuning.trials)


def test_what_there_is_no_data_for_is_not_drawn(tuning):
    few = tuning.model_copy(update={"importance": {}, "space": {"train.momentum": "0.1 to 0.9"}})
    plain = few.model_copy(update={"trials": tuple(
        trial.model_copy(update={"values": {"train.momentum": 0.5}, "curve": trial.curve[:1]}) for trial in few.trials
    )})  # fmt: skip
    assert [drawing.name for drawing in figures_of(plain)] == ["history", "slices"]
