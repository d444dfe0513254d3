"""`score` against bare loops of the same network in two processes, and against MLflow's `spark_udf`.

On Spark's local[2], whose session and Python workers are up before; a pass of ours is the whole call, from the model's
name to the published scores, with its run in MLflow and its page. What scores are compared with was looked at before.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ingest
import numpy as np
import pyarrow.parquet as pq
from results import Result, compare, leave

from pipeline import storage
from pipeline.cluster.session import get_session
from pipeline.config.cluster import SparkSettings
from pipeline.config.dataset import DatasetSettings, ImageSettings, SourceSettings
from pipeline.config.model import ModelSettings
from pipeline.config.settings import Settings
from pipeline.data import load_manifest
from pipeline.ingest.job import ingest_dataset
from pipeline.serving import score, scores_folder

PASSES = int(os.environ.get("BENCH_PASSES", "3"))
BATCH = 256
SHARDS, LOOP = "sparknorm score, raw shards", "limit: bare loop over tensors in two processes"
# As the processes of `score` do (`pipeline.distributed.host_memory`): what is left is all that is not the network.
KEEPING_LOOP = "limit: the same loop in processes that keep freed memory"
UDF, PNG_UDF = "MLflow spark_udf, the same rows as arrays", "MLflow spark_udf, a table of the same rows as PNG"
TABLE, ROWS = "sparknorm score, a table of rows as PNG, ResNet-8", "sparknorm score, raw shards, ResNet-8"
FILES, DECODE = "sparknorm score, JPEG files", "limit: bare decoding and network in two processes"


def start() -> Any:
    return get_session(SparkSettings(master="local[2]"), "sparknorm benchmarks", trains=True)


def run(spark: Any, work: Path) -> None:
    speeds: dict[str, list[float]] = {name: [] for name in (SHARDS, LOOP, KEEPING_LOOP, FILES, DECODE)}
    dataset = ingest.fashion_mnist(spark, work)
    model = write_model(dataset, work / "model", ModelSettings(network="resnet", depth=20, width=16, norm="batch"))
    shards = settings(work / "scored", dataset, model, {"split": "train"})
    halves, rows = _write_halves(dataset, "train", work)
    photos = ingest.make_photos(work / "photos")
    sample = _sample(spark, work, photos)
    small = write_model(sample, work / "small", ModelSettings(network="resnet", depth=8, width=16, norm="batch"))
    files = settings(work / "files", sample, small, {"kind": "folder", "path": str(photos)})
    paths = sorted(str(path) for path in photos.rglob("*.jpg"))
    for one in (shards, files):
        _scored(spark, one)  # starts the workers, and looks at what scores are compared with
    for _ in range(PASSES):
        speeds[SHARDS].append(rows / _scored(spark, shards))
        speeds[LOOP].append(rows / _in_two_processes(model, _loop, halves))
        speeds[KEEPING_LOOP].append(rows / _in_two_processes(model, _keeping_loop, halves))
        speeds[FILES].append(len(paths) / _scored(spark, files))
        speeds[DECODE].append(len(paths) / _in_two_processes(small, _decode_loop, (paths[::2], paths[1::2])))
    shutil.rmtree(photos)
    udf = _against_udf(spark, work)
    speeds |= udf
    results = [Result(name, "images/s", passes) for name, passes in speeds.items()]
    ratios = [compare(results, SHARDS, LOOP), compare(results, SHARDS, KEEPING_LOOP), compare(results, FILES, DECODE),
              compare(results, ROWS, UDF), compare(results, TABLE, PNG_UDF)]  # fmt: skip
    leave("score", results + ratios, f"score, images of a whole call per second ({rows:,}, {len(paths):,} files)")


def _against_udf(spark: Any, work: Path) -> dict[str, list[float]]:
    """The same registered model and rows by `score` and by MLflow's UDF, which writes Parquet files, too."""
    import mlflow

    speeds: dict[str, list[float]] = {name: [] for name in (ROWS, UDF, TABLE, PNG_UDF)}
    dataset = str(work / "fashion_mnist")
    output = work / "udf"
    shutil.rmtree(output, ignore_errors=True)
    chosen = settings(output, dataset, Path(), {"split": "train"})
    uri = _registered(chosen, dataset, output)
    mlflow.set_tracking_uri(chosen.tracking.uri)
    model = {"model": uri}
    ours = chosen.model_copy(update={"score": chosen.score.model_copy(update=model)})
    rows = _write_table(dataset, "train", output / "table")
    table = settings(output, dataset, Path(), {"kind": "parquet", "path": str(output / "table"), "id_column": "id"})
    table = table.model_copy(update={"score": table.score.model_copy(update=model)})
    for one in (ours, table):
        _scored(spark, one)
    for number in range(PASSES + 1):  # the first starts the workers
        for name, column in ((UDF, "pixels"), (PNG_UDF, "image")):
            seconds = _by_udf(spark, uri, output / "table", column, output / "answers")
            speeds[name] += [rows / seconds] if number else []
    for _ in range(PASSES):
        speeds[ROWS].append(rows / _scored(spark, ours))
        speeds[TABLE].append(rows / _scored(spark, table))
    return speeds


