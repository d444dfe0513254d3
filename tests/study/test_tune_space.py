"""What a space allows is known before anything is launched: on a real dataset's manifest, without Spark."""

import sys
from importlib.util import find_spec

import pytest
from small_manifests import trainable

from pipeline.config import SettingsError
from pipeline.config.identity import identity_of
from pipeline.config.settings import Settings
from pipeline.driver.record import unfinished_record
from pipeline.study import trainable as trainable_values
from pipeline.study.tuning import job
from pipeline.study.tuning.space import (
    check_space,
    combinations,
    grid_of,
    is_whole,
    trial_settings,
    values_of,
    winner_settings,
)

MANIFEST = trainable()


def settings(space, **sections):
    tree = {"name": "x", "train": {"batch_size": 32, "lanes": 4}, "workers": {"count": 2}, "tune": {"space": space}}
    return Settings.model_validate({**tree, **sections})


def parameters(space):
    return settings(space).tune.space


def test_a_range_is_of_whole_numbers_where_its_setting_takes_no_others():
    ranges = parameters({
        "train.epochs": {"low": 1, "high": 3}, "train.weight_decay": {"low": 0, "high": 1},
        "train.momentum": {"low": 0.1, "high": 0.5, "step": 0.1}, "model.depth": {"low": 2, "high": 8, "step": 3},
    })  # fmt: skip
    assert {name: is_whole(name, each) for name, each in ranges.items()} == {
        "train.epochs": True, "train.weight_decay": False, "train.momentum": False, "model.depth": True,
    }  # fmt: skip
    assert values_of("train.epochs", ranges["train.epochs"]) == [1, 2, 3]
    assert values_of("train.momentum", ranges["train.momentum"]) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert values_of("model.depth", ranges["model.depth"]) == [2, 5, 8]


def test_combinations_leave_out_what_does_not_apply():
    space = parameters({
        "model.norm_momentum": {"choices": [0.1, 0.2], "when": {"model.norm_scale": "learned"}},
        "model.norm": ["none", "batch"],
        "model.norm_scale": {"choices": ["learned", "off"], "when": {"model.norm": "batch"}},
    })  # fmt: skip
    assert grid_of(space) == [
        {"model.norm": "none"},
        {"model.norm": "batch", "model.norm_scale": "learned", "model.norm_momentum": 0.1},
        {"model.norm": "batch", "model.norm_scale": "learned", "model.norm_momentum": 0.2},
        {"model.norm": "batch", "model.norm_scale": "off"},
    ]
    assert len(list(combinations(space, {name: [1] for name in space}))) == 1  # no condition holds


def test_a_trial_is_evaluated_on_the_split_that_chooses():
    base = settings(
        {"train.learning_rate": [0.1]}, train={"batch_size": 32, "lanes": 4, "final_network": "lowest_loss"}
    )
    made = trial_settings(base, {"train.learning_rate": 0.1}, seed=5)
    assert (made.train.evaluate_on, made.train.final_network, made.train.seed) == ("validation", "last", 5)


def test_a_space_that_can_be_trained_passes():
    check_space(settings({"model.norm": ["none", "batch"], "train.learning_rate": {"low": 0.1, "high": 1}}), MANIFEST)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "tune.space is empty: name settings with the values to try"),
        ({"train.batch_size": ["auto", 32]}, "tune.space.train.batch_size has auto, which the dataset decides"),
        (
            {"model.norm": ["none", "batch"], "train.momentum": {"low": 0.5, "high": 1.5}},
            r"tune\.space: train\.momentum=1\.5 cannot be used: train\.momentum: .*less",
        ),
        ({"train.learning_rate": [0.1, -1]}, r"train\.learning_rate=-1 cannot be used: train\.learning_rate: .*got -1"),
        ({"train.batch_size": {"low": 16, "high": 64}}, r"train\.batch_size=17 cannot be used: .*multiple of lanes 4"),
        ({"model.norm": ["batch", "bach"]}, r"model\.norm=bach cannot be trained: .*batch"),
        ({"train.batch_size": [32, 4000]}, r"train\.batch_size=4000 cannot be trained: .*4000"),
        (
            {"train.cuda_graphs": [False, True], "train.learning_rate": [0.1, 0.2]},
            r"tune\.space: train\.cuda_graphs=True cannot be used: .*cuda_graphs is for one worker",
        ),
        (
            {"model.norm": ["batch", "group"], "model.norm_groups": [2, 3], "train.learning_rate": [0.1]},
            r"model\.norm=group with model\.norm_groups=3 cannot be trained: .*3",
        ),
    ],
)
def test_what_cannot_be_trained_is_named_before_launch(space, message):
    with pytest.raises(SettingsError, match=message) as caught:
        check_space(settings(space), MANIFEST)
    assert "\n" not in str(caught.value)


