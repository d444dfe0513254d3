"""`register`: a trained network becomes a version of a registered model, and the champion if the gate lets it pass.

The same call after one that was killed goes on where that was: a version is found by the training that it is of.
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.config.registry import check_model_name
from pipeline.config.settings import Settings, SettingsError
from pipeline.report.registration import Decision, GateReport, Registration, TrainingOrigin
from pipeline.serving import aliases
from pipeline.serving.aliases import CHALLENGER, CHAMPION, DECISION, DONE, HISTORY, PENDING, ROLLED_BACK, STATUS
from pipeline.storage.writable import prepare_output

if TYPE_CHECKING:
    from pipeline.serving.predictor import Predictor
    from pipeline.serving.winner import Candidate
    from pipeline.tracking.registry import Registry, Version
    from pipeline.tracking.served_model import PackagedModel

FILE, PAGE = "register.json", "register.html"
_TRAINING = "sparknorm.training"


def register(settings: Settings) -> Registration:
    """Register the winner of a comparison or the newest training, hold it against the champion, and write
    ``register.json`` and ``register.html`` into the output folder.

    Registering the same training again makes no second version; the gate is asked anew. One call at a time is at a
    registered model, wherever it runs: another one waits for its end.

    Raises
    ------
    SettingsError
        The name of the registered model cannot be one.
    ExportError, NetworkError, CheckpointError, VersionsError
        There is no such training, or its network cannot be loaded or written as a file; nothing was registered.
    RegistryError
        The dataset has no images of ``registry.split``, the champion has other classes or another image shape than the
        dataset, or is no model of sparknorm, or another call is at the model for longer than
        ``registry.wait_seconds``; nothing was registered. Or this process stood still for so long that another one has
        gone on with the model, or somebody moved the champion meanwhile: the next call finishes what was begun.
    TrackingError
        MLflow was down for ``tracking.outage_seconds``, or refuses a call. What was begun is finished by the next call.
    """
    from pipeline.serving.gate import check_split, gate_split
    from pipeline.serving.winner import find_candidate
    from pipeline.tracking.registry import Registry

    name = _begin(settings)
    candidate = find_candidate(settings)
    check_split(candidate.trained.manifest, gate_split(candidate.trained, settings.registry))
    registry = Registry(settings.tracking, settings.registry.uri, name)
    with tempfile.TemporaryDirectory() as local:
        packaged = None if _versions(registry, candidate) else _package(candidate, Path(local))
        registry.create()  # a claim is a tag of it
        with _claimed(registry, settings):
            return _register(registry, candidate, packaged, settings)


def _register(
    registry: Registry, candidate: Candidate, packaged: PackagedModel | None, settings: Settings
) -> Registration:
    """Register a candidate while no other call is at the model.

    packaged : its model, where no version was found of it before
    """
    champion = registry.holder(CHAMPION)
    loaded, notes = _load_champion(registry, champion, candidate)
    known = _versions(registry, candidate)
    version = known[0] if known else _add(registry, candidate, packaged, settings)
    if settled := _settled(registry, version, champion, candidate.origin, gated=settings.registry.gate):
        return _publish(registry, settings, settled)
    if champion is None or champion.number != version.number:
        registry.set_alias(CHALLENGER, version.number)
    gate = _ask_gate(registry, candidate, version, champion, loaded, settings)
    decision, why = _decide(gate, settings, is_first=champion is None)
    decided = {DECISION: decision, HISTORY: aliases.history(version, _event(decision, why)), **_tags_of(gate)}
    if decision == "rejected":
        registry.tag(version.number, {**decided, STATUS: DONE})
    else:
        aliases.promote(registry, version, champion, decided)
    made = _registration(registry, version, decision, why, before=champion, origin=candidate.origin, gate=gate)
    return _publish(registry, settings, made.model_copy(update={"is_new": not known, "notes": tuple(notes)}))


def rollback(settings: Settings) -> Registration:
    """Let the champion before take the champion's place again, and write ``register.json`` and ``register.html``.

    A second rollback undoes the first.

    Raises
    ------
    RegistryError
        There is no such model, no champion, or none before it; or another call is at it for longer than
        ``registry.wait_seconds``.
    TrackingError
        MLflow was down for ``tracking.outage_seconds``, or refuses a call.
    """
    from pipeline.tracking.registry import Registry

    name = _begin(settings)
    registry = Registry(settings.tracking, settings.registry.uri, name)
    registry.model_tags()  # raises where there is no such model
    with _claimed(registry, settings):
        fallen, back = aliases.roll_back(registry)
        why = (f"Version {back.number} is the champion again; version {fallen.number} has the alias previous.",)
        made = _publish(registry, settings, _registration(registry, fallen, "rolled back", why, before=fallen))
        aliases.end_rollback(registry, fallen)
    return made


def model_name(settings: Settings) -> str:
    """The name of the registered model.

    Raises
    ------
    SettingsError
        It is that of the study, which cannot be one.
    """
    try:
        return settings.registry.model or check_model_name(settings.name)
    except ValueError as error:
        raise SettingsError(f"name {error}; or set registry.model") from None


def _begin(settings: Settings) -> str:
    """The name of the registered model. What an earlier call has left is removed: if this one fails, it must not look
    like its own."""
    name = model_name(settings)
    prepare_output(settings.output, FILE, PAGE)
    return name


def _load_champion(
    registry: Registry, champion: Version | None, candidate: Candidate
) -> tuple[Predictor | None, list[str]]:
    """The champion's model, which can be held against the candidate; before anything is registered."""
    from pipeline.serving.gate import check_fits, load_version

    if champion is None:
        return None, []
    loaded = load_version(registry, champion)
    return loaded, check_fits(registry.model, champion.number, loaded, candidate.trained.manifest)


