"""Shuffled reading of JPEG photographs at training: our reader and its peers, the same files, one run, warm file cache.

The peers run in an environment of their own (`make bench-peers`), since they pin other versions of what sparknorm uses.
The limits are two bare processes that decode the same bytes with Pillow, or with simplejpeg, and do nothing else: no
batches, no order, no channels first. A short form: BENCH_PHOTOS=512 BENCH_ROUNDS=1 BENCH_READ=2048.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_environment import IS_THERE, in_peers
from results import Result, compare, leave

from pipeline.config.dataset import DatasetSettings, ImageSettings, ReaderSettings, SourceSettings
from pipeline.config.training import TrainSettings
from pipeline.data import load_manifest, loader
from pipeline.data.shards import SplitFiles
from pipeline.distributed.worker import alone
from pipeline.ingest.job import ingest_dataset

SIZES = tuple(int(size) for size in os.environ.get("BENCH_SIZES", "256,224").split(","))
PHOTOS, BATCH = int(os.environ.get("BENCH_PHOTOS", "4096")), 64
ROUNDS, PASSES = int(os.environ.get("BENCH_ROUNDS", "3")), 3
PEERS = {
    "torch": "torch DataLoader with Pillow, 2 workers",
    "webdataset": "WebDataset, 2 workers",
    "streaming": "mosaicml-streaming, 2 workers",
    "litdata": "LitData, 2 workers",
}
OURS, OURS_THREADS = "sparknorm", "sparknorm, reader.decode_in: threads"
LIMITS = {
    "pillow": "limit: Pillow in two bare processes",
    "simplejpeg": "limit: simplejpeg in two bare processes",
}


def run(spark: Any, work: Path) -> None:
    """Every size in turn; a peer whose environment is not there is left out, and said to be."""
    results: list[Result] = []
    for size in SIZES:
        results += _of_size(spark, work / f"jpeg-{size}", size)
    results += _beside_a_busy_thread(work / f"jpeg-{SIZES[0]}" / "dataset")
    results += _memory(work / f"jpeg-{SIZES[0]}" / "dataset")
    leave("jpeg", results, f"reading of {PHOTOS:,} JPEG photographs, batch {BATCH}")
    for size in SIZES:
        shutil.rmtree(work / f"jpeg-{size}")


def _of_size(spark: Any, work: Path, size: int) -> list[Result]:
    dataset = _prepare(spark, work, size)
    ours = functools.partial(_ours, dataset)
    contenders: dict[str, Callable[[], list[float]]] = {
        OURS: functools.partial(ours, ReaderSettings()),
        OURS_THREADS: functools.partial(ours, ReaderSettings(decode_in="threads")),
        **{LIMITS[name]: functools.partial(_limit, dataset, name) for name in LIMITS},
        **{PEERS[name]: functools.partial(_peer, name, work) for name in PEERS if IS_THERE},
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            speeds[name] += contender()
    results = [Result(f"{name}, {size} px", "images/s", passes) for name, passes in speeds.items()]
    ours_name = f"{OURS}, {size} px"
    return results + [compare(results, ours_name, each.name) for each in results if each.name != ours_name]


def _prepare(spark: Any, work: Path, size: int) -> str:
    """The dataset, ingested from photographs, and the very files that are in it, in every peer's format."""
    shutil.rmtree(work, ignore_errors=True)
    _make_photos(work / "photos")
    settings = DatasetSettings(
        path=str(work / "dataset"),
        name="photos",
        source=SourceSettings(kind="folder", path=str(work / "photos")),
        image=ImageSettings(shape=(3, size, size), encoding="jpeg"),
        validation_share=0.0,
        test_share=0.02,
    )
    ingest_dataset(spark, settings, cache="runs/cache")
    shutil.rmtree(work / "photos")
    with closing(SplitFiles(settings.path, load_manifest(settings.path), "train")) as files:
        for number, rows in enumerate(files.group_rows.tolist()):
            labels = files.read_labels(number, 0, rows)
            for row, payload in enumerate(files.read_stored(number, 0, rows)):
                path = work / "files" / str(labels[row]) / f"{number:05d}{row:05d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(payload)
    if IS_THERE:
        in_peers("read.py", "write", str(work))
    return settings.path