def _by_udf(spark: Any, uri: str, table: Path, column: str, answers: Path) -> float:
    import mlflow

    started = time.perf_counter()
    udf = mlflow.pyfunc.spark_udf(spark, uri, env_manager="local")
    found = spark.read.parquet(str(table)).select("id", udf(column).alias("probabilities"))
    found.write.mode("overwrite").parquet(str(answers))
    return time.perf_counter() - started


def _registered(settings: Settings, dataset: str, folder: Path) -> str:
    """The address of a registered model, an untrained network."""
    import mlflow

    from pipeline.serving.packaging import package
    from pipeline.tracking.registry import Registry
    from pipeline.tracking.served_model import log_served_model

    registry = Registry(settings.tracking, None, "benchmark")
    client = mlflow.MlflowClient()
    experiment = client.create_experiment("models", artifact_location=(folder / "models").absolute().as_uri())
    trained = _untrained(dataset, folder, ModelSettings(network="resnet", depth=8, width=16, norm="batch"))
    trained.result.run_id = client.create_run(experiment).info.run_id
    packaged, _ = package(trained, settings, "benchmark", folder)
    registry.create()
    version = registry.add(log_served_model(packaged, 60, registered=registry.model), {})
    return f"models:/benchmark/{version.number}"


def _write_table(dataset: str, split: str, folder: Path) -> int:
    """Write the rows of a split into four Parquet files, as arrays of integers and as PNG; gives their number."""
    import pyarrow as pa
    from PIL import Image

    manifest = load_manifest(dataset)
    folder.mkdir(parents=True)
    tables = [pq.read_table(storage.join(dataset, shard.path)) for shard in manifest.split(split).shards]
    whole = pa.concat_tables(tables)
    images = np.frombuffer(b"".join(whole["image"].to_pylist()), np.uint8).reshape(-1, *manifest.image.shape)
    for number in range(4):
        some = images[number::4]
        files = []
        for image in some:
            buffer = io.BytesIO()
            Image.fromarray(image[0]).save(buffer, "PNG")
            files.append(buffer.getvalue())
        columns = {
            "id": whole["id"].to_numpy()[number::4],
            "pixels": list(some.reshape(len(some), -1).astype(np.int32)),
        }
        pq.write_table(pa.table({**columns, "image": files}), folder / f"{number}.parquet")
    return len(images)


def settings(output: Path, dataset: str, model: Path, source: dict[str, Any]) -> Settings:
    """What scores a source with a model folder."""
    return Settings.model_validate(
        {
            "name": "benchmark",
            "output": str(output),
            "dataset": {"path": dataset},
            "tracking": {"uri": f"sqlite:///{output.absolute()}/mlflow.db", "artifacts": str(output / "artifacts")},
            "score": {"model": str(model), "source": source, "batch_size": BATCH},
        }
    )


def write_model(dataset: str, folder: Path, model: ModelSettings) -> Path:
    """The folder of a folded network that nobody has trained: it takes as long as one that somebody has."""
    from pipeline.serving.model_folder import write_model_folder

    write_model_folder(_untrained(dataset, folder, model), Settings(name="b"), str(folder))
    return folder


