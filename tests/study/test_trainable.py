"""Values that a comparison's arms may choose are checked before anything is launched: on a manifest, without Spark."""

import pytest
from small_manifests import trainable

from pipeline.config import SettingsError
from pipeline.config.settings import Settings
from pipeline.study import job
from pipeline.study import trainable as module
from pipeline.study.arms import arms_of, candidates_of

MANIFEST = trainable()


@pytest.fixture
def check(monkeypatch):
    """Check a grid as `compare` does, without its look at Spark; a function of the grid and what of it is tuned."""
    monkeypatch.setattr(job, "check_trial", lambda spark, made, manifest: manifest)

    def check(grid, tune, **model):
        tree = {"train": {"batch_size": 32, "lanes": 4, "epochs": 20}, "workers": {"count": 2}, "model": model}
        settings = Settings.model_validate({"name": "x", **tree, "compare": {"grid": grid, "tune": tune}})
        return job._check(None, settings, MANIFEST, arms_of(settings), candidates_of(settings))

    return check


@pytest.mark.parametrize(
    ("grid", "tune", "message"),
    [
        (
            {"model.norm": ["none", "group"], "model.norm_groups": [4, 3]},
            ["model.norm_groups"],
            r"compare\.grid: model\.norm_groups=3 of the arm 'group' cannot be trained: .*3 does not divide",
        ),
        (
            {"model.norm": ["group"], "model.norm_groups": [4, 3], "train.learning_rate": [0.1, 0.2]},
            ["model.norm_groups", "train.learning_rate"],
            r"model\.norm_groups=3 with train\.learning_rate=0\.1 of the arm 'group' cannot be trained",
        ),
        (
            {"model.norm": ["batch"], "train.augment.shift": [1, 100]},
            ["train.augment.shift"],
            r"train\.augment\.shift=100 of the arm 'batch' cannot be trained: .*at most 15",
        ),
        (
            {"model.norm": ["batch"], "train.batch_size": [32, 4000]},
            ["train.batch_size"],
            r"train\.batch_size=4000 of the arm 'batch' cannot be trained: .*4000",
        ),
        (
            {"model.norm": ["group"], "model.norm_groups": [3]},
            ["model.norm_groups"],
            r"model\.norm_groups=3 of the arm 'group' cannot be trained",
        ),
    ],
)
def test_a_value_that_an_arm_cannot_be_trained_with_is_named_before_launch(check, grid, tune, message):
    with pytest.raises(SettingsError, match=message) as caught:
        check(grid, tune)
    assert "\n" not in str(caught.value)


def test_each_network_is_built_once_and_only_so_many(check, monkeypatch):
    built = []
    monkeypatch.setattr(module, "check_network", lambda made, manifest: built.append(made.model.width))
    searches, _ = check(
        {"model.norm": ["none", "batch"], "model.width": [4, 8], "train.learning_rate": [0.1, 0.2]},
        ["model.width", "train.learning_rate"],
    )
    assert [len(search.candidates) for search in searches] == [4, 4]
    assert built == [4, 8] * 2
    built.clear()
    check({"model.norm": ["batch"], "model.width": list(range(1, 101))}, ["model.width"])
    assert built == list(range(1, module.MOST_NETWORKS + 1))
