"""The choosing logic of a search, as properties of made-up candidates."""

import itertools

import numpy as np
import pytest

from pipeline.report.learned import beats_constant
from pipeline.study.halving import Budget, Choice, Extend, Repeat, Train, next_move
from pipeline.study.rung_scores import RungScore, has_failed, is_out, is_worse, rung_units, units_of

IMAGES = 400


class Simulated:
    """Candidates with known curves: mean cost by rung, noise that images share, and when they learn or diverge.

    means : (candidates, rungs), mean cost of each at the end of each rung
    learns : rung from which a candidate has learned
    diverges : rung at which a candidate diverges, by its number
    offsets : what each further seed adds to a candidate's cost, by its number; the first adds nothing
    fails : the further seed, 1 is the second, with which a candidate diverges, by its number
    """

    def __init__(self, means, *, spread=0.3, seed=0, learns=None, diverges=None, beyond=(), offsets=None, fails=None):
        self.means, self.spread, self.random = [list(row) for row in means], spread, np.random.default_rng(seed)
        self.learns, self.diverges = learns or {}, diverges or {}
        self.difficulty = self.random.gamma(1.0, 1.0, IMAGES)
        self.offsets, self.fails = offsets or {}, fails or {}
        self.scores, self.repeats = [[] for _ in self.means], [[] for _ in self.means]
        self.places = [float(number) for number in range(len(self.means))]
        self.beyond = list(beyond)  # curves of candidates above the highest, the nearest first
        self.spent, self.moves = 0, []

    def run(self, budget):
        while True:
            move = next_move(self.scores, self.places, budget, self.can_extend, self.repeats)
            self.moves.append(move)
            if isinstance(move, Choice):
                return move
            if isinstance(move, Extend):
                self.means.append(self.beyond.pop(0))
                self.scores.append([])
                self.repeats.append([])
                self.places.append(max(self.places) + 1)
            else:
                assert move.candidates
                for number in move.candidates:
                    self.train(number, move.seed if isinstance(move, Repeat) else 0)

    def can_extend(self, number):
        return bool(self.beyond) and self.places[number] == max(self.places)

    def train(self, number, seed):
        if seed > len(self.repeats[number]):
            self.repeats[number].append([])
        scores = self.repeats[number][seed - 1] if seed else self.scores[number]
        rung = len(scores)
        self.spent += rung_units(rung)
        offset = self.offsets.get(number, ())[seed - 1] if seed and number in self.offsets else 0.0
        costs = self.means[number][rung] + offset + self.difficulty + self.random.normal(0, self.spread, IMAGES)
        diverged = self.fails.get(number) == seed if seed else self.diverges.get(number) == rung
        score = RungScore(np.full(IMAGES, np.nan) if diverged else costs, rung >= self.learns.get(number, 0), diverged)
        scores.append(score)


def flat(count, rungs=4, cost=1.0):
    return [[cost] * rungs for _ in range(count)]


def test_one_that_stands_out_ends_the_search_after_the_first_rung():
    means = [[2.0] * 4, [1.0] * 4, [2.0] * 4]
    search = Simulated(means)
    assert search.run(Budget(9, 2)) == Choice(1, (1,))
    assert search.spent == 3


def test_those_that_tie_go_on_and_the_longer_rung_tells_them_apart():
    means = [[3.0, 3.0], [1.0, 1.0], [1.0, 2.0]]
    search = Simulated(means)
    assert search.run(Budget(9, 2)) == Choice(1, (1,))
    assert search.moves[:2] == [Train((0, 1, 2)), Train((1, 2))]
    assert search.spent == 3 + 2 * 2


def test_what_is_close_goes_on_though_it_can_be_told_apart_and_at_the_end_the_better_one_is_taken():
    means = [[1.0, 1.0], [1.02, 1.02], [3.0, 3.0]]
    search = Simulated(means, spread=0.001)
    assert search.run(Budget(9, 2)) == Choice(0, (0,))
    assert search.moves[1] == Train((0, 1))


@pytest.mark.parametrize(("count", "middle"), [(3, 1), (4, 1), (5, 2), (8, 3)])
def test_of_equals_all_are_named_and_the_middle_one_is_taken(count, middle):
    search = Simulated(flat(count), spread=0.0)
    choice = search.run(Budget(3 * count, 2))
    assert (choice.tied, choice.undecided) == (tuple(range(count)), "tied")
    assert choice.candidate == middle
    assert search.spent == 3 * count


