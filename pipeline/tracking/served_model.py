"""A model folder as a LoggedModel of MLflow, with the pyfunc flavour, whose loader the model carries."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import AnyType, Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from pipeline.config.secrets import mask
from pipeline.tracking.client import call_store, time_to_upload

# The folder's name is part of where `Predictor.load` finds it within an MLflow model.
FOLDER_NAME = "model"
# By which a model of a training is found again, and the place of its name in MLflow.
TRAINING_TAG, MODEL_NAME = "sparknorm.training", "served"
# The registered model that a model was logged for: what is unfinished of another one's may be under way.
_REGISTERED_TAG = "sparknorm.registered_model"


@dataclass(frozen=True)
class PackagedModel:
    """All that becomes an MLflow model.

    folder : a model folder on a local disk, named `FOLDER_NAME`
    code : folder of a package that it carries
    loader : dotted name of the module in it that loads the folder
    training : what tells the training that it is of from all others
    run_id : of the training
    step : optimizer steps that it was trained
    example : content of one image file
    requirements : pinned packages, as pip takes them
    metadata : JSON values, for whoever looks at the model
    params : of the LoggedModel
    """

    folder: Path
    code: Path
    loader: str
    training: str
    run_id: str
    step: int
    example: bytes
    requirements: Sequence[str]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)


def signature() -> ModelSignature:
    """What the model takes and gives: a row has an image file in ``image``, or an array in ``pixels``, of any nesting
    and integer type; it gives the probability of each class.

    Both columns are optional, so that a table may have either. MLflow checks no array of a type that says nothing, and
    the model does; with a type it would refuse a batch that lacks the column.
    """
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.binary, "image", required=False),
        ColSpec(AnyType(), "pixels", required=False),
    ]
    params = ParamSchema([ParamSpec("bad_images", DataType.string, "error")])
    return ModelSignature(Schema(inputs), Schema([ColSpec(Array(DataType.float))]), params)


def log_served_model(model: PackagedModel, outage_seconds: float, *, registered: str) -> str:
    """The id of the LoggedModel of a training, which is READY; logged now unless it was before.

    What a killed process has left unfinished of it for the same registered model is deleted.

    Parameters
    ----------
    registered : name of the registered model, which this process has for itself

    Raises
    ------
    TrackingError
        The store was down for so long, or refuses it.
    """
    client = mlflow.MlflowClient()
    run = call_store("find a run", lambda: client.get_run(model.run_id), outage_seconds)
    experiment = run.info.experiment_id
    for earlier in _models_of(client, model, experiment, outage_seconds):
        if earlier.status == LoggedModelStatus.READY:
            return earlier.model_id
        if earlier.tags.get(_REGISTERED_TAG) != registered:
            continue
        call_store("delete an unfinished model", partial(client.delete_logged_model, earlier.model_id), outage_seconds)
    begin = partial(
        client.create_logged_model,
        experiment,
        name=MODEL_NAME,
        source_run_id=model.run_id,
        tags={TRAINING_TAG: model.training, _REGISTERED_TAG: registered},
        params={key: mask(str(value)) for key, value in model.params.items()},
    )
    with tempfile.TemporaryDirectory() as local, time_to_upload():
        begun = call_store("begin a model", begin, outage_seconds)
        _save(model, begun, Path(local, "mlflow"))
        upload = partial(client.log_model_artifacts, begun.model_id, str(Path(local, "mlflow")))
        call_store("store the model", upload, outage_seconds)
    output = [LoggedModelOutput(begun.model_id, model.step)]
    call_store("link the model to its run", partial(client.log_outputs, model.run_id, output), outage_seconds)
    end = partial(client.finalize_logged_model, begun.model_id, LoggedModelStatus.READY)
    call_store("end the model", end, outage_seconds)
    return begun.model_id


def _models_of(
    client: mlflow.MlflowClient, model: PackagedModel, experiment: str, outage_seconds: float
) -> list[LoggedModel]:
    """What was logged of this training, finished or not."""
    search = partial(client.search_logged_models, [experiment], f"source_run_id = '{model.run_id}'", max_results=1000)
    found = call_store("look for the model", search, outage_seconds)
    return [each for each in found if each.tags.get(TRAINING_TAG) == model.training]


def _save(model: PackagedModel, begun: LoggedModel, path: Path) -> None:
    """The files of the MLflow model. The requirements are given, so that nothing is guessed and no registry asked."""
    import mlflow.pyfunc

    mlflow.pyfunc.save_model(
        path=str(path),
        loader_module=model.loader,
        data_path=str(model.folder),
        code_paths=[str(model.code)],
        mlflow_model=Model(
            artifact_path=begun.artifact_location,
            model_uuid=begun.model_id,
            run_id=model.run_id,
            model_id=begun.model_id,
        ),
        signature=signature(),
        input_example=pd.DataFrame({"image": [model.example]}),
        pip_requirements=list(model.requirements),
        metadata=dict(model.metadata),
    )
