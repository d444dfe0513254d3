"""`score` and `register` whose source, output and trainings are on a real S3 server that fails, or is down."""

import json

import numpy as np
import pytest
from image_files import put_pictures
from settings_on_s3 import everything_on
from small_models import write_model
from small_scores import aside_of, probabilities_of, rows_of, score_settings, write_photos

from pipeline import storage
from pipeline.config.settings import Settings
from pipeline.driver import train
from pipeline.ingest import ingest
from pipeline.serving import load_scores, register, score
from pipeline.serving.scoring import scores as on_disk
from pipeline.serving.scoring.errors import ScoreJobError
from pipeline.tracking.registry import Registry

pytestmark = [pytest.mark.spark, pytest.mark.long]

# What no driver of S3 tries again by itself.
DOWN = {"seed": 1, "share": 1, "kinds": ("expired",)}
TOKEN = "The provided token has expired"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture
def photos(bucket, tmp_path):
    """The address of sixty photographs and a file that is none."""
    local = write_photos(tmp_path / "in", 60)
    for path in local.rglob("*.*"):
        storage.publish(f"{bucket}/in/{path.relative_to(local)}", path.read_bytes())
    storage.publish(f"{bucket}/in/0/no image.png", b"nothing")
    return f"{bucket}/in"


def scoring(bucket, model, tmp_path, photos, **changes) -> Settings:
    made = score_settings(
        tmp_path, model, tmp_path / "mlflow.db", source={"kind": "folder", "path": photos}, max_bad_share=0.1, **changes
    )
    return made.model_copy(update={"output": f"{bucket}/runs"})


def test_scores_from_s3_to_s3_are_those_of_a_local_folder(spark, s3, bucket, model, photos, store_uri, tmp_path):
    local = score(spark, score_settings(
        tmp_path / "local", model, tmp_path / "mlflow.db", max_bad_share=0.1,
        source={"kind": "folder", "path": str(tmp_path / "in")},
    ))  # fmt: skip
    settings = scoring(bucket, model, tmp_path, photos)
    with s3.faults.at_random(3, 0.05) as made:
        result = score(spark, settings)
    assert made.total() > 0
    assert result.scores == f"{bucket}/runs/scores"
    assert (result.images, sum(result.set_aside.values()), result.written) == (60, 1, True)
    found, expected = rows_of(result.scores), rows_of(local.scores)
    by_name = {row["origin"].rpartition("/in/")[2]: row["probabilities"] for row in expected}
    assert {row["origin"].rpartition("/in/")[2] for row in found} == set(by_name)
    np.testing.assert_allclose(
        probabilities_of(found), [by_name[row["origin"].rpartition("/in/")[2]] for row in found], rtol=0, atol=1e-6
    )
    assert aside_of(result.scores) == {f"{photos}/0/no image.png": "undecodable"}
    assert json.loads(storage.read_bytes(f"{bucket}/runs/score.json"))["images"] == 60
    assert score(spark, settings).written is False
    write_photos(tmp_path / "more", 6, first=60)
    for path in (tmp_path / "more").rglob("*.*"):
        storage.publish(f"{photos}/{path.relative_to(tmp_path / 'more')}", path.read_bytes())
    more = score(spark, scoring(bucket, model, tmp_path, photos, append=True))
    assert (more.images, len(rows_of(result.scores))) == (6, 66)


def test_where_storage_is_down_nothing_is_scored(spark, s3, bucket, model, photos, store_uri, tmp_path):
    settings = scoring(bucket, model, tmp_path, photos)
    with (
        s3.faults.at_random(**DOWN),
        storage.retry_for(0.5),
        pytest.raises(storage.UnreachableError, match=rf"s3://.* cannot be .* from .*{TOKEN}") as caught,
    ):
        score(spark, settings)
    assert "\n" not in str(caught.value)
    assert on_disk.newest(f"{bucket}/runs/scores") is None
    assert not storage.exists(f"{bucket}/runs/score.json")
    assert score(spark, settings).images == 60


