"""A winner becomes a version of a registered model, and the champion if the gate lets it pass; all in a real store."""

import contextlib
import importlib
import json
import random
import shutil
from pathlib import Path

import mlflow
import pytest
import register_driver
from mlflow_server import MlflowServer
from second_driver import second_driver
from small_models import train_network

from pipeline.__main__ import app
from pipeline.config.settings import Settings
from pipeline.config.study import TrackingSettings
from pipeline.driver import train
from pipeline.serving import ExportError, register, registering, rollback
from pipeline.serving.packaging import package
from pipeline.study import compare
from pipeline.tracking.outage import TrackingError
from pipeline.tracking.registry import Registry, RegistryError
from pipeline.tracking.served_model import log_served_model

pytestmark = [pytest.mark.spark, pytest.mark.long]


def changed(settings: Settings, **sections) -> Settings:
    tree = settings.model_dump()
    for name, values in sections.items():
        tree[name] = {**tree[name], **values} if isinstance(values, dict) else values
    return Settings.model_validate(tree)


@pytest.fixture(scope="module")
def trained(spark, dataset, idx_folder, empty_store, tmp_path_factory):
    """Settings of a comparison of two norms with three seeds, and of one training beside it; all have run."""
    from small_data import dataset_settings

    folder = tmp_path_factory.mktemp("trained")
    store = shutil.copy(empty_store, folder / "mlflow.db")
    settings = Settings.model_validate(
        {
            "name": "small",
            "output": str(folder / "runs"),
            "dataset": dataset_settings(Path(dataset), idx_folder).model_dump(),
            "model": {"network": "cnn", "norm": "batch", "depth": 3, "width": 4},
            "train": {"epochs": 2, "batch_size": 32, "lanes": 4, "evaluation_batch_size": 64, "learning_rate": 0.1},
            "workers": {"count": 1},
            "compare": {"grid": {"model.norm": ["none", "batch"]}, "seeds": [0, 1, 2]},
            "tracking": TrackingSettings(
                uri=f"sqlite:///{store}", artifacts=str(folder / "artifacts"), system_metrics=False
            ).model_dump(),
        }
    )
    comparison = compare(spark, settings)
    result = train(spark, changed(settings, train={"seed": 9}))
    return settings, comparison, result


@pytest.fixture
def settings(trained, tmp_path):
    """The same trainings, with a registered model and results of the test's own."""
    name = "m" + "".join(letter for letter in tmp_path.name if letter.isalnum())[-40:]
    return changed(trained[0], registry={"model": name})


def as_train(settings: Settings, **registry) -> Settings:
    return changed(settings, train={"seed": 9}, registry={"take": "train", **registry})


def client(settings: Settings) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(settings.tracking.uri)


def versions(settings: Settings) -> dict[str, dict[str, str]]:
    """The tags of every version."""
    found = client(settings).search_model_versions(f"name='{settings.registry.model}'")
    return {str(each.version): each.tags for each in sorted(found, key=lambda each: int(each.version))}


def aliases(settings: Settings) -> dict[str, int]:
    found = client(settings).get_registered_model(settings.registry.model).aliases
    return {alias: int(number) for alias, number in found.items()}


def test_a_comparisons_winner_becomes_the_first_champion_and_is_registered_once(trained, settings):
    _, comparison, _ = trained
    made = register(settings)
    assert (made.decision, made.version, made.is_new, made.champion_before) == ("first", "1", True, None)
    assert aliases(settings) == {"champion": 1}
    best = max(comparison.arms, key=lambda arm: arm.score_mean)
    runs = sorted((run for run in comparison.runs if run.arm == best.arm), key=lambda run: run.score)
    assert (made.origin.arm, made.origin.run_id) == (best.arm, runs[1].run_id)  # the middle one of three seeds
    assert made.origin.comparison_run == comparison.mlflow.parent_run_id
    # What is served is that training: the gate's accuracy is the one that it ended with.
    assert made.gate.challenger.accuracy == pytest.approx(runs[1].final_accuracy)
    assert made.gate.images == 301
    tags = versions(settings)["1"]
    assert tags["sparknorm.status"] == "done"
    assert tags["sparknorm.decision"] == "first"
    assert tags["sparknorm.dataset_digest"] == comparison.dataset.digest
    assert tags["sparknorm.comparison_report"].endswith("/report.html")
    again = register(settings)
    assert (again.decision, again.version, again.is_new) == ("unchanged", "1", False)
    assert list(versions(settings)) == ["1"]
    page = Path(settings.output, "register.html").read_text()
    assert f"{settings.registry.model}, version 1" in page
    assert json.loads(Path(settings.output, "register.json").read_text())["decision"] == "unchanged"
    stored = client(settings).list_artifacts(runs[1].run_id, "registration")
    assert [each.path for each in stored] == [f"registration/{settings.registry.model}-1.html"]


