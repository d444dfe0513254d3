"""One peer reads JPEG photographs, shuffled, as batches of uint8 (N, C, H, W): images per second of each pass.

``python read.py CONTENDER FOLDER BATCH PASSES`` prints a JSON list. It runs in `.venv-peers` and knows nothing of
sparknorm. Every contender has two worker processes, as many as sparknorm has decoders; the pass that starts them is not
counted.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import library as operators
from torch.utils.data import DataLoader, Dataset

# torchvision for CUDA beside torch for CPUs: its compiled operators cannot be loaded, and these it needs on import.
for _name in ("nms", "qnms"):
    operators.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torchvision.transforms.functional import pil_to_tensor  # noqa: E402

WORKERS = 2
# Samples that are shuffled together, about a tenth of the photographs of the benchmark.
WINDOW = 400


def decoded(payload: bytes) -> torch.Tensor:
    return pil_to_tensor(Image.open(io.BytesIO(payload)))


class Files(Dataset[Any]):
    """JPEG files below a folder, each in the folder of its class."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.rglob("*.jpg"))
        names = sorted({file.parent.name for file in self.files})
        self.labels = [names.index(file.parent.name) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Any:
        return decoded(self.files[number].read_bytes()), self.labels[number]


def torch_loader(folder: Path, batch: int) -> Any:
    options: Any = {"num_workers": WORKERS, "persistent_workers": True, "prefetch_factor": 4}
    return DataLoader(Files(folder / "files"), batch, shuffle=True, drop_last=True, **options)


def webdataset_loader(folder: Path, batch: int) -> Any:
    import webdataset

    shards = sorted(str(path) for path in (folder / "webdataset").glob("*.tar"))
    made = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), seed=1)
        .shuffle(WINDOW)
        .to_tuple("jpg", "cls")
        .map_tuple(decoded, int)
        .batched(batch)
    )
    return webdataset.WebLoader(made, batch_size=None, num_workers=WORKERS, persistent_workers=True, prefetch_factor=4)


def streaming_loader(folder: Path, batch: int) -> Any:
    from streaming import StreamingDataset

    class Photos(StreamingDataset):  # type: ignore[misc, unused-ignore]
        def __getitem__(self, number: int) -> Any:
            row = super().__getitem__(number)
            return pil_to_tensor(row["image"]), row["label"]

    made = Photos(local=str(folder / "streaming"), shuffle=True, batch_size=batch, shuffle_block_size=WINDOW)
    return DataLoader(made, batch, drop_last=True, num_workers=WORKERS, persistent_workers=True, prefetch_factor=4)


def litdata_loader(folder: Path, batch: int) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset

    class Photos(StreamingDataset):  # type: ignore[misc, unused-ignore]
        def __getitem__(self, number: Any) -> Any:  # its own decoder is torchvision's, whose operators are not here
            row = super().__getitem__(number)
            return decoded(row["image"]), row["label"]

    made = Photos(str(folder / "litdata"), shuffle=True, drop_last=True)
    return StreamingDataLoader(
        made, batch_size=batch, num_workers=WORKERS, persistent_workers=True, prefetch_factor=4, drop_last=True
    )


def write(folder: Path) -> None:
    """The same files in each peer's own format."""
    from litdata import optimize
    from streaming import MDSWriter

    files = Files(folder / "files")
    rows = list(zip(files.files, files.labels, strict=True))
    (folder / "webdataset").mkdir()
    for number, first in enumerate(range(0, len(rows), 512)):
        with tarfile.open(folder / "webdataset" / f"{number:05d}.tar", "w") as tar:
            for file, label in rows[first : first + 512]:
                key = f"{label}-{file.stem}"
                for name, data in ((f"{key}.jpg", file.read_bytes()), (f"{key}.cls", str(label).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    columns = {"image": "jpeg", "label": "int"}
    with MDSWriter(out=str(folder / "streaming"), columns=columns, size_limit=32 << 20) as writer:
        for file, label in rows:
            writer.write({"image": Image.open(file), "label": label})
    optimize(fn=_litdata_row, inputs=rows, output_dir=str(folder / "litdata"), num_workers=2, chunk_bytes="32MB")


def _litdata_row(row: tuple[Path, int]) -> Any:
    return {"image": row[0].read_bytes(), "label": row[1]}


LOADERS = {
    "torch": torch_loader,
    "webdataset": webdataset_loader,
    "streaming": streaming_loader,
    "litdata": litdata_loader,
}


def images_of(batch: Any) -> torch.Tensor:
    images = batch[0]
    assert images.dtype == torch.uint8
    assert images.shape[1] == 3, images.shape
    return images


def passes(loader: Any) -> Iterator[float]:
    while True:
        started, rows = time.perf_counter(), 0
        for batch in loader:
            rows += len(images_of(batch))
        yield rows / (time.perf_counter() - started)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
        return
    contender, folder, batch, count = sys.argv[1:]
    speeds = passes(LOADERS[contender](Path(folder), int(batch)))
    next(speeds)
    print(json.dumps([next(speeds) for _ in range(int(count))]))


if __name__ == "__main__":
    main()
