"""Manifests of datasets that have no files."""

from __future__ import annotations

from pipeline.data.manifest import Image, Ingested, Manifest, Shard, Split


def make(rows=10, aside=2, input_rows=12, groups=(6, 4), counts=(7, 3)) -> Manifest:
    shard = Shard(path="train/part-0.parquet", rows=rows, bytes=100, sha256="00", row_groups=groups)
    split = Split(rows=rows, label_counts=counts, pixel_sums=((9,), (81,)), mean=(0.5,), std=(0.25,), shards=(shard,))
    return Manifest(
        name="x",
        settings_digest="sha256:0",
        spark_application="local-1",
        image=Image(encoding="raw", shape=(1, 4, 4)),
        classes=("a", "b"),
        input_rows=input_rows,
        set_aside={"wrong_size": aside} if aside else {},
        sources=(Ingested(settings_digest="sha256:0", state="sha256:1", rows=input_rows),),
        splits={"train": split},
    )


def trainable(*splits: str) -> Manifest:
    """Of 1,000 images of 16 x 16 in each split, in four row groups, half of them of either class.

    splits : their names; without them train, validation and test
    """
    made = make(rows=1000, groups=(250,) * 4, counts=(500, 500))
    image = made.image.model_copy(update={"shape": (1, 16, 16)})
    names = splits or ("train", "validation", "test")
    return made.model_copy(update={"image": image, "splits": dict.fromkeys(names, made.split("train"))})