def _claimed(registry: Registry, settings: Settings) -> AbstractContextManager[None]:
    from pipeline.serving.claim import claimed

    outage_seconds = settings.tracking.outage_seconds
    return claimed(registry, wait_seconds=settings.registry.wait_seconds, outage_seconds=outage_seconds)


def _versions(registry: Registry, candidate: Candidate) -> list[Version]:
    """Those that the candidate's training has, the newest first."""
    return registry.versions(_TRAINING, candidate.origin.training, run_id=candidate.origin.run_id)


def _package(candidate: Candidate, local: Path) -> PackagedModel:
    """The candidate's model in a folder of a local disk."""
    from pipeline.serving.packaging import package

    return package(candidate.trained, candidate.settings, candidate.origin.training, local)[0]


def _add(registry: Registry, candidate: Candidate, packaged: PackagedModel | None, settings: Settings) -> Version:
    """A new version with the candidate's model, whose status is pending."""
    from pipeline.tracking.registry import RegistryError
    from pipeline.tracking.served_model import log_served_model

    if packaged is None:
        raise RegistryError(f"somebody has just deleted the training's version of {registry.model}: run register again")
    origin = candidate.origin
    model_id = log_served_model(packaged, settings.tracking.outage_seconds, registered=registry.model)
    facts = {f"sparknorm.{name}": str(value) for name, value in origin.model_dump(exclude_none=True).items()}
    return registry.add(model_id, {STATUS: PENDING, **facts}, _description(origin))


def _description(origin: TrainingOrigin) -> str:
    lines = [origin.why, f"Network {origin.network}, norm {origin.norm}, seed {origin.seed}; run {origin.run_id}."]
    if origin.comparison_run:
        lines.append(f"Comparison: run {origin.comparison_run}; report {origin.comparison_report}.")
    return "\n\n".join([*lines, f"Dataset {origin.dataset}, {origin.dataset_digest}."])


