"""Thousands of damaged images through the real ingest job, and hundreds of damaged shards through the reader."""

import hashlib
import io
import multiprocessing
import struct
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_shards import open_files, read_all, write_dataset

from pipeline.config.dataset import DatasetSettings, ImageSettings, SourceSettings
from pipeline.data import plan, reader
from pipeline.data.manifest import DatasetError
from pipeline.data.shards import SplitFiles
from pipeline.ingest.images import ImageSpec, from_file
from pipeline.ingest.job import ingest_dataset

SPEC = ImageSpec((3, 24, 24))
FILES = {
    "PNG": [("L", {}), ("RGB", {}), ("RGBA", {}), ("LA", {}), ("P", {}), ("1", {}), ("I;16", {})],
    "JPEG": [("L", {}), ("RGB", {"quality": 90}), ("RGB", {"progressive": True}), ("CMYK", {})],
    "WEBP": [("RGB", {}), ("RGB", {"lossless": True}), ("RGBA", {}), ("RGBA", {"lossless": True})],
    "BMP": [("L", {}), ("RGB", {}), ("P", {}), ("1", {})],
}
SIZES = [(24, 24), (31, 40), (50, 7), (90, 110)]
# The last bytes of a file may say only that it ends, or fill it up.
TAIL = 12


def originals() -> list[tuple[str, bytes]]:
    """(format, payload) of every kind of file, smooth with some noise."""
    random = np.random.default_rng(1)
    made = []
    for kind, modes in FILES.items():
        for mode, options in modes:
            for width, height in SIZES:
                slope = np.add.outer(np.arange(height), np.arange(width))[..., None] * [1, 2, 1.5]
                image = Image.fromarray((slope + random.integers(0, 60, (height, width, 3))).astype(np.uint8))
                buffer = io.BytesIO()
                (_in_mode(image, mode)).save(buffer, kind, **options)
                made.append((kind, buffer.getvalue()))
    return made


def _in_mode(image, mode):
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.quantize(64) if mode == "P" else image.convert(mode)


def cut(data, random):
    return data[: random.integers(1, len(data) - TAIL)]


def flip(data, random, most=4):
    damaged = bytearray(data)
    for place in random.integers(0, len(data), random.integers(1, most + 1)):
        damaged[place] ^= 1 << int(random.integers(8))
    return bytes(damaged)


