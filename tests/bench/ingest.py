"""Ingest: our job against Petastorm's `materialize_dataset`, bare Pillow, WebDataset and LitData, and against itself at
a hundred times the size. On Spark's local[2]; every pass is a whole job, from the source's files to the published
dataset.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import petastorm_writer
from peers_environment import IS_THERE, in_peers
from results import Result, compare, leave

from pipeline import storage
from pipeline.cluster.session import get_session
from pipeline.config.cluster import SparkSettings
from pipeline.config.dataset import DatasetSettings, ImageSettings, SourceSettings
from pipeline.ingest.job import ingest_dataset
from pipeline.ingest.sources.fashion_mnist import CLASSES, locate
from pipeline.ingest.sources.open import open_source

CACHE = "runs/cache"
PASSES = 3
JPEG_FILES, JPEG_SHAPE = int(os.environ.get("BENCH_JPEG_FILES", "12000")), (3, 64, 64)
SMALL_IMAGES, COPIES = 600, int(os.environ.get("BENCH_COPIES", "100"))
OURS, PETASTORM = "sparknorm ingest, Fashion-MNIST", "Petastorm materialize_dataset, Fashion-MNIST"
JPEG, PILLOW = "sparknorm ingest, JPEG files", "limit: Pillow in two bare processes"
SCALED = "sparknorm ingest, JPEG files, image.decode: scaled"
PILLOW_SCALED = "limit: Pillow with draft in two bare processes"
STORED = "sparknorm ingest, JPEG files to JPEG"
PEERS = {
    "webdataset": "WebDataset, 2 processes, JPEG files to JPEG",
    "litdata": "LitData, 2 workers, JPEG files to JPEG",
}
STORED_SIZE = 224
# Photographs of about 2 megapixels, every side at least four times the target's.
LARGE_FILES, LARGE_SHAPE = int(os.environ.get("BENCH_LARGE_FILES", "600")), (3, 224, 224)
LARGE = {
    "exact": ("sparknorm ingest, photographs of 2 megapixels", "limit: Pillow, 2 megapixels, two bare processes"),
    "scaled": (
        "sparknorm ingest, photographs of 2 megapixels, image.decode: scaled",
        "limit: Pillow with draft, 2 megapixels, two bare processes",
    ),
}


def start() -> Any:
    return get_session(SparkSettings(master="local[2]"), "sparknorm benchmarks")


def fashion_mnist(spark: Any, work: Path) -> str:
    """The dataset that `make run` trains on."""
    dataset = work / "fashion_mnist"
    ingest_dataset(spark, _fashion(dataset), cache=CACHE)
    return str(dataset)


def _fashion(path: Path, **changes: Any) -> DatasetSettings:
    return DatasetSettings(path=str(path), shard_bytes=5_880_000, row_group_rows=1_250, **changes)


def run(spark: Any, work: Path) -> None:
    """Fashion-MNIST against Petastorm, JPEG files against Pillow."""
    fashion_mnist(spark, work)  # starts the workers
    names = (OURS, PETASTORM, JPEG, PILLOW, SCALED, PILLOW_SCALED, STORED, *(PEERS.values() if IS_THERE else ()))
    speeds: dict[str, list[float]] = {name: [] for name in names}
    photos = make_photos(work / "photos")
    jpeg = DatasetSettings(
        path=str(work / "made"),
        name="photos",
        source=SourceSettings(kind="folder", path=str(photos)),
        image=ImageSettings(shape=JPEG_SHAPE),
    )
    scaled = jpeg.model_copy(update={"image": ImageSettings(shape=JPEG_SHAPE, decode="scaled")})
    stored = ImageSettings(shape=(3, STORED_SIZE, STORED_SIZE), encoding="jpeg")
    stored = jpeg.model_copy(update={"image": stored})
    for _ in range(PASSES):
        speeds[OURS].append(70_000 / _ingested(spark, _fashion(work / "made")))
        speeds[PETASTORM].append(70_000 / _timed(functools.partial(_materialize, spark, work / "petastorm")))
        speeds[JPEG].append(JPEG_FILES / _ingested(spark, jpeg))
        speeds[PILLOW].append(JPEG_FILES / _pillow(photos, side=JPEG_SHAPE[1], scaled=False))
        speeds[SCALED].append(JPEG_FILES / _ingested(spark, scaled))
        speeds[PILLOW_SCALED].append(JPEG_FILES / _pillow(photos, side=JPEG_SHAPE[1], scaled=True))
        speeds[STORED].append(JPEG_FILES / _ingested(spark, stored))
        for peer, name in PEERS.items() if IS_THERE else ():
            arguments = (peer, str(photos), str(work / peer), str(STORED_SIZE))
            speeds[name].append(JPEG_FILES / float(in_peers("prepare.py", *arguments).splitlines()[-1]))
            shutil.rmtree(work / peer)
    shutil.rmtree(work / "petastorm")
    shutil.rmtree(photos)
    speeds |= large_photos(spark, work)
    results = [Result(name, "images/s", passes) for name, passes in speeds.items()]
    pairs = [(OURS, PETASTORM), (JPEG, PILLOW), (SCALED, JPEG), (SCALED, PILLOW_SCALED)]
    (large, large_pillow), (large_scaled, large_pillow_scaled) = LARGE.values()
    pairs += [(large, large_pillow), (large_scaled, large), (large_scaled, large_pillow_scaled)]
    pairs += [(STORED, name) for name in PEERS.values() if name in speeds]
    ratios = [compare(results, *pair) for pair in pairs]
    leave("ingest", results + ratios, f"ingest, images of a whole job per second ({JPEG_FILES:,} JPEG files)")


def large_photos(spark: Any, work: Path) -> dict[str, list[float]]:
    """Photographs much larger than the target, decoded whole and at a fraction: whole jobs, and Pillow alike."""
    speeds: dict[str, list[float]] = {name: [] for pair in LARGE.values() for name in pair}
    photos = make_large_photos(work / "large photos")
    for _ in range(PASSES):
        for decode, (ours, pillow) in LARGE.items():
            settings = DatasetSettings(
                path=str(work / "made"),
                name="photos",
                source=SourceSettings(kind="folder", path=str(photos)),
                image=ImageSettings(shape=LARGE_SHAPE, decode=decode),
            )
            speeds[ours].append(LARGE_FILES / _ingested(spark, settings))
            seconds = _pillow(photos, side=LARGE_SHAPE[1], scaled=decode == "scaled")
            speeds[pillow].append(LARGE_FILES / seconds)
    shutil.rmtree(photos)
    return speeds


def run_scale(spark: Any, work: Path) -> None:
    """The same work for each image, for sixty thousand images and for a hundred times as many."""
    part = _write_part(work / "part", SMALL_IMAGES)
    small = SourceSettings(kind="idx", path=str(part), classes=CLASSES, expand=100)
    large = SourceSettings(kind="fashion_mnist", expand=COPIES)
    results = []
    for name, source, images, passes in (
        ("small", small, SMALL_IMAGES * 100 + 100, PASSES),
        ("large", large, 60_000 * COPIES + 10_000, 1),
    ):
        settings = DatasetSettings(
            path=str(work / name), name=name, source=source, validation_share=0.0, shard_bytes=8 << 20
        )
        seconds = []
        for _ in range(passes):
            shutil.rmtree(work / name, ignore_errors=True)
            seconds.append(_timed(lambda settings=settings: ingest_dataset(spark, settings, cache=CACHE)))
        title = f"{images:,} images"
        results += [
            Result(f"ingest of {title}", "µs/image", [1e6 * value / images for value in seconds]),
            Result(f"driver, Python, after {title}", "MB", [_peak_mb(os.getpid())]),
            Result(f"driver, JVM with executors, after {title}", "MB", [_peak_mb(_jvm(spark))]),
            Result(f"reader of {title}", "MB", [_reader_mb(work / name)]),
        ]
    half = len(results) // 2
    ratios = [compare(results, b.name, a.name) for a, b in zip(results[:half], results[half:], strict=True)]
    for name in ("small", "large", "part"):
        shutil.rmtree(work / name)
    leave("scale", results + ratios, f"from {SMALL_IMAGES * 100:,} images to {60_000 * COPIES:,}")


def _timed(job: Callable[[], Any]) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def _ingested(spark: Any, settings: DatasetSettings) -> float:
    """Seconds of one job, whose dataset is deleted."""
    shutil.rmtree(settings.path, ignore_errors=True)
    seconds = _timed(lambda: ingest_dataset(spark, settings, cache=CACHE))
    shutil.rmtree(settings.path)
    return seconds


def _materialize(spark: Any, folder: Path) -> None:
    source = open_source(spark, SourceSettings(kind="fashion_mnist"), CACHE)

    def read(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            for rows in source_read(batch):
                yield rows.select(["id", "label", "payload"])

    source_read = source.read  # the DataFrame beside it cannot be sent to executors
    images = source.items.mapInArrow(read, "id long, label int, payload binary")
    petastorm_writer.write(spark, images, storage.absolute(str(folder)))


def make_photos(folder: Path) -> Path:
    """JPEG files of two classes: parts of scikit-learn's two photographs, 400 to 600 pixels wide."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    shutil.rmtree(folder, ignore_errors=True)
    random = np.random.default_rng(0)
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(JPEG_FILES // 2):
            width, height = random.integers(400, 600), random.integers(300, 420)
            left, top = random.integers(0, 640 - width), random.integers(0, 427 - height)
            part = Image.fromarray(photo[top : top + height, left : left + width])
            part.save(folder / name / f"{number:05d}.jpg", quality=90)
    return folder


def make_large_photos(folder: Path) -> Path:
    """JPEG files of two classes, 1,500 to 1,900 by 1,100 to 1,400 pixels: enlarged parts of the same photographs, with
    noise as a camera's sensor has it, without which they would be quicker to decode than real ones."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    shutil.rmtree(folder, ignore_errors=True)
    random = np.random.default_rng(1)
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(LARGE_FILES // 2):
            size = (int(random.integers(1500, 1900)), int(random.integers(1100, 1400)))
            left, top = random.integers(0, 140), random.integers(0, 107)
            part = Image.fromarray(photo[top : top + 320, left : left + 500]).resize(size, Image.Resampling.BICUBIC)
            noisy = np.asarray(part, np.float32) + random.normal(0, 4, (size[1], size[0], 1)).astype(np.float32)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number:05d}.jpg", quality=90)
    return folder


def _pillow(photos: Path, *, side: int, scaled: bool) -> float:
    """Seconds until two processes that do nothing else have decoded and resized all files, once they have started."""
    files = sorted(str(path) for path in photos.rglob("*.jpg"))
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        work = functools.partial(_decode_and_resize, side=side, scaled=scaled)
        pool.map(work, [files[:2], files[2:4]], chunksize=1)  # both have started and imported Pillow
        started = time.perf_counter()
        pool.map(work, [files[::2], files[1::2]], chunksize=1)
        return time.perf_counter() - started


def _decode_and_resize(files: list[str], *, side: int, scaled: bool) -> int:
    from PIL import Image

    total = 0
    for path in files:
        with Image.open(path) as image:
            if scaled:
                share = 2 * side / min(image.size)  # the margin of 2 that is our default
                image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))
            edge = min(image.size)
            left, top = (image.width - edge) / 2, (image.height - edge) / 2
            small = image.convert("RGB").resize(
                (side, side), Image.Resampling.BILINEAR, box=(left, top, left + edge, top + edge)
            )
        total += len(np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1)).tobytes())
    return total


def _write_part(folder: Path, rows: int) -> Path:
    """The first images of Fashion-MNIST, and a hundred to test on, as IDX files."""
    import gzip
    import struct

    source = Path(locate(None, CACHE))
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", rows), ("t10k", 100)):
        for name, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
            path = next(source.glob(f"{prefix}-{name}-ubyte*"))
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                magic, _, *shape = struct.unpack(f">{1 + dimensions}I", file.read(4 + 4 * dimensions))
                header = struct.pack(f">{1 + dimensions}I", magic, count, *shape)
                (folder / f"{prefix}-{name}-ubyte").write_bytes(header + file.read(count * int(np.prod(shape))))
    return folder


def _jvm(spark: Any) -> int:
    return int(spark.sparkContext._jvm.java.lang.ProcessHandle.current().pid())


def _peak_mb(process: int) -> float:
    """Most memory that a process ever held."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


_READ = """
import json, resource, sys
from pipeline.data import TrainLoader, load_manifest
from pipeline.config.training import TrainSettings
from pipeline.config.dataset import ReaderSettings
from pipeline.distributed.worker import alone
found = load_manifest(sys.argv[1])
train = TrainSettings(epochs=1, batch_size=256)
source = TrainLoader(sys.argv[1], found, train, ReaderSettings(memory_bytes=0), alone("cpu"))
rows = 0
with source.batches(0) as batches:
    for batch in batches:
        rows += len(batch.labels)
print(json.dumps([rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def _reader_mb(dataset: Path) -> float:
    """Most memory of a process that reads one epoch, keeping nothing in memory."""
    done = subprocess.run([sys.executable, "-c", _READ, str(dataset)], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)[1])
