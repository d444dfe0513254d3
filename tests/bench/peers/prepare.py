"""One peer prepares a folder of photographs: decoded, cropped to a square, resized, stored as JPEG in its own format.

``python prepare.py CONTENDER PHOTOS OUTPUT SIZE`` prints the seconds of the work, the start of Python and imports left
out. It runs in `.venv-peers` and knows nothing of sparknorm. Both have two processes.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image


def stored(file: Path, size: int) -> bytes:
    """As sparknorm makes it: the centre, resampled once, quality 92, colour at full resolution."""
    with Image.open(file) as image:
        edge = min(image.size)
        left, top = (image.width - edge) / 2, (image.height - edge) / 2
        box = (left, top, left + edge, top + edge)
        small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def row(file: Path, size: int) -> Any:
    return {"image": stored(file, size), "label": file.parent.name}


def _shards(part: list[Path], number: int, output: Path, size: int) -> None:
    import webdataset

    with webdataset.ShardWriter(str(output / f"{number}-%05d.tar"), maxsize=32 << 20, verbose=0) as writer:
        for file in part:
            writer.write({"__key__": file.stem, "jpg": stored(file, size), "cls": file.parent.name.encode()})


def webdataset(files: list[Path], output: Path, size: int) -> None:
    output.mkdir()
    arguments = [(files[number::2], number, output, size) for number in (0, 1)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_shards, arguments, chunksize=1)


def litdata(files: list[Path], output: Path, size: int) -> None:
    from litdata import optimize

    optimize(
        fn=functools.partial(row, size=size), inputs=files, output_dir=str(output), num_workers=2, chunk_bytes="32MB"
    )


def main() -> None:
    contender, photos, output, size = sys.argv[1:]
    files = sorted(Path(photos).rglob("*.jpg"))
    started = time.perf_counter()
    {"webdataset": webdataset, "litdata": litdata}[contender](files, Path(output), int(size))
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
