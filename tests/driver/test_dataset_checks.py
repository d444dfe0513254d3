"""What is said of a dataset before training: classes that cannot be measured, splits that are too small."""

import math

import pytest

from pipeline.config import load_settings
from pipeline.data.manifest import DatasetError, Image, Manifest, Split
from pipeline.driver.dataset_checks import check_classes, check_comparison, one_seed, small_dataset, smallest_difference


def make(**label_counts) -> Manifest:
    """A manifest of these splits; classes are a, b, c."""
    splits = {
        name: Split(rows=sum(counts), label_counts=counts, pixel_sums=((0,), (0,)), mean=(0.5,), std=(0.2,), shards=())
        for name, counts in label_counts.items()
    }
    return Manifest(
        name="pets", settings_digest="", spark_application="", classes=("a", "b", "c"), input_rows=0, set_aside={},
        sources=(), splits=splits, image=Image(encoding="raw", shape=(1, 4, 4)),
    )  # fmt: skip


GOOD = {"train": (900, 50, 50), "validation": (90, 5, 5), "test": (90, 5, 5)}


@pytest.mark.parametrize("compared", [True, False])
def test_nothing_is_said_of_a_dataset_that_can_be_measured(compared):
    assert check_classes(make(**GOOD), "test", compared=compared) == []


@pytest.mark.parametrize("compared", [True, False])
def test_one_class_alone(compared):
    manifest = make(**{**GOOD, "train": (0, 1000, 0)})
    with pytest.raises(DatasetError, match=r"dataset pets: split 'train' has images of one class alone, 'b'"):
        check_classes(manifest, "test", compared=compared)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((90, 10, 0), r"split 'test' has fewer than 2 images of 'c' \(0\), which split 'train' has; .*of it cannot be"),
        ((98, 1, 1), r"fewer than 2 images of 'b' \(1\), 'c' \(1\).*leave them out, or a larger dataset\.test_share"),
        ((10, 10, 9), r"split 'test' has 29 images, and below 30 an accuracy says nothing: .*dataset\.test_share"),
    ],
)  # fmt: skip
def test_an_evaluated_split_that_cannot_measure_is_an_error_of_a_comparison_and_a_warning_of_a_training(counts, words):
    manifest = make(**{**GOOD, "test": counts})
    with pytest.raises(DatasetError, match=words):
        check_classes(manifest, "test", compared=True)
    (sentence,) = check_classes(manifest, "test", compared=False)
    with pytest.raises(DatasetError, match=words):
        raise DatasetError(sentence)


def test_a_class_that_nothing_is_trained_on_need_not_be_measured():
    assert check_classes(make(**{**GOOD, "train": (900, 100, 0), "test": (90, 10, 0)}), "test", compared=True) == []


def test_a_split_that_chooses_is_warned_of_where_it_chooses():
    settings, manifest = load_settings("conf/quickstart.yaml"), make(**{**GOOD, "validation": (99, 1, 0)})
    (sentence,) = check_comparison(settings, manifest, chooses=True)
    assert "split 'validation' has fewer than 2 images of 'b' (1), 'c' (0)" in sentence
    assert "a larger dataset.validation_share" in sentence
    assert check_comparison(settings, manifest, chooses=False) == []


def test_many_classes_are_not_all_named():
    classes = tuple(f"class {number}" for number in range(12))
    manifest = make(train=(90,) * 12, test=(0,) * 4 + (50,) + (1,) * 7).model_copy(update={"classes": classes})
    (sentence,) = check_classes(manifest, "test", compared=False)
    assert "'class 0' (0), 'class 1' (0), 'class 2' (0), 'class 3' (0), 'class 5' (1) and 6 other classes" in sentence


def test_a_small_dataset_says_what_its_test_split_can_show():
    manifest = make(train=(500, 100, 100), validation=(60, 20, 20), test=(60, 20, 20))
    (sentence,) = check_classes(manifest, "test", compared=True)
    assert sentence.startswith("Dataset pets has 900 images, 100 of them in the test split")
    assert "below 8.8 points (1.96 sqrt(2 x 0.1 / 100)" in sentence
    assert small_dataset(make(train=(500, 100, 100), test=(100, 100, 100)), "test") == []


def test_the_smallest_difference_is_that_of_the_binomial():
    """A simulation: two networks that are each right alone on a tenth of the images differ by chance this much."""
    import numpy as np

    random, rows = np.random.default_rng(0), 400
    outcome = random.random((20_000, rows))
    difference = ((outcome < 0.1).sum(1) - (outcome > 0.9).sum(1)) / rows
    assert np.mean(np.abs(difference) < smallest_difference(rows)) == pytest.approx(0.95, abs=0.01)
    assert smallest_difference(rows) == pytest.approx(1.96 * math.sqrt(0.2 / 400))


def test_one_seed_says_nothing_of_chance():
    (sentence,) = one_seed(load_settings("conf/quickstart.yaml", ["compare.seeds=[7]"]))
    assert sentence.startswith(
        "compare.seeds has one seed, 7: nothing can be said about how much of a difference is chance"
    )
    assert one_seed(load_settings("conf/quickstart.yaml", ["compare.seeds=[0, 1]"])) == []