def _untrained(dataset: str, folder: Path, model: ModelSettings) -> Any:
    """What a training would leave, of a network as it is at its beginning."""
    from pipeline.config.training import TrainSettings
    from pipeline.serving.trained import Trained
    from pipeline.training.job import Job
    from pipeline.training.network import network_for

    manifest = load_manifest(dataset)
    network = network_for(model, manifest).eval().requires_grad_(False)
    job = Job(dataset, str(folder), model, TrainSettings())
    result: Any = SimpleNamespace(steps=0, run_id="")
    return Trained("benchmark", network, job, manifest, "", result)


def _sample(spark: Any, work: Path, photos: Path) -> str:
    """A small dataset of some of the photographs, in the shape that the network takes."""
    some = work / "some photos"
    shutil.rmtree(work / "sample", ignore_errors=True)  # of photographs that were made before
    for path in sorted(photos.rglob("*.jpg"))[::40]:
        target = some / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    settings = DatasetSettings(
        path=str(work / "sample"),
        name="photos",
        source=SourceSettings(kind="folder", path=str(some)),
        image=ImageSettings(shape=ingest.JPEG_SHAPE),
    )
    ingest_dataset(spark, settings, cache=ingest.CACHE)
    return settings.path


def _write_halves(dataset: str, split: str, work: Path) -> tuple[tuple[str, str], int]:
    """The images of a split as two files of arrays, uint8 (N, C, H, W), and how many there are."""
    manifest = load_manifest(dataset)
    parts = [pq.read_table(storage.join(dataset, shard.path))["image"] for shard in manifest.split(split).shards]
    flat = [np.frombuffer(b"".join(part.to_pylist()), np.uint8) for part in parts]
    images = np.concatenate(flat).reshape(-1, *manifest.image.shape)
    for number in range(2):
        np.save(work / f"half-{number}.npy", images[number::2])
    return (str(work / "half-0.npy"), str(work / "half-1.npy")), len(images)


def _scored(spark: Any, settings: Settings) -> float:
    """Seconds of one call, whose scores are deleted."""
    shutil.rmtree(scores_folder(settings), ignore_errors=True)
    started = time.perf_counter()
    score(spark, settings)
    return time.perf_counter() - started


def _in_two_processes(model: Path, loop: Callable[[str, Any, int | None], int], halves: tuple[Any, Any]) -> float:
    """Seconds until two processes that do nothing else are through with a half each, once they have begun."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        both = [(str(model), half, BATCH) for half in halves]
        pool.starmap(_begin, [(loop, both)] * 2, chunksize=1)
        started = time.perf_counter()
        pool.starmap(loop, [(str(model), half, None) for half in halves], chunksize=1)
        return time.perf_counter() - started


def _begin(loop: Callable[..., int], some: list[tuple[Any, ...]]) -> None:
    """Import torch, load the network and what is held in memory."""
    for arguments in some:
        loop(*arguments)
    time.sleep(1)  # so that each of the two processes gets one of the two calls


@functools.cache
def _predictor(model: str) -> Any:
    import torch

    from pipeline.serving import Predictor

    torch.set_num_threads(1)
    return Predictor.load(model)


@functools.cache
def _array(path: str) -> np.ndarray:
    return np.load(path)


def _loop(model: str, path: str, most: int | None) -> int:
    return _ask(model, _array(path)[:most])


def _keeping_loop(model: str, path: str, most: int | None) -> int:
    from pipeline.distributed.host_memory import keep_freed_memory

    keep_freed_memory()
    return _loop(model, path, most)


def _ask(model: str, images: np.ndarray) -> int:
    predictor = _predictor(model)
    return sum(len(predictor.probabilities(images[at : at + BATCH])) for at in range(0, len(images), BATCH))


def _decode_loop(model: str, paths: list[str], most: int | None) -> int:
    from PIL import Image

    side, total, batch = ingest.JPEG_SHAPE[1], 0, []
    paths = paths[:most]
    for number, path in enumerate(paths):
        with Image.open(path) as image:
            edge = min(image.size)
            left, top = (image.width - edge) / 2, (image.height - edge) / 2
            small = image.convert("RGB").resize(
                (side, side), Image.Resampling.BILINEAR, box=(left, top, left + edge, top + edge)
            )
        batch.append(np.asarray(small).transpose(2, 0, 1))
        if len(batch) == BATCH or number == len(paths) - 1:
            total += _ask(model, np.stack(batch))
            batch = []
    return total