def _settled(
    registry: Registry, version: Version, champion: Version | None, origin: TrainingOrigin, *, gated: bool
) -> Registration | None:
    """What there is to say of a version about which nothing is to be decided; what was begun of it is finished.

    gated : whether what a person has taken back stays so
    """
    if champion is not None and champion.number == version.number:
        begun = version.tags.get(STATUS) != DONE
        aliases.finish_promotion(registry, version)
        what = "An earlier call had made it the champion, and is finished now." if begun else "It is the champion."
        return _registration(registry, version, "unchanged", (what,), before=champion, origin=origin)
    if gated and version.tags.get(DECISION) == ROLLED_BACK:
        what = "It was rolled back, so it does not become the champion again unless registry.gate is false."
        return _registration(registry, version, "unchanged", (what,), before=champion, origin=origin)
    return None


def _ask_gate(
    registry: Registry,
    candidate: Candidate,
    version: Version,
    champion: Version | None,
    loaded: Predictor | None,
    settings: Settings,
) -> GateReport:
    """Hold the version, as it is downloaded from the registry, against the champion."""
    from pipeline.serving.gate import load_version, run_gate

    challenger = version.number, load_version(registry, version)
    other = (champion.number, loaded) if champion is not None and loaded is not None else None
    return run_gate(candidate.trained, challenger, other, settings.registry)


def _decide(gate: GateReport, settings: Settings, *, is_first: bool) -> tuple[Decision, tuple[str, ...]]:
    """The decision, and why."""
    accuracy = f"{100 * gate.challenger.accuracy:.2f}% of {gate.images:,} images of {gate.split} right"
    if not gate.passes:
        if settings.registry.gate:
            return "rejected", gate.reasons
        return "forced", ("registry.gate is false, so it need not pass.", *gate.reasons)
    if is_first or gate.champion is None:
        return "first", (f"There was no champion, and it has learned: {accuracy}.",)
    against = f"{100 * gate.champion.accuracy:.2f}% of version {gate.champion.version}"
    return "promoted", (f"{accuracy}, against {against} (McNemar's p = {gate.p_value:.2g}).",)


def _event(decision: str, why: tuple[str, ...]) -> str:
    return f"{decision}: {' '.join(why)}"[:1000]


def _tags_of(gate: GateReport) -> dict[str, str]:
    """The gate's figures, for who looks at the version in MLflow."""
    values = {
        "images": gate.images, "split": gate.split, "accuracy": f"{gate.challenger.accuracy:.6f}",
        "milliseconds": f"{gate.challenger.milliseconds:.3f}",
    }  # fmt: skip
    if gate.champion is not None:
        values |= {
            "champion": gate.champion.version, "champion_accuracy": f"{gate.champion.accuracy:.6f}",
            "mcnemar_p": f"{gate.p_value:.4g}", "latency_ratio": f"{gate.latency_ratio:.3f}",
        }  # fmt: skip
    return {f"sparknorm.gate.{name}": str(value) for name, value in values.items()}


def _registration(
    registry: Registry,
    version: Version,
    decision: Decision,
    why: tuple[str, ...],
    *,
    before: Version | None,
    origin: TrainingOrigin | None = None,
    gate: GateReport | None = None,
) -> Registration:
    now = aliases.aliases_of(registry)
    return Registration(
        model=registry.model,
        version=version.number,
        is_new=False,
        decision=decision,
        why=why,
        champion=now.get(CHAMPION),
        champion_before=None if before is None else before.number,
        aliases=now,
        uri=f"{registry.address}@{CHAMPION}" if CHAMPION in now else None,
        origin=origin,
        gate=gate,
    )


def _publish(registry: Registry, settings: Settings, made: Registration) -> Registration:
    """Write the page, also to the training's run in MLflow, and the result."""
    from pipeline.report.registration_page import render_registration

    page = render_registration(made)
    storage.publish(storage.join(settings.output, PAGE), page.encode())
    if made.origin is not None:
        registry.attach(made.origin.run_id, f"registration/{registry.model}-{made.version}.html", page)
    storage.publish_json(storage.join(settings.output, FILE), made)
    return made
