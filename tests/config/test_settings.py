import pytest

from pipeline.config import Settings
from pipeline.config.settings import digest_of


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings(name="x").train.epochs = 3


def test_digest_depends_on_values_and_not_on_order():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of(Settings(name="x")) != digest_of(Settings(name="y"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"batch_size": 96, "accumulate": 5}, "workers": {"count": 2}},
            r"train\.accumulate 5 does not divide a worker's 48 images of a batch: use one of \[1, 2, 3, 4, 6, 8, 12,",
        ),
        (
            {
                "train": {"batch_size": 96, "accumulate": 3},
                "workers": {"count": 2},
                "model": {"norm_statistics": "lane"},
            },
            r"a worker's 8 lanes, and model\.norm_statistics lane needs whole ones: use one of \[1, 2, 4, 8\]",
        ),
        (
            {"dataset": {"validation_share": 0.5, "test_share": 0.5}},
            "leave no training rows: their sum must be below 1",
        ),
        ({"dataset": {"seed": 1 << 63}}, r"dataset\.seed\n.*should be less than 9223372036854775808"),  # Spark's long
    ],
)
def test_numbers_that_do_not_fit_say_which_would(sections, message):
    with pytest.raises(ValueError, match=message):
        Settings.model_validate({"name": "x", **sections})
