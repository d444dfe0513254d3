"""What cannot be scored is told before anything is launched, and nothing is overwritten."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_data import write_idx_folder
from small_models import write_model
from small_scores import rows_of, score_settings, write_photos
from small_splits import write_splits

from pipeline.ingest.claim import claimed
from pipeline.ingest.sources.source import SourceError
from pipeline.serving import ScoreError, score
from pipeline.serving.served import ServedModelError
from pipeline.tracking.outage import TrackingError
from pipeline.tracking.registry import RegistryError

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture
def settings(tmp_path, empty_store, model):
    """A function that gives settings of a score of some photographs."""
    write_photos(tmp_path / "in", 20)
    store = shutil.copy(empty_store, tmp_path / "mlflow.db")

    def make(uri=model, **changes):
        source = {"kind": "folder", "path": str(tmp_path / "in")}
        return score_settings(tmp_path / "out", uri, store, **{"source": source, **changes})

    return make


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        ("nowhere", ServedModelError, r"nowhere holds no model of sparknorm: there is no served\.json"),
        ("models:/photos@champion", RegistryError, r"there is no registered model 'photos': run `sparknorm register`"),
        (None, RegistryError, r"there is no registered model 'small': run `sparknorm register`"),
        ("models:/photos", RegistryError, r"write models:/NAME@ALIAS, models:/NAME/VERSION"),
        ("runs:/0123456789abcdef0123456789abcdef", RegistryError, r"write models:/.* or runs:/RUN/served"),
        ("runs:/", RegistryError, r"write models:/.* or runs:/RUN/served"),
        ("runs:/0123456789abcdef0123456789abcdef/model", RegistryError, r"no run, or no model of a run"),
    ],
)
def test_an_unknown_model(spark, settings, tmp_path, uri, error, message):
    with pytest.raises(error, match=message):
        score(spark, settings(uri))
    assert not (tmp_path / "out" / "scores").exists()


def test_an_unknown_alias_names_those_there_are(spark, settings):
    import mlflow

    chosen = settings("models:/photos@champion")
    client = mlflow.MlflowClient(chosen.tracking.uri)
    client.create_registered_model("photos")
    client.create_model_version("photos", "file:///nowhere")
    client.set_registered_model_alias("photos", "challenger", "1")
    with pytest.raises(RegistryError, match=r"no version of photos has the alias 'champion'; aliases: challenger \(v"):
        score(spark, chosen)
    with pytest.raises(RegistryError, match=r"photos has no version 7"):
        score(spark, settings("models:/photos/7"))


def test_a_registry_that_is_down(spark, settings):
    chosen = settings("models:/photos@champion")
    tracking = chosen.tracking.model_copy(update={"uri": "http://127.0.0.1:9", "outage_seconds": 0})
    with pytest.raises(TrackingError, match=r"tracking\.uri http://127\.0\.0\.1:9 cannot be used"):
        score(spark, chosen.model_copy(update={"tracking": tracking}))


@pytest.mark.parametrize(("classes", "shape"), [(4, (3, 12, 10)), (3, (3, 8, 8))])
def test_a_model_of_other_images(spark, settings, tmp_path, classes, shape):
    images = np.zeros((classes, *shape), np.uint8), np.arange(classes)
    write_splits(str(tmp_path / "data"), {"train": images}, classes=classes)
    message = r"has the classes class 0, class 1, class 2, and \S+/data has" if classes == 4 else (
        r"takes images of shape \[3, 12, 10\], and those of \S+/data have \[3, 8, 8\]"
    )  # fmt: skip
    for chosen in (settings(source={"path": str(tmp_path / "data")}), settings(dataset=str(tmp_path / "data"))):
        with pytest.raises(ScoreError, match=message):
            score(spark, chosen)
    assert not (tmp_path / "out" / "scores").exists()


def test_records_of_another_shape(spark, settings, tmp_path):
    write_idx_folder(tmp_path / "idx", train_rows=3, test_rows=3)
    with pytest.raises(ScoreError, match=r"takes images of shape \[3, 12, 10\], and those of .*idx have \[1, 12, 12\]"):
        score(spark, settings(source={"kind": "idx", "path": str(tmp_path / "idx")}))


def test_a_source_that_is_not_there(spark, settings, tmp_path):
    with pytest.raises(SourceError, match=r"nowhere: no such folder"):
        score(spark, settings(source={"kind": "folder", "path": str(tmp_path / "nowhere")}))


def test_other_scores_are_not_overwritten(spark, settings, tmp_path):
    result = score(spark, settings())
    before = rows_of(result.scores)
    write_photos(tmp_path / "in", 5, first=20)
    with pytest.raises(ScoreError, match=r"has scores of other images or of another model \(small/\w{12}\): choose"):
        score(spark, settings())
    assert rows_of(result.scores) == before
    part = next(Path(result.scores, "scores").iterdir())
    part.unlink()
    with pytest.raises(ScoreError, match=rf"{part.name} is missing: restore it, or delete"):
        score(spark, settings(append=True))


def test_an_output_that_another_score_holds(spark, settings, tmp_path):
    folder = str(tmp_path / "out" / "scores")
    text = rf"{re.escape(folder)} is being written by process \d+ on \S+ since .*, or choose another score\.output"
    with claimed(folder, "another"), pytest.raises(ValueError, match=text):
        score(spark, settings())