def test_a_challenger_that_is_not_better_is_rejected_forced_and_rolled_back(settings, capsys):
    register(settings)
    strict = as_train(settings, require="better")
    made = register(strict)
    assert (made.decision, made.version, made.is_new) == ("rejected", "2", True)
    assert any("registry.require is better" in line or "below" in line for line in made.why)
    assert aliases(settings) == {"champion": 1, "challenger": 2}
    gate = made.gate
    assert gate.both_right + gate.only_champion_right + gate.only_challenger_right + gate.neither_right == 301
    assert [each.name for each in gate.classes] == ["flat", "left", "right"]
    forced = register(as_train(settings, require="better", gate=False))
    assert (forced.decision, forced.version, forced.is_new) == ("forced", "2", False)
    assert aliases(settings) == {"champion": 2, "previous": 1}
    back = rollback(settings)
    assert (back.decision, back.version, back.champion) == ("rolled back", "2", "1")
    assert aliases(settings) == {"champion": 1, "previous": 2}
    assert register(as_train(settings)).decision == "unchanged"  # not again what was rolled back
    history = versions(settings)["2"]["sparknorm.history"].splitlines()
    assert [line.split()[1] for line in history] == ["rolled", "forced:", "rejected:"]
    assert rollback(settings).champion == "2"
    assert aliases(settings) == {"champion": 2, "previous": 1}


def test_the_command_says_what_it_did(settings, capsys, tmp_path):
    import yaml

    tree = {**settings.model_dump(mode="json"), "output": str(tmp_path / "out")}
    tree["registry"]["take"] = "train"
    shutil.copytree(Path(settings.output, "trials"), tmp_path / "out" / "trials")
    tree["train"]["seed"] = 9
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    app(["register", "-c", str(tmp_path / "x.yaml")], standalone_mode=False)
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "out" / "register.json")
    assert f"Version 1 of {settings.registry.model} is the first champion." in err
    with pytest.raises(RegistryError, match=r"has the alias 'previous'; aliases: champion \(version 1\)$"):
        rollback(settings)


def test_a_model_of_other_classes_or_shape_is_refused_before_anything_is_registered(settings, tmp_path):
    registry = Registry(settings.tracking, None, settings.registry.model)
    run = client(settings).create_run(client(settings).get_experiment_by_name("sparknorm").experiment_id)
    other = train_network(tmp_path)
    result = other.result.model_copy(update={"run_id": run.info.run_id})
    other = type(other)(other.name, other.network, other.job, other.manifest, other.checkpoint, result)
    packaged, _ = package(other, settings, "other", tmp_path)
    registry.create()
    registry.add(log_served_model(packaged, 5, registered=registry.model), {"sparknorm.training": "other"})
    registry.set_alias("champion", "1")
    with pytest.raises(RegistryError, match=r"the champion, version 1 of \w+, has 3 classes and dataset halves has 3"):
        register(settings)
    assert list(versions(settings)) == ["1"]
    assert aliases(settings) == {"champion": 1}
    assert not Path(settings.output, "register.json").exists()


def test_what_is_not_there_is_said(settings, tmp_path):
    nothing = changed(settings, output=str(tmp_path / "nothing"), registry={"take": "comparison"})
    with pytest.raises(ExportError, match=r"there is no .*/nothing/comparison.json: run `sparknorm compare` with"):
        register(nothing)
    with pytest.raises(ExportError, match=r"has no finished training .*: run `sparknorm train` with the same settings"):
        register(changed(nothing, registry={"take": "train"}))
    with pytest.raises(ExportError, match=r": run `sparknorm compare`, whose winner is registered, or `sparknorm tra"):
        register(changed(nothing, registry={"take": "auto"}))
    with pytest.raises(RegistryError, match=r"there is no registered model '\w+': run `sparknorm register` first"):
        rollback(settings)


