"""Real image files and tables of images, and what became of them in a dataset."""

from __future__ import annotations

import io
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.config.dataset import DatasetSettings
from pipeline.data import load_manifest

SHAPE = (3, 8, 8)


def picture(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    """uint8 (H, W, 3) of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_picture(path: Path, seed: int, kind: str = "PNG", **size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(seed, **size), kind))
    return path


def write_folder(root: Path, count: int, first: int = 0, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """``count`` PNG files, picture ``n`` as CLASS/n.png, classes in turn."""
    for number in range(first, first + count):
        write_picture(root / classes[number % len(classes)] / f"{number}.png", number)
    return root


def put_pictures(folder: str, count: int, first: int = 0) -> str:
    """The same into a folder on S3."""
    numbers = range(first, first + count)
    fsspec.filesystem("s3").pipe({f"{folder}/{('cat', 'dog')[n % 2]}/{n}.png": encoded(picture(n)) for n in numbers})
    return folder


def folder_settings(dataset: Path, folder: Path, *, image: dict | None = None, source: dict | None = None, **changes):
    """Settings for a folder (or, by ``source``, a table) of pictures of `SHAPE`."""
    values = {
        "path": str(dataset),
        "name": "pictures",
        "source": {"kind": "folder", "path": str(folder), **(source or {})},
        "image": {"shape": SHAPE, **(image or {})},
        "validation_share": 0.2,
        "test_share": 0.2,
        **changes,
    }
    return DatasetSettings.model_validate(values)


def rows_of(dataset: Path, version: int | None = None) -> dict[int, dict]:
    """Every row of the dataset by its id, with its split."""
    rows: dict[int, dict] = {}
    for split, found in load_manifest(str(dataset), version).splits.items():
        for shard in found.shards:
            for row in pq.read_table(Path(dataset, shard.path)).to_pylist():
                assert row["id"] not in rows, f"two rows have the id {row['id']}"
                rows[row["id"]] = {**row, "split": split}
    return rows


def set_aside(dataset: Path) -> list[dict]:
    """What the manifest's quarantine files say: id, origin, reason."""
    names = load_manifest(str(dataset)).quarantine
    return [row for name in names for row in pq.read_table(Path(dataset, name)).to_pylist()]


def stored(seed: int) -> bytes:
    """Picture ``seed`` as a raw dataset holds it."""
    return picture(seed).transpose(2, 0, 1).tobytes()


def write_table(path: Path, columns: dict) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path / "some.parquet")
    return path


def check_statistics(dataset: Path, decode=None) -> None:
    """Mean, deviation and label counts of every split against numpy over its rows; every row is counted."""
    found = load_manifest(str(dataset))
    rows = list(rows_of(dataset).values())
    decode = decode or (lambda image: np.frombuffer(image, np.uint8).reshape(found.image.shape))
    assert found.input_rows == len(rows) + sum(found.set_aside.values())
    assert sum(found.set_aside.values()) == len(set_aside(dataset))
    for name, split in found.splits.items():
        mine = [row for row in rows if row["split"] == name]
        pixels = np.stack([decode(row["image"]) for row in mine]) / 255
        np.testing.assert_allclose(split.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(split.std, pixels.std((0, 2, 3)), rtol=1e-9)
        labels = [row["label"] for row in mine]
        assert split.label_counts == tuple(np.bincount(labels, minlength=len(found.classes)))
