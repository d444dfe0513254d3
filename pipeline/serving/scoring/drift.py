"""What has moved since the training: compared, drawn, and left in MLflow and beside the scores."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.config.settings import Settings
from pipeline.data import Manifest
from pipeline.data.profile import Profile
from pipeline.report.drift import Drift, drift_of
from pipeline.serving.scoring.model import PackedModel
from pipeline.serving.scoring.parts import reference_of
from pipeline.serving.scoring.result import ScoreResult

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.tracking.run import TrackedRun

PAGE, PICTURE = "score.html", "drift.png"


def compared(
    spark: SparkSession, settings: Settings, model: PackedModel, manifest: Manifest | None, profile: Profile
) -> tuple[Drift | None, list[str]]:
    """What was scored, compared with the dataset that the model was trained on; and what was not compared, and why."""
    where = settings.dataset.path
    if not settings.score.reference_images:
        return None, ["nothing was compared with the training: score.reference_images is 0"]
    if manifest is None:
        return None, [f"nothing was compared with the training: dataset.path {where} has no dataset"]
    if not profile.images:
        return None, ["nothing was compared with the training: no image was scored"]
    notes = []
    if manifest.digest != model.facts.dataset_digest:
        notes.append(
            f"the model was trained on another version of {manifest.name} ({model.facts.dataset_digest[:15]}...) than "
            f"dataset.path has ({manifest.digest[:15]}...), with which this is compared"
        )
    reference = reference_of(spark, settings, model, manifest, storage.absolute(where))
    drift = drift_of(
        profile,
        images=reference.images,
        images_of=reference.images_of,
        answers=reference.answers,
        answers_of=reference.answers_of,
        classes=model.served.classes,
    )
    return drift, notes


def leave(run: TrackedRun, folder: str, result: ScoreResult, profile: Profile | None, *, name: str) -> None:
    """Log the figures, and leave the page and the picture in the run and in the folder of the scores."""
    from pipeline.report.score_page import page_of, picture_of

    values: dict[str, object] = {
        "score.images": result.images,
        "score.set_aside": sum(result.set_aside.values()),
        "score.version": result.version,
        "score.folder": result.scores,
    }
    if profile is not None and profile.images:
        values["score.confidence"] = profile.confidence_sum / profile.images
    for figure in result.drift.figures if result.drift else ():
        key = figure.name.replace(" ", "_")
        values |= {f"drift.{key}.psi": figure.psi, f"drift.{key}.psi_by_chance": figure.psi_by_chance,
                   f"drift.{key}.js_distance": figure.js_distance}  # fmt: skip
    for channel in result.drift.channels if result.drift else ():
        if math.isfinite(channel.shift):
            values[f"drift.channel_{channel.channel}.shift"] = channel.shift
    run.log_summary(values)
    files = {PAGE: page_of(name, result.model_dump(mode="json"), result.drift, profile).encode()}
    if result.drift is not None:
        files[PICTURE] = picture_of(result.drift)
    run.log_files(None, files)
    for file, content in files.items():
        storage.publish(storage.join(folder, file), content)