def test_ties_are_sorted_by_value_not_by_the_order_of_the_grid():
    search = Simulated(flat(3), spread=0.0)
    search.places = [0.5, 0.02, 0.1]
    assert search.run(Budget(9, 2)) == Choice(2, (1, 2, 0), "tied")


def test_nothing_is_judged_before_something_has_learned():
    """At the end of the first rung the worst seems best, as a low rate does where all name the largest class."""
    means = [[1.0, 1.0], [1.5, 0.2], [1.6, 0.9]]
    search = Simulated(means, learns={0: 9, 1: 1, 2: 1})
    assert search.run(Budget(9, 2)) == Choice(1, (1,))
    assert search.moves[1] == Train((0, 1, 2))


def test_where_nothing_learns_that_is_said():
    search = Simulated(flat(3), spread=0.0, learns=dict.fromkeys(range(3), 9))
    assert search.run(Budget(9, 2)) == Choice(1, (0, 1, 2), "not_learned")


def test_where_the_last_at_an_edge_is_best_and_has_not_learned_one_beyond_is_tried():
    """As in a grid of rates that are all too low."""
    means = [[3.0, 3.0], [2.0, 2.0]]
    search = Simulated(means, learns={0: 9, 1: 9}, beyond=[[1.0, 1.0]])
    assert search.run(Budget(9, 2)) == Choice(2, (2,))
    assert search.moves[1:4] == [Train((0, 1)), Extend(1), Train((2,))]


def test_one_that_has_not_learned_is_not_chosen_though_its_loss_is_lower():
    search = Simulated([[0.5, 0.5], [1.0, 1.0]], learns={0: 9})
    assert search.run(Budget(6, 2)) == Choice(1, (1,))


def test_what_diverges_later_lets_those_that_it_beat_in_again():
    means = [[2.0] * 3, [1.0] * 3, [1.0] * 3]
    search = Simulated(means, spread=0.0, diverges={1: 1, 2: 1})
    assert search.run(Budget(9, 2)) == Choice(0, (0,))


def test_where_all_diverge_the_lowest_is_taken_and_it_is_said():
    search = Simulated(flat(3), diverges=dict.fromkeys(range(3), 0))
    assert search.run(Budget(9, 2)) == Choice(0, (0, 1, 2), "diverged")


def test_one_that_collapses_has_failed():
    learned, lost = (RungScore(np.zeros(3), state) for state in (True, False))
    assert has_failed([learned, lost])
    assert not has_failed([lost, learned])
    assert not has_failed([lost, lost])
    assert not has_failed([])


def test_a_winner_at_the_edge_is_followed_until_it_is_inside():
    means = [[3.0, 3.0], [2.0, 2.0]]
    search = Simulated(means, beyond=[[1.0, 1.0], [2.0, 2.0], [0.1, 0.1]])
    assert search.run(Budget(6, 2)) == Choice(2, (2,))
    assert [move for move in search.moves if isinstance(move, Extend)] == [Extend(1), Extend(2)]
    assert search.spent == 4  # each a first rung alone: the last was told from the best there


def test_an_extension_climbs_as_far_as_the_winner_has_come_or_is_not_begun():
    means = [[1.0, 2.0], [1.0, 1.0]]
    search = Simulated(means, beyond=[[1.0, 0.5]])
    assert search.run(Budget(9, 2)) == Choice(2, (2,))
    assert search.spent == 9
    short = Simulated(means, beyond=[[1.0, 0.5]])
    assert short.run(Budget(8, 2)) == Choice(1, (1,))
    assert short.spent == 6