@pytest.mark.slow  # executors try for a minute
def test_photographs_that_no_executor_can_read_end_the_job_and_are_not_set_aside(
    spark, s3, bucket, model, photos, store_uri, tmp_path
):
    settings = scoring(bucket, model, tmp_path, photos)
    message = rf"^the Spark job failed: .*UnreachableError: {photos}/.* cannot be read from .*{TOKEN}"
    with s3.faults.at_random(**DOWN, only="/in/"), pytest.raises(ScoreJobError, match=message) as caught:
        score(spark, settings)
    assert "\n" not in str(caught.value)
    assert on_disk.newest(f"{bucket}/runs/scores") is None
    assert not storage.exists(f"{bucket}/runs/score.json")
    assert score(spark, settings).images == 60
    assert load_scores(f"{bucket}/runs/scores").set_aside == {"undecodable": 1}


@pytest.fixture(scope="module")
def trained(spark, s3, empty_store, tmp_path_factory):
    """Settings of a training whose images, dataset, output and checkpoints are on S3; it has run."""
    bucket, folder = s3.new_bucket(), tmp_path_factory.mktemp("store")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    put_pictures(f"{bucket}/pictures", 96)
    settings = everything_on(bucket, f"sqlite:///{folder}/mlflow.db", folder, test_share=0.4, deduplicate=False)
    tracking = settings.tracking.model_copy(update={"outage_seconds": 1})
    settings = settings.model_copy(update={"tracking": tracking})
    ingest(spark, settings)
    train(spark, settings)
    return settings


def of_model(settings: Settings, name: str) -> Settings:
    """The same with a registered model of its own; the pictures are noise, and the gate is not what is tried here."""
    registry = settings.registry.model_copy(update={"model": name, "gate": False})
    return settings.model_copy(update={"registry": registry})


def state_of(settings: Settings) -> tuple[str | None, list[str]]:
    """The champion, and the status of each version."""
    registry = Registry(settings.tracking, None, settings.registry.model)
    champion, versions = registry.holder("champion"), registry.versions("sparknorm.status")
    return champion and champion.number, [each.tags["sparknorm.status"] for each in versions]


def test_a_training_on_s3_is_registered(s3, trained):
    settings = of_model(trained, "whole")
    with s3.faults.at_random(2, 0.05):
        made = register(settings)
    assert (made.version, made.is_new, made.champion) == ("1", True, "1")
    assert state_of(settings) == ("1", ["done"])
    assert json.loads(storage.read_bytes(f"{trained.output}/register.json"))["version"] == "1"
    assert b"whole, version 1" in storage.read_bytes(f"{trained.output}/register.html")
    assert register(settings).decision == "unchanged"


def test_where_storage_is_down_nothing_is_registered(s3, trained):
    settings = of_model(trained, "down")
    with (
        s3.faults.at_random(**DOWN),
        storage.retry_for(0.5),
        pytest.raises(storage.UnreachableError, match=rf"{trained.output}/.* cannot be .* from .*{TOKEN}") as caught,
    ):
        register(settings)
    assert "\n" not in str(caught.value)
    assert not Registry(settings.tracking, None, "down").exists()
    assert register(settings).champion == "1"


def test_where_storage_goes_down_before_the_result_is_written_the_version_is_whole(s3, trained):
    """The page and register.json come last: what they say was done, and the same command writes them."""
    settings = of_model(trained, "late")
    message = rf"{trained.output}/register\.html cannot be written .*{TOKEN}"
    with (
        s3.faults.at_random(**DOWN, only=r"PUT .*register\."),
        storage.retry_for(0.5),
        pytest.raises(storage.UnreachableError, match=message),
    ):
        register(settings)
    assert state_of(settings) == ("1", ["done"])
    assert not storage.exists(f"{trained.output}/register.json")
    made = register(settings)
    assert (made.decision, made.version, state_of(settings)) == ("unchanged", "1", ("1", ["done"]))
    assert json.loads(storage.read_bytes(f"{trained.output}/register.json"))["model"] == "late"
