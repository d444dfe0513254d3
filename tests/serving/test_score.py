"""Images of any source get the probabilities of a model, once each, and what cannot be scored is set aside."""

import json
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import kept_memory
import mlflow
import numpy as np
import pyarrow as pa
import pytest
from image_files import write_table
from pyspark import cloudpickle
from small_models import photo, write_model
from small_scores import aside_of, probabilities_of, rows_of, score_settings, write_photos

from pipeline.data import load_manifest
from pipeline.ingest.sources.source import SourceError
from pipeline.serving import Predictor, ScoreError, load_scores, score
from pipeline.serving.scoring.scores import Plan
from pipeline.serving.scoring.source import parts_of
from pipeline.tracking.run import TrackedRun

pytestmark = pytest.mark.spark
cloudpickle.register_pickle_by_value(sys.modules[__name__])
cloudpickle.register_pickle_by_value(kept_memory)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a model, and the training that is in it."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def predictor(made):
    return Predictor.load(made[0])


@pytest.fixture
def store(empty_store, tmp_path) -> Path:
    return shutil.copy(empty_store, tmp_path / "mlflow.db")


def expected(predictor, files):
    return predictor.probabilities(np.stack([predictor.decode(Path(file).read_bytes()) for file in files]))


def test_files_without_labels(spark, tmp_path, store, made, predictor):
    photos = write_photos(tmp_path / "in", 70)
    (photos / "3" / "cut.jpg").write_bytes(photo(40, 40)[:300])
    (photos / "empty.png").touch()
    settings = score_settings(
        tmp_path / "out", made[0], store, source={"kind": "folder", "path": str(photos)}, max_bad_share=0.1
    )
    result = score(spark, settings)
    rows = rows_of(result.scores)
    assert {row["origin"] for row in rows} == {str(path) for path in photos.rglob("?/*[0-9].*")}
    assert len({row["id"] for row in rows}) == 70
    np.testing.assert_allclose(
        probabilities_of(rows), expected(predictor, [row["origin"] for row in rows]), rtol=0, atol=1e-6
    )
    assert [row["class"] for row in rows] == [predictor.classes[n] for n in probabilities_of(rows).argmax(axis=1)]
    reasons = aside_of(result.scores)
    assert reasons.pop(str(photos / "3" / "cut.jpg")) in ("truncated", "undecodable")
    assert reasons == {str(photos / "empty.png"): "empty"}
    assert (result.images, sum(result.set_aside.values()), result.written) == (70, 2, True)
    found = load_scores(result.scores)
    assert (found.input_rows, found.scored) == (72, 70)
    assert Counter(row["class"] for row in rows) == Counter(
        {name: count for name, count in zip(found.classes, found.class_counts, strict=True) if count}
    )
    assert json.loads((tmp_path / "out" / "score.json").read_text())["images"] == 70
    assert result.model_loads == result.processes <= 2
    again = score(spark, settings)
    assert (again.written, load_scores(result.scores)) == (False, found)


def unpublish(result, *, parts):
    """Leave what a job leaves that died before it published: parts and the plan."""
    folder = Path(result.scores)
    plan = Plan(digest=load_scores(result.scores).plans[-1], parts=parts, mlflow_run=result.mlflow_run)
    (folder / "plan.json").write_text(plan.model_dump_json())
    for name in ("scores.json", "scores-0001.json"):
        (folder / name).unlink()


@pytest.mark.parametrize("split", [None, "test"])
def test_shards_of_a_dataset(spark, tmp_path, store, made, predictor, split):
    trained = made[1]
    dataset = trained.job.dataset
    settings = score_settings(tmp_path / "out", made[0], store, source={"split": split}, dataset=dataset)
    result = score(spark, settings)
    rows = rows_of(result.scores)
    manifest = load_manifest(dataset)
    splits = [split] if split else list(manifest.splits)
    assert len(rows) == sum(manifest.split(name).rows for name in splits) == len({row["id"] for row in rows})
    import pyarrow.parquet as pq

    stored = {
        row["id"]: row["image"]
        for name in splits
        for shard in manifest.split(name).shards
        for row in pq.read_table(f"{dataset}/{shard.path}").to_pylist()
    }
    images = np.stack([np.frombuffer(stored[row["id"]], np.uint8).reshape(3, 12, 10) for row in rows])
    np.testing.assert_allclose(probabilities_of(rows), predictor.probabilities(images), rtol=0, atol=1e-6)
    assert {figure.name: figure.state for figure in result.drift.figures}["brightness"] == "as before"
    assert (tmp_path / "out" / "scores" / "score.html").exists()
    assert (tmp_path / "out" / "scores" / "drift.png").exists()