def test_without_a_budget_the_middle_is_taken_untrained():
    assert next_move([[], [], []], [0.02, 0.1, 0.5], Budget(0, 0)) == Choice(1, (0, 1, 2), "no_budget")
    assert next_move([[], [], []], [0.02, 0.1, 0.5], Budget(2, 2)) == Choice(1, (0, 1, 2), "no_budget")


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_the_budget_holds_and_the_choice_keeps_its_promises(seed):
    random = np.random.default_rng(seed)
    count, rungs = int(random.integers(2, 9)), int(random.integers(1, 5))
    budget = Budget(int(random.integers(count, 12 * count)), rungs, int(random.integers(1, 4)))
    means = np.round(random.normal(1.0, random.choice([0.0, 0.02, 0.3]), (count, rungs)), 2)
    learns = {n: int(random.choice([0, 1, 9], p=[0.6, 0.2, 0.2])) for n in range(count)}
    diverges = {n: int(random.integers(0, rungs)) for n in range(count) if random.random() < 0.2}
    beyond = [[float(random.normal(1, 0.3))] * rungs for _ in range(int(random.integers(0, 3)))]
    offsets = {n: random.normal(0, random.choice([0.0, 0.05]), 2) for n in range(count)}
    fails = {n: int(random.integers(1, 3)) for n in range(count) if random.random() < 0.1}
    options = {"learns": learns, "diverges": diverges, "offsets": offsets, "fails": fails}
    search = Simulated(means, seed=seed, beyond=beyond, **options)
    choice = search.run(budget)
    trained = [rungs for number, first in enumerate(search.scores) for rungs in (first, *search.repeats[number])]
    assert search.spent == sum(units_of(len(rungs)) for rungs in trained) <= budget.units
    assert all(len(of_seeds) < budget.seeds for of_seeds in search.repeats)
    assert choice.candidate in choice.tied
    assert (choice.undecided is None) == (len(choice.tied) == 1 and has_won(search.scores, choice))
    sound = [number for number, rungs in enumerate(search.scores) if not has_failed(rungs, search.repeats[number])]
    if sound:
        assert set(choice.tied) <= set(sound)
    if any(search.scores[number][-1].learned for number in sound):
        assert search.scores[choice.candidate][-1].learned
    # From the same scores the same choice follows, in whatever order the candidates are listed.
    order = random.permutation(len(search.scores))
    scores, repeats = [search.scores[n] for n in order], [search.repeats[n] for n in order]
    moved = next_move(scores, [search.places[n] for n in order], budget, repeats=repeats)
    assert isinstance(moved, Choice)
    assert [int(order[n]) for n in moved.tied] == list(choice.tied)
    assert (int(order[moved.candidate]), moved.seeds) == (choice.candidate, choice.seeds)


def has_won(scores, choice):
    rungs = scores[choice.candidate]
    return bool(rungs) and not has_failed(rungs) and rungs[-1].learned


def test_out_is_out_whoever_joins():
    """A new candidate never brings back one that another is better than."""
    random = np.random.default_rng(1)
    scores = [RungScore(random.gamma(mean, 1, 60), learned=True) for mean in random.uniform(1, 2, 12)]
    for size in range(2, 12):
        before = {n for n in range(size) if not any(is_out([scores[n]], [other]) for other in scores[:size])}
        after = {n for n in range(size + 1) if not any(is_out([scores[n]], [other]) for other in scores[: size + 1])}
        assert before
        assert after - {size} <= before


def test_a_false_elimination_is_as_rare_as_the_interval_says():
    """Two equal candidates: each is called worse in about 2.5% of studies."""
    random = np.random.default_rng(0)
    pairs = [[RungScore(random.normal(0, 1, 50), learned=True) for _ in range(2)] for _ in range(2000)]
    share = np.mean([is_worse([one], [other]) for one, other in pairs])
    assert 0.018 < share < 0.035


LABELS = np.repeat(np.arange(10), [61, *[5] * 3, *[4] * 6])


def learned(predictions, weights=None):
    """As a search asks it; weights are those of the classes."""
    hits = np.bincount(LABELS[predictions == LABELS], minlength=10)
    return beats_constant(hits, np.bincount(LABELS), np.ones(10) if weights is None else weights)


def test_always_naming_the_largest_class_is_not_learning():
    assert not learned(np.zeros(100, int))
    assert learned(LABELS)
    by_luck = np.zeros(100, int)
    by_luck[61] = 1  # one image more than the largest class: within its uncertainty
    assert not learned(by_luck)
    assert not learned(np.full(100, 3))
    assert not beats_constant(np.array([]), np.array([], int), np.array([]))


def test_where_classes_count_alike_one_can_learn_below_the_share_of_the_largest():
    """Right of half of the images of every class: 50% where one class has 61%."""
    half = np.where(np.arange(100) % 2, LABELS, (LABELS + 1) % 10)
    even = 1 / np.bincount(LABELS)
    assert not learned(half)
    assert learned(half, even)
    assert not learned(np.zeros(100, int), even)
    assert not learned(np.full(100, 3), even)


def test_rungs_are_as_long_as_the_cycles_of_a_training():
    from pipeline.config.training import TrainSettings
    from pipeline.training.optimizer import cycle_ends

    ends = cycle_ends(TrainSettings(epochs=15, first_cycle_epochs=1), 7)
    assert ends == tuple(7 * units_of(rungs) for rungs in range(1, 5))
    assert [b - a for a, b in itertools.pairwise((0, *ends))] == [7 * rung_units(rung) for rung in range(4)]