def test_a_registry_that_is_down_is_waited_for_and_then_an_error(settings):
    down = {"uri": "http://127.0.0.1:9", "outage_seconds": 1}
    with pytest.raises(TrackingError, match=r"could not list versions at http://127.0.0.1:9 within tracking"):
        register(changed(settings, tracking=down))
    assert not Path(settings.output, "register.json").exists()


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back(trained, settings, tmp_path):
    """A real one, on the store that the trainings are in."""
    server = MlflowServer(tmp_path, trained[0].tracking.uri)
    server.start()
    try:
        through = changed(settings, tracking={"uri": server.uri, "outage_seconds": 1})
        assert register(through).decision == "first"
        server.kill()
        with pytest.raises(TrackingError, match=r"within tracking\.outage_seconds = 1"):
            register(through)
        server.start()
        assert register(through).decision == "unchanged"
        assert list(versions(settings)) == ["1"]
    finally:
        server.kill()


class CutOffError(Exception):
    """The process ends here."""


def cut_off(monkeypatch, calls: int):
    """Let the process end before its next call to MLflow after so many."""
    left = [calls]
    for module in ("pipeline.tracking.registry", "pipeline.tracking.served_model"):
        real = importlib.import_module(module).call_store

        def call_store(what, call, seconds, real=real):
            left[0] -= 1
            if left[0] < 0:
                raise CutOffError(what)
            return real(what, call, seconds)

        monkeypatch.setattr(f"{module}.call_store", call_store)


# Calls to MLflow: a few more than those of two registrations, and of a rollback.
CALLS, ROLLBACK_CALLS = 112, 34


@pytest.mark.parametrize(
    "calls", [pytest.param(n, marks=[] if n in (20, 32) else pytest.mark.slow) for n in range(CALLS + 1)]
)
def test_what_was_cut_off_ends_whole_when_it_is_called_again(settings, monkeypatch, calls):
    """Before every single call to MLflow, of a first champion and of one that takes its place."""
    second = as_train(settings, max_accuracy_drop=0.99, significance=1e-9, max_latency_ratio=None)
    left = [settings, second]
    with monkeypatch.context() as patch:
        cut_off(patch, calls)
        with contextlib.suppress(CutOffError):
            while left:
                register(left[0])
                left.pop(0)
    assert calls < CALLS or not left
    for again in left:
        register(again)
    assert list(versions(settings)) == ["1", "2"]
    assert aliases(settings) == {"champion": 2, "previous": 1}
    found = versions(settings)
    assert {tags["sparknorm.status"] for tags in found.values()} == {"done"}
    assert [found[number]["sparknorm.decision"] for number in "12"] == ["first", "promoted"]


@pytest.mark.parametrize(
    "calls", [pytest.param(n, marks=[] if n == 13 else pytest.mark.slow) for n in range(ROLLBACK_CALLS + 1)]
)
def test_a_rollback_that_was_cut_off_is_finished_and_not_turned_round(settings, monkeypatch, calls):
    register(settings)
    register(as_train(settings, max_accuracy_drop=0.99, significance=1e-9, max_latency_ratio=None))
    with monkeypatch.context() as patch:
        cut_off(patch, calls)
        try:
            ended = bool(rollback(settings))  # also where only its claim is left, which ends by itself
        except CutOffError:
            ended = False
    assert ended or calls < ROLLBACK_CALLS
    if not ended:
        rollback(settings)
    assert aliases(settings) == {"champion": 1, "previous": 2}


# What two calls at once do: which training each registers (or a rollback), and what the gate lets pass.
LENIENT = {"max_accuracy_drop": 0.99, "significance": 1e-9, "max_recall_drop": 1, "max_latency_ratio": None}
STRICT = {"require": "better", "max_latency_ratio": None}
PAIRS = [
    ("comparison", "train", LENIENT),
    ("comparison", "train", STRICT),
    ("train", "train", LENIENT),
    ("rollback", "comparison", LENIENT),
    ("rollback", "rollback", LENIENT),
]