def test_a_table_without_labels(spark, tmp_path, store, made, predictor):
    images = [photo(15, 13, kind="PNG", seed=number) for number in range(40)]
    table = write_table(tmp_path / "table", {"image": [*images, None, b"no image"], "key": list(range(42))})
    source = {"kind": "parquet", "path": str(table), "id_column": "key"}
    settings = score_settings(tmp_path / "out", made[0], store, source=source, max_bad_share=1)
    result = score(spark, settings)
    rows = rows_of(result.scores)
    assert [row["id"] for row in rows] == list(range(40))
    decoded = np.stack([predictor.decode(image) for image in images])
    np.testing.assert_allclose(probabilities_of(rows), predictor.probabilities(decoded), rtol=0, atol=1e-6)
    assert aside_of(result.scores) == {f"{table}#40": "missing_image", f"{table}#41": "undecodable"}


def test_too_many_bad_images_are_an_error_and_what_was_scored_is_kept(spark, tmp_path, store, made):
    photos = write_photos(tmp_path / "in", 40)
    for number in range(5):
        (photos / f"bad {number}.png").write_bytes(b"no image")
    source = {"kind": "folder", "path": str(photos)}
    with pytest.raises(ScoreError, match=r"5 of 45 images cannot be used \(undecodable 5\), more than score.max_bad"):
        score(spark, score_settings(tmp_path / "out", made[0], store, source=source))
    assert not (tmp_path / "out" / "scores" / "scores.json").exists()
    result = score(spark, score_settings(tmp_path / "out", made[0], store, source=source, max_bad_share=0.2))
    assert (result.images, result.parts_found, result.processes) == (40, result.parts, 0)


def kept_by_scorers(batches):
    from pipeline.serving.scoring import task

    for _ in batches:
        time.sleep(1)  # so that one worker does not take both tasks
        if task._loaded:  # it has scored
            yield pa.RecordBatch.from_pydict({"kept": [kept_memory.bytes_kept()]})


@pytest.mark.skipif("MALLOC_TRIM_THRESHOLD_" in os.environ, reason="the environment decides what is kept")
def test_workers_keep_what_a_layer_has_freed_for_the_next(spark, tmp_path, store, made, monkeypatch):
    # Another environment gets Python workers of its own, of which none was a rank before.
    monkeypatch.setitem(spark.sparkContext.environment, "SPARKNORM_TEST_OF", "kept memory")
    photos = write_photos(tmp_path / "in", 40)
    score(spark, score_settings(tmp_path / "out", made[0], store, source={"kind": "folder", "path": str(photos)}))
    told = spark.range(0, 2, numPartitions=2).mapInArrow(kept_by_scorers, "kept long").collect()
    assert told
    assert min(row.kept for row in told) > 200_000_000


def test_a_job_that_died_is_gone_on_with(spark, tmp_path, store, made):
    """What a job that is killed before it publishes leaves: some parts, and the plan."""
    photos = write_photos(tmp_path / "in", 200)
    settings = score_settings(tmp_path / "out", made[0], store, source={"kind": "folder", "path": str(photos)})
    first = score(spark, settings)
    whole, folder = rows_of(first.scores), Path(first.scores)
    unpublish(first, parts=parts_of(200, 16))
    parts = sorted((folder / "scores").iterdir())
    kept = {path: path.stat().st_mtime_ns for path in parts[::2]}
    for path in parts[1::2]:
        path.unlink()
    (folder / "scores" / "part-0123456789ab-00000.parquet").write_bytes(b"of another plan")
    again = score(spark, settings)
    assert (again.parts_found, again.parts) == (len(kept), len(parts))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert rows_of(first.scores) == whole
    assert again.mlflow_run == first.mlflow_run
    write_photos(tmp_path / "in", 10, first=200)  # other images: the parts of the first plan are of no use
    unpublish(first, parts=parts_of(200, 16))
    third = score(spark, settings)
    assert (third.images, third.parts_found) == (210, 0)
    assert {f"scores/{path.name}" for path in (folder / "scores").iterdir()} == {
        part.path for part in load_scores(str(folder)).parts
    }