def test_of_a_large_space_every_pair_is_checked(monkeypatch):
    seen = []
    monkeypatch.setattr(trainable_values, "check_dataset", lambda made, _: seen.append(made.train))
    names = ("learning_rate", "momentum", "weight_decay", "label_smoothing", "shuffle_row_groups")
    values = {f"train.{name}": [1, 2, 3, 4] if name == "shuffle_row_groups" else [0.1, 0.2, 0.3, 0.4] for name in names}
    check_space(settings({**values, "train.batch_size": [32, 64]}), MANIFEST)
    assert len(seen) < 4**5
    for one in names:
        for other in names:
            pairs = {(getattr(made, one), getattr(made, other)) for made in seen}
            assert len(pairs) == (4 if one == other else 16)


def test_what_is_wrong_without_the_space_is_not_said_of_it():
    lanes = settings({"model.norm": ["none", "batch"]}, train={"batch_size": 32, "lanes": 8})
    with pytest.raises(SettingsError, match=r"^dataset x: split 'train' has 4 row groups, fewer than train\.lanes 8"):
        check_space(lanes, MANIFEST)
    missing = settings({"model.norm": ["none", "batch"]})
    with pytest.raises(ValueError, match="no split 'validation'"):
        check_space(missing, trainable("train"))


def test_the_split_that_judges_at_the_end_is_checked_before_launch(monkeypatch):
    launched = []
    monkeypatch.setattr(job, "check_trial", lambda spark, made, manifest: launched.append(made))
    base, manifest = settings({"train.learning_rate": [0.1, 0.2]}), trainable("train", "validation")
    with pytest.raises(
        SettingsError, match=r"train\.evaluate_on 'test'.*no split 'test'.*tune\.confirm to 0"
    ) as caught:
        job._check(None, base, manifest)
    assert "\n" not in str(caught.value)
    assert not launched
    unconfirmed = base.model_copy(update={"tune": base.tune.model_copy(update={"confirm": 0})})
    job._check(None, unconfirmed, manifest)  # nothing is evaluated there
    job._check(None, base, MANIFEST)
    assert [made.train.evaluate_on for made in launched] == ["validation"] * 2
    made = winner_settings(base, {"train.learning_rate": 0.2}, seed=7)
    assert (made.train.evaluate_on, made.train.seed, made.train.learning_rate) == ("test", 7, 0.2)


def test_a_search_that_has_ended_goes_on_where_its_limit_was_raised(tmp_path):
    """Else the same command is a new search; another space always is."""

    def found(**tune):
        base = settings({"train.learning_rate": [0.1, 0.2]}, output=str(tmp_path))
        return job._find_record(
            base.model_copy(update={"tune": base.tune.model_copy(update={"trials": 3, **tune})}), MANIFEST
        )

    record = found()
    search = job._open_search(settings({"train.learning_rate": [0.1, 0.2]}, output=str(tmp_path)), record)
    for _ in range(3):
        search.tell(search.ask().number, "complete", 0.5, images=10, search_seconds=5.0)
    assert found(trials=4).folder == record.folder  # it has not ended
    with record.claim("x"):
        record.update(run_id="r", result="tune.json")
    assert found().folder == f"{record.folder}-2"
    assert found(images=30, trials=4).folder == f"{record.folder}-2"
    more = found(trials=4)
    assert more.folder == record.folder
    with more.claim("x"):
        more.update(result=None)
        assert not more.finished
    assert found().folder == record.folder  # killed meanwhile, and no limit holds it back: it confirms again
    assert found(seed=1).folder != record.folder


def test_other_weights_in_the_same_file_are_another_search(tmp_path):
    """Where the file lies is no part of it, and a search without weights has the identity that it had before."""

    def found(paths=(), **model):
        space = {"model.weights": [None, *map(str, paths)]} if paths else {"train.learning_rate": [0.1, 0.2]}
        return job._find_record(settings(space, output=str(tmp_path / "out"), model=model), MANIFEST).folder

    def write(path, content):
        path.write_bytes(content)
        return str(path)

    path = tmp_path / "w.safetensors"
    first, varied = found(weights=write(path, b"one")), found([path])
    assert found(weights=write(tmp_path / "moved.safetensors", b"one")) == first
    write(path, b"other")
    assert found(weights=str(path)) != first
    assert found([path]) != varied
    write(path, b"one")
    assert (found(weights=str(path)), found([path])) == (first, varied)
    base = settings({"train.learning_rate": [0.1, 0.2]}, output=str(tmp_path / "out"))
    sections = {name: identity_of(name, getattr(base, name)) for name in ("model", "train", "reader")}
    parts = {**sections, "tune": identity_of("tune", base.tune, exclude=job._LIMITS), "dataset": MANIFEST.digest}
    assert found() == unfinished_record(str(tmp_path / "out" / "studies"), "x", parts).folder


@pytest.mark.skipif(find_spec("cmaes") is not None, reason="the package cmaes is installed")
def test_without_cmaes_the_package_is_named():
    with pytest.raises(ValueError, match=r"tune\.sampler cmaes needs the package cmaes: pip install 'cmaes>=0\.12'"):
        job._require_optuna("cmaes")


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "pipeline.study.tuning.sampling", raising=False)
    with pytest.raises(ValueError, match=r"tune needs the package optuna: pip install 'sparknorm\[tune\]'"):
        job._require_optuna()
