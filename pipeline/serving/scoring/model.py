"""The model that scores: found by its name on the driver, checked, and packed for executors."""

from __future__ import annotations

import hashlib
import io
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.settings import Settings
from pipeline.data import Manifest
from pipeline.serving.scoring.errors import ScoreError
from pipeline.serving.scoring.scores import ScoredModel

if TYPE_CHECKING:
    from pipeline.serving.served import ServedModel


@dataclass(frozen=True)
class PackedModel:
    """A model as executors get it.

    facts : what is written down of it
    served : what its folder says of it
    archive : the model folder as an uncompressed zip
    """

    facts: ScoredModel
    served: ServedModel
    archive: bytes

    @property
    def file_name(self) -> str:
        """That of the archive, which no other model has."""
        return f"sparknorm-model-{self.facts.digest.removeprefix('sha256:')[:32]}.zip"


def find_model(settings: Settings) -> PackedModel:
    """The model of ``score.model``.

    Raises
    ------
    ServedModelError, RegistryError
        There is no such model, or it is none of sparknorm's.
    TrackingError
        The registry is down for ``tracking.outage_seconds``.
    """
    from pipeline.serving.predictor import folder_within, read_served
    from pipeline.serving.served import ServedModelError

    uri = settings.score.model or f"models:/{settings.registry.model or settings.name}@champion"
    with tempfile.TemporaryDirectory(prefix="sparknorm-model-") as temporary:
        name, version, run_id = "", "0", ""
        if uri.startswith(("models:/", "runs:/")):
            from pipeline.tracking.fetch import fetch_model

            fetched = fetch_model(settings.tracking, settings.registry.uri, uri, Path(temporary))
            folder, name, version, run_id = fetched.folder, fetched.name, fetched.version, fetched.run_id
        else:
            folder = Path(uri)
        try:
            folder = folder_within(folder)
            served = read_served(folder)
        except ServedModelError as error:
            text = str(error).replace(str(folder), uri)  # the folder may be a passing one
            hint = "; what `register` makes of a run is runs:/RUN/served" if uri.startswith("runs:/") else ""
            raise ServedModelError(f"score.model: {text}{hint}") from error
        archive = _archive(folder)
        facts = ScoredModel(
            uri=uri,
            name=name or served.name,
            version=version if name else served.sha256[:12],
            run_id=run_id or served.mlflow_run,
            digest="sha256:" + hashlib.sha256(archive).hexdigest(),
            dataset_digest=served.dataset.digest,
        )
        return PackedModel(facts, served, archive)


def check_dataset(model: PackedModel, manifest: Manifest, path: str) -> None:
    """Raise ScoreError where a dataset has other classes, or images of another shape, than the model."""
    served, uri = model.served, model.facts.uri
    if tuple(manifest.classes) != served.classes:
        raise ScoreError(
            f"{uri} has the classes {', '.join(served.classes)}, and {path} has {', '.join(manifest.classes)}: choose "
            "a model that was trained on it, or another dataset.path or score.source"
        )
    check_shape(model, manifest.image.shape, path)


def check_shape(model: PackedModel, shape: tuple[int, int, int], where: str) -> None:
    """Raise ScoreError where images that are stored as pixels have another shape than the model takes."""
    if shape != model.served.image.shape:
        raise ScoreError(
            f"{model.facts.uri} takes images of shape {list(model.served.image.shape)}, and those of {where} have "
            f"{list(shape)}: choose a model that was trained on such, or score the files that they were made of"
        )


def _archive(folder: Path) -> bytes:
    """All files of a folder, in one order and without times: the same folder gives the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            archive.writestr(zipfile.ZipInfo(str(path.relative_to(folder))), path.read_bytes())
    return buffer.getvalue()