def _block(data, random):
    size = int(random.integers(1, max(2, min(200, len(data) // 3))))
    first = int(random.integers(0, len(data) - size))
    return first, first + size


def zero(data, random):
    first, end = _block(data, random)
    return data[:first] + bytes(end - first) + data[end:]


def double(data, random):
    first, end = _block(data, random)
    return data[:end] + data[first:]


def delete(data, random):
    first, end = _block(data, random)
    return data[:first] + data[end:]


def insert(data, random):
    first, end = _block(data, random)
    return data[:first] + random.bytes(end - first) + data[first:]


def overwrite(data, random):
    first, end = _block(data, random)
    return data[:first] + random.bytes(end - first) + data[end:]


DAMAGES = (cut, flip, zero, double, delete, insert, overwrite)


def bomb(kind, random) -> bytes:
    """A small file whose header claims 100 million pixels and more."""
    width, height = (int(side) for side in random.integers(10_000, 65_000, 2))
    if kind == "PNG":
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        pixels = b"IDAT" + zlib.compress(bytes(100_000))
        chunks = [
            struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, pixels, b"IEND")
        ]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    if kind == "JPEG":
        frame = struct.pack(">BHHB", 8, height, width, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
        return b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xda\0\2" + random.bytes(50)
    if kind == "WEBP":
        canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + canvas + random.bytes(50)
        return b"RIFF" + struct.pack("<I", len(body)) + body
    return struct.pack("<2sIIIIiiHHIIIIII", b"BM", 54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(99)


def payloads() -> list[tuple[str, bytes | None, bytes | None]]:
    """(what must become of it, payload, the stored image of its undamaged original).

    kept, aside; checked: aside, or the pixels are whole (PNG has checksums); open: if kept, then of the right shape
    """
    random = np.random.default_rng(2)
    whole = [(kind, data, from_file(data, SPEC)) for kind, data in originals()]
    rows = [("kept", data, stored) for _, data, stored in whole for _ in range(3)]
    for kind, data, stored in whole:
        for damage in DAMAGES:
            must = "aside" if damage is cut else "checked" if kind == "PNG" else "open"
            rows += [(must, damage(data, random), stored) for _ in range(4)]
        other = whole[random.integers(len(whole))]
        part = int(random.integers(4, 60))
        if other[0] != kind:
            rows.append(("open", data[:part] + other[1][part:], None))
        rows.append(("aside", bomb(kind, random), None))
        rows.append(("aside", random.bytes(int(random.integers(1, 3000))), None))
        magic = {"PNG": 8, "JPEG": 3, "WEBP": 16, "BMP": 2}[kind]
        rows.append(("open", data[:magic] + random.bytes(500), None))
    rows += [("aside", b"", None), ("aside", None, None)] * 5
    return [rows[row] for row in random.permutation(len(rows))]


@pytest.mark.spark
def test_damaged_images_are_set_aside_and_good_ones_kept(spark, tmp_path):
    rows = payloads()
    assert sum(must != "kept" for must, _, _ in rows) >= 2000
    (tmp_path / "table").mkdir()
    for number, first in enumerate(range(0, len(rows), 700)):
        part = range(first, min(first + 700, len(rows)))
        labels = [f"class {row % 3}" for row in part]
        table = pa.table({"id": part, "label": labels, "image": pa.array([rows[row][1] for row in part], pa.binary())})
        pq.write_table(table, tmp_path / "table" / f"{number}.parquet")
    made, _ = ingest_dataset(
        spark,
        DatasetSettings(
            path=str(tmp_path / "data"),
            name="damaged",
            source=SourceSettings(kind="parquet", path=str(tmp_path / "table"), id_column="id"),
            image=ImageSettings(shape=SPEC.shape),
            max_bad_share=1.0,
        ),
        cache="unused",
    )
    shards = [f"{tmp_path}/data/{shard.path}" for split in made.splits.values() for shard in split.shards]
    kept = {row["id"]: row for row in pq.read_table(shards).to_pylist()}
    aside = {
        row["id"]: row for row in pq.read_table([f"{tmp_path}/data/{name}" for name in made.quarantine]).to_pylist()
    }
    assert sum(split.rows for split in made.splits.values()) == len(kept)
    assert sum(made.set_aside.values()) == len(aside)
    assert sorted([*kept, *aside]) == list(range(len(rows)))
    assert Counter(row["reason"] for row in aside.values()) == made.set_aside
    fates = Counter((must, number in kept) for number, (must, _, _) in enumerate(rows))
    print(f"\n{len(rows)} payloads, {fates}, set aside: {made.set_aside}")
    for number, (must, _, stored) in enumerate(rows):
        if number in aside:
            assert must != "kept", (number, aside[number]["reason"])
            continue
        assert must != "aside", number
        assert len(kept[number]["image"]) == SPEC.raw_bytes
        assert kept[number]["label"] == number % 3
        if must in ("kept", "checked"):
            assert kept[number]["image"] == stored, number
    for split in made.splits:
        assert read_all(SplitFiles(f"{tmp_path}/data", made, split))[0].shape == (made.splits[split].rows, *SPEC.shape)


def grow(data, random):
    return data + random.bytes(int(random.integers(1, 100)))


def empty(data, random):
    return b""


def footer(data, random):
    """Bits of the footer, where Parquet says what lies where."""
    size = min(len(data), int.from_bytes(data[-8:-4], "little") + 8)
    return data[:-size] + flip(data[-size:], random)


SHARD_DAMAGES = (*DAMAGES, grow, empty, footer)


def damaged_shards(folder, count, seed):
    """Damage one shard after the other, and mend it again: yields its path."""
    random = np.random.default_rng(seed)
    paths = sorted(Path(folder).glob("train/*.parquet"))
    whole = {path: path.read_bytes() for path in paths}
    for number in range(count):
        path = paths[random.integers(len(paths))]
        kind = number % (len(SHARD_DAMAGES) + 2)
        if kind < len(SHARD_DAMAGES):
            data = SHARD_DAMAGES[kind](whole[path], random)
            if data == whole[path]:
                continue
            path.write_bytes(data)
        elif kind == len(SHARD_DAMAGES):
            path.unlink()
        else:
            path.write_bytes(whole[paths[paths.index(path) - 1]])  # another shard's content
        yield path
        path.write_bytes(whole[path])


def read_epoch(path, **settings) -> list[bytes]:
    files = open_files(str(path), **settings)
    planned = plan.plan_epoch(files.group_rows, lanes=4, batch_size=8, shuffle_row_groups=2, seed=0, epoch=0)
    batches = reader.train_batches(files, lambda _: planned, range(4), epochs=1)
    return [hashlib.sha256(batch.images.numpy().tobytes()).digest() for batch in batches]


@pytest.mark.parametrize(("encoding", "memory_bytes"), [("raw", 0), ("raw", 1 << 30), ("png", 0), ("png", 1 << 30)])
def test_every_damaged_shard_is_an_error_that_names_it(tmp_path, encoding, memory_bytes):
    write_dataset(str(tmp_path), (48, 40, 44, 48), encoding=encoding, row_group_rows=10)
    seen, before = 0, set(threading.enumerate())
    for path in damaged_shards(tmp_path, 120, seed=memory_bytes):
        start = time.monotonic()
        with pytest.raises(DatasetError, match=rf"{path.name}, row group \d+: (is missing|is cut|is too long|was alt)"):
            read_epoch(tmp_path, memory_bytes=memory_bytes)
        assert time.monotonic() - start < 60
        seen += 1
    assert seen >= 100
    assert read_epoch(tmp_path)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("sparknorm-")]


def read_unverified(folder: str, seed: int) -> list[tuple[str, str]]:
    """What becomes of damaged shards whose checksum is not looked at: (file, same, other or the error) of each."""
    whole, found = read_epoch(folder, verify="off"), []
    for path in damaged_shards(folder, 120, seed):
        try:
            outcome = "same" if read_epoch(folder, verify="off") == whole else "other"
        except DatasetError as error:
            outcome = str(error)
        found.append((path.name, outcome))
    return found


@pytest.fixture(scope="module")
def other_process():
    """A parser written in C++ could take its process with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("written", [{}, {"encoding": "png"}, {"compression": "zstd"}], ids=["raw", "png", "zstd"])
def test_without_verification_damaged_shards_crash_and_hang_nothing(other_process, tmp_path, written):
    write_dataset(str(tmp_path), (48, 40, 44, 48), row_group_rows=10, **written)
    found = other_process.submit(read_unverified, str(tmp_path), 5).result(
        timeout=240
    )  # a busy machine takes a minute, a hang for ever
    assert len(found) >= 100
    for name, outcome in found:
        assert outcome in ("same", "other") or f"{name}, row group" in outcome
    print(f"\n{written}: {Counter(o if o in ('same', 'other') else 'error' for _, o in found)}")