def outcome(settings: Settings) -> tuple[object, ...]:
    """All that two calls leave: who has which alias, and what was decided of each training."""
    run_of = {number: (tags["sparknorm.run_id"], tags) for number, tags in versions(settings).items()}
    assert len({run for run, _ in run_of.values()}) == len(run_of)  # no training has two versions
    assert {tags["sparknorm.status"] for _, tags in run_of.values()} <= {"done"}
    held = {alias: run_of[str(number)] for alias, number in aliases(settings).items()}
    assert held["champion"][1]["sparknorm.decision"] in ("first", "promoted")
    found = client(settings).get_registered_model(settings.registry.model)
    assert [key for key in found.tags if "claim" in key] == []
    decisions = sorted((run, tags["sparknorm.decision"]) for run, tags in run_of.values())
    return sorted((alias, run) for alias, (run, _) in held.items()), decisions


def begin(settings: Settings, name: str, gate: dict, model: str, uri: str) -> tuple[str, Settings]:
    """The call and the settings of one of the two."""
    mine = changed(settings, registry={"model": model, **gate}, tracking={"uri": uri, "outage_seconds": 30})
    return ("rollback", mine) if name == "rollback" else ("register", as_train(mine) if name == "train" else mine)


def prepare(settings: Settings, pair: tuple[str, ...]) -> None:
    """What there has to be before: two champions for a rollback."""
    if "rollback" in pair:
        register(changed(settings, registry={"take": "comparison", **LENIENT}))
        register(as_train(settings, **LENIENT))


@pytest.mark.parametrize(
    ("store", "rounds"),
    [
        ("sqlite", 3),
        ("server", 2),
        pytest.param("sqlite", 20, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
        pytest.param("server", 20, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)
def test_two_at_once_end_as_one_after_the_other(trained, settings, tmp_path, store, rounds):
    """Real processes on a real store, at random moments; each outcome is that of one of the two orders."""
    server = MlflowServer(tmp_path, settings.tracking.uri) if store == "server" else None
    if server:
        server.start()
    uri = server.uri if server else settings.tracking.uri
    expected: dict[int, list[object]] = {}
    program = register_driver.__file__
    draw = random.Random(rounds)
    try:
        with second_driver(program, tmp_path / "one") as one, second_driver(program, tmp_path / "two") as two:
            for number in range(rounds):
                which = number % len(PAIRS)
                *names, gate = PAIRS[which]
                if which not in expected:
                    expected[which] = [_in_turn(settings, order, gate, f"{which}{n}")
                                       for n, order in enumerate((names, names[::-1]))]  # fmt: skip
                model = f"{settings.registry.model}-{number}"
                prepare(changed(settings, registry={"model": model}), PAIRS[which][:2])
                for process, name in zip((one, two), names, strict=True):
                    call, mine = begin(settings, name, gate, model, uri)
                    process.begin(call, mine.model_dump_json(), draw.choice([0.1, 1.0, 3.0]), draw.randrange(1000))
                assert [one.result(), two.result()] == ["", ""], f"round {number}"
                found = outcome(changed(settings, registry={"model": model}))
                assert found in expected[which], f"round {number}"
    finally:
        if server:
            server.kill()


def _in_turn(settings: Settings, names: list[str], gate: dict, suffix: str) -> tuple[object, ...]:
    model = f"{settings.registry.model}-in-turn-{suffix}"
    mine = changed(settings, registry={"model": model})
    prepare(mine, tuple(names))
    for name in names:
        call, made = begin(settings, name, gate, model, settings.tracking.uri)
        (rollback if call == "rollback" else register)(made)
    return outcome(mine)


def test_a_champion_that_somebody_moves_while_the_gate_runs_is_not_overwritten(settings, monkeypatch):
    """As a person can in MLflow, who has no claim."""
    register(settings)
    real = registering._ask_gate

    def ask(registry, *rest):
        report = real(registry, *rest)
        client(settings).delete_registered_model_alias(settings.registry.model, "champion")
        return report

    with monkeypatch.context() as patch:
        patch.setattr(registering, "_ask_gate", ask)
        message = r"version 2 of \w+ was held against version 1, and meanwhile somebody has made none the champion"
        with pytest.raises(RegistryError, match=message):
            register(as_train(settings, **LENIENT))
    assert aliases(settings) == {"challenger": 2}
    assert register(as_train(settings, **LENIENT)).decision == "first"