def _make_photos(folder: Path) -> None:
    """Parts of scikit-learn's two photographs, 400 to 600 pixels wide."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(PHOTOS // 2):
            width, height = random.integers(400, 600), random.integers(300, 420)
            left, top = random.integers(0, 640 - width), random.integers(0, 427 - height)
            part = Image.fromarray(photo[top : top + height, left : left + width])
            part.save(folder / name / f"{number:05d}.jpg", quality=90)


def _ours(dataset: str, settings: ReaderSettings) -> list[float]:
    found = load_manifest(dataset)
    train = TrainSettings(batch_size=BATCH, epochs=PASSES + 1)
    steps, speeds = found.split("train").rows // BATCH, []
    with (
        closing(loader.TrainLoader(dataset, found, train, settings, alone("cpu"))) as source,
        source.batches(0) as batches,
    ):
        for _ in range(PASSES + 1):
            started = time.perf_counter()
            rows = sum(len(batch.labels) for batch in itertools.islice(batches, steps))
            speeds.append(rows / (time.perf_counter() - started))
            assert rows > 0.9 * found.split("train").rows, f"{rows} rows are no whole pass"
    return speeds[1:]


def _limit(dataset: str, name: str) -> list[float]:
    """Two processes that have the bytes in memory already."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    start = context.Barrier(3)
    processes = [context.Process(target=_decode, args=(dataset, name, half, start, results)) for half in (0, 1)]
    for process in processes:
        process.start()
    speeds = []
    start.wait(120)
    for _ in range(PASSES):
        start.wait(120)
        started = time.perf_counter()
        start.wait(120)
        speeds.append(sum(results.get() for _ in processes) / (time.perf_counter() - started))
    for process in processes:
        process.join()
    return speeds


def _decode(dataset: str, name: str, half: int, start: Any, results: Any) -> None:
    import simplejpeg
    from PIL import Image

    def by_pillow(payload: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(payload)))

    decode = {"pillow": by_pillow, "simplejpeg": simplejpeg.decode_jpeg}[name]
    with closing(SplitFiles(dataset, load_manifest(dataset), "train")) as files:
        groups = range(half, len(files.group_rows), 2)
        stored = [files.read_stored(number, 0, int(files.group_rows[number])) for number in groups]
    payloads = [payload for group in stored for payload in group]
    start.wait(120)
    for _ in range(PASSES):
        start.wait(120)
        for payload in payloads:
            decode(payload)
        start.wait(120)
        results.put(len(payloads))


def _peer(name: str, work: Path) -> list[float]:
    return json.loads(in_peers("read.py", name, str(work), str(BATCH), str(PASSES)).splitlines()[-1])


def _beside_a_busy_thread(dataset: Path) -> list[Result]:
    """Operations a second of a thread that launches small ones without pause, as a training of a GPU does, while images
    are decoded at the pace at which it takes them: a batch of 64 after each 400 operations."""
    speeds: dict[str, list[float]] = {"alone": [], "processes": [], "threads": []}
    for _ in range(ROUNDS):
        for how, passes in speeds.items():
            passes.append(_operations(str(dataset), how))
    names = {how: f"a thread of small operations, decoding in {how}" for how in speeds}
    names["alone"] = "a thread of small operations, nothing decoded"
    results = [Result(names[how], "operations/s", passes) for how, passes in speeds.items()]
    return results + [compare(results, names[how], names["alone"]) for how in ("processes", "threads")]


def _operations(dataset: str, how: str) -> float:
    """Of this thread alone: the wait for batches is not counted."""
    x, busy, steps = torch.zeros(64), 0.0, 40
    batches: Any = itertools.repeat(None)
    train = TrainSettings(batch_size=BATCH, epochs=2)
    with ExitStack() as stack:
        if how != "alone":
            settings = ReaderSettings(decode_in=how)
            source = stack.enter_context(
                closing(loader.TrainLoader(dataset, load_manifest(dataset), train, settings, alone("cpu")))
            )
            batches = stack.enter_context(source.batches(0))
        next(batches)
        for _ in range(steps):
            started = time.perf_counter()
            for _ in range(400):
                x.add_(1.0)
            busy += time.perf_counter() - started
            next(batches)
    return 400 * steps / busy


_READ = """
import itertools, json, sys
from contextlib import closing
from pathlib import Path
import psutil
from pipeline.config.dataset import ReaderSettings
from pipeline.config.training import TrainSettings
from pipeline.data import TrainLoader, load_manifest
from pipeline.distributed.worker import alone
def megabytes():
    me = psutil.Process()
    return sum(process.memory_full_info().pss for process in (me, *me.children())) / 2**20
dataset, batch, images = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
found = load_manifest(dataset)
steps = found.split("train").rows // batch
epochs = -(-images // (steps * batch))
train = TrainSettings(batch_size=batch, epochs=epochs)
source = TrainLoader(dataset, found, train, ReaderSettings(memory_bytes=0), alone("cpu"))
held = []
with closing(source), source.batches(0) as batches:
    for _ in range(epochs):
        for _ in itertools.islice(batches, steps):
            pass
        held.append(megabytes())
print(json.dumps(held))
"""


def _memory(dataset: Path) -> list[Result]:
    """Memory of a rank and its decoders after each epoch, 50,000 images in all; pages they share count once."""
    command = [sys.executable, "-c", _READ, str(dataset), str(BATCH), os.environ.get("BENCH_READ", "50000")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held = json.loads(done.stdout)
    results = [Result("a rank and its decoders, after the first epoch", "MB", held[:1])]
    results.append(Result("a rank and its decoders, after each later epoch", "MB", held[1:]))
    return results + [compare(results, results[1].name, results[0].name)]