def test_a_run_that_was_not_ended_is_ended(spark, tmp_path, store, made):
    """The job died between the scores and the end of its run in MLflow."""
    photos = write_photos(tmp_path / "in", 12)
    settings = score_settings(tmp_path / "out", made[0], store, source={"kind": "folder", "path": str(photos)})
    first = score(spark, settings)
    plan = Plan(digest=load_scores(first.scores).plans[-1], parts=1, mlflow_run=first.mlflow_run)
    Path(first.scores, "plan.json").write_text(plan.model_dump_json())
    client = mlflow.MlflowClient(settings.tracking.uri)
    client.set_terminated(first.mlflow_run, "RUNNING")
    assert not score(spark, settings).written
    assert client.get_run(first.mlflow_run).info.status == "FINISHED"
    assert not Path(first.scores, "plan.json").exists()


def test_a_job_that_ended_before_its_run_was_written_down_goes_on_in_that_run(
    spark, tmp_path, store, made, monkeypatch
):
    photos = write_photos(tmp_path / "in", 12)
    settings = score_settings(tmp_path / "out", made[0], store, source={"kind": "folder", "path": str(photos)})

    def fail(*_):
        raise OSError("the store was gone for a moment")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone for a moment"):
        patch.setattr(TrackedRun, "log_params", fail)
        score(spark, settings)
    (begun,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert score(spark, settings).mlflow_run == begun.info.run_id
    assert len(mlflow.search_runs(search_all_experiments=True, output_format="list")) == 1


def test_append_scores_what_is_new(spark, tmp_path, store, made):
    photos = write_photos(tmp_path / "in", 30)
    settings = score_settings(
        tmp_path / "out", made[0], store, source={"kind": "folder", "path": str(photos)}, append=True, table="scored"
    )
    spark.sql("DROP TABLE IF EXISTS scored")
    first = score(spark, settings)
    before = rows_of(first.scores)
    write_photos(tmp_path / "in", 12, first=30)
    (photos / "bad.png").write_bytes(b"no image")
    added = score(spark, settings.model_copy(update={"score": settings.score.model_copy(update={"max_bad_share": 1})}))
    assert (added.version, added.images, added.already_there) == (2, 12, 30)
    rows = rows_of(first.scores)
    assert [row for row in rows if row["score_version"] == 1] == before
    assert len({row["id"] for row in rows}) == len(rows) == 42
    found = load_scores(first.scores)
    assert (found.input_rows, found.scored, found.set_aside) == (43, 42, {"undecodable": 1})
    nothing = score(spark, settings)
    assert (nothing.written, nothing.version, nothing.already_there) == (False, 2, 43)
    table = spark.table("scored").orderBy("id").collect()
    assert [row.asDict() for row in table] == [
        {name: row[name] for name in table[0].asDict()} for row in sorted(rows, key=lambda row: row["id"])
    ]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_an_image_of_another_source_is_never_taken_for_one_that_was_scored(spark, tmp_path, store, made, kind):
    """Folders of two days with the same names below them, and tables whose ids begin anew."""
    days = [write_photos(tmp_path / day, 6, first=first) for day, first in (("day1", 0), ("day2", 100))]
    (tmp_path / "day2/10").rename(tmp_path / "day2/0")
    for number in range(6):
        path = next((tmp_path / "day2/0").glob(f"{100 + number}.*"))
        path.rename(path.with_stem(str(number)))
    if kind == "parquet":
        for day in days:
            images = [path.read_bytes() for path in sorted(day.rglob("*.*"))]
            write_table(tmp_path / f"table-{day.name}", {"image": images, "key": list(range(6))})
    words = {
        "folder": "score the folder that has them all below it",
        "parquet": "give their rows ids that no other has",
    }

    def settings(where):
        source = {"kind": kind, "path": str(where)} | ({"id_column": "key"} if kind == "parquet" else {})
        return score_settings(tmp_path / "out", made[0], store, source=source, append=True)

    first, second = days if kind == "folder" else [tmp_path / f"table-{day.name}" for day in days]
    before = score(spark, settings(first))
    with pytest.raises(ScoreError, match=rf"day2.* has the id of .*day1.*, which has been scored.* or {words[kind]}"):
        score(spark, settings(second))
    assert load_scores(before.scores).scored == 6
    if kind == "folder":
        (tmp_path / "day2/0").rename(tmp_path / "day2/other")
        assert score(spark, settings(second)).images == 6
        assert score(spark, settings(first)).already_there == 6
        return
    copy = tmp_path / "copy"
    first.rename(copy)  # without an id column the content is the id: the same images elsewhere are the same
    by_content = score_settings(tmp_path / "contents", made[0], store, source={"kind": kind, "path": str(copy)})
    by_content = by_content.model_copy(update={"score": by_content.score.model_copy(update={"append": True})})
    assert score(spark, by_content).images == 6
    copy.rename(first)
    source = by_content.score.source.model_copy(update={"path": str(first)})
    again = by_content.model_copy(update={"score": by_content.score.model_copy(update={"source": source})})
    assert (score(spark, again).written, score(spark, again).already_there) == (False, 6)


def test_scores_that_are_made_anew_are_in_the_table_alone(spark, tmp_path, store, made):
    """Somebody deletes the folder of the scores to score again, as an error says: the table loses all versions."""
    photos = write_photos(tmp_path / "in", 10)
    settings = score_settings(
        tmp_path / "out", made[0], store, source={"kind": "folder", "path": str(photos)}, append=True, table="anew"
    )
    spark.sql("DROP TABLE IF EXISTS anew")
    score(spark, settings)
    write_photos(tmp_path / "in", 5, first=10)
    assert score(spark, settings).version == 2
    assert spark.table("anew").count() == 15
    shutil.rmtree(tmp_path / "out/scores")
    assert score(spark, settings).images == 15
    assert spark.table("anew").count() == spark.table("anew").select("id").distinct().count() == 15
    late = settings.model_copy(update={"score": settings.score.model_copy(update={"table": "never_made"})})
    nothing = score(spark, late)
    assert (nothing.written, nothing.table) == (False, None)
    assert "score.table never_made was not made: it gets versions that are scored while it is set" in nothing.notes


def test_errors_of_the_source_name_the_settings_of_score(spark, tmp_path, store, made):
    (tmp_path / "empty").mkdir()
    settings = score_settings(
        tmp_path / "out", made[0], store, source={"kind": "folder", "path": str(tmp_path / "empty")}
    )
    with pytest.raises(SourceError, match=r"no files that end in .* \(score.source.extensions\)"):
        score(spark, settings)


def test_a_version_is_in_the_table_once(spark, tmp_path, store, made):
    photos = write_photos(tmp_path / "in", 20)
    settings = score_settings(
        tmp_path / "out", made[0], store, source={"kind": "folder", "path": str(photos)}, table="once"
    )
    spark.sql("DROP TABLE IF EXISTS once")
    result = score(spark, settings)
    unpublish(result, parts=parts_of(20, 16))  # as a job leaves it that died after it wrote the table
    assert score(spark, settings).processes == 0
    assert spark.table("once").count() == 20
    other = score_settings(
        tmp_path / "other", made[0], store, source={"kind": "folder", "path": str(photos)}, table="once"
    )
    with pytest.raises(ScoreError, match=r"score.table once is there, and has the scores of .*/out/scores: choose"):
        score(spark, other)
    spark.sql("CREATE TABLE theirs AS SELECT 1 AS id")
    theirs = other.model_copy(update={"score": other.score.model_copy(update={"table": "theirs"})})
    with pytest.raises(ScoreError, match=r"score.table theirs is there, and was not made by `score`"):
        score(spark, theirs)
    assert not (tmp_path / "other" / "scores").exists()


@pytest.mark.parametrize("what", ["table", "source"])
def test_delta_without_its_jars_is_an_error_that_names_them_before_anything_is_scored(
    spark, tmp_path, store, made, what
):
    photos = write_photos(tmp_path / "in", 2)
    source = {"kind": "folder", "path": str(photos)} if what == "table" else {"kind": "delta", "path": str(photos)}
    table = {"table": "lake", "table_format": "delta"} if what == "table" else {}
    settings = score_settings(tmp_path / "out", made[0], store, source=source, **table)
    words = r"Spark has no Delta Lake here\. Start it with the jars .*io\.delta:delta-spark_2\.13:VERSION"
    with pytest.raises(ValueError, match=words) as caught:
        score(spark, settings)
    assert type(caught.value) is (ScoreError if what == "table" else SourceError)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "scores").exists()
