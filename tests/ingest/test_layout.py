"""Row groups, and names of files: arithmetic."""

import pytest

from pipeline.config.dataset import DeformSettings
from pipeline.ingest.images import ImageSpec
from pipeline.ingest.layout import Layout, fitting_row_group_rows


@pytest.mark.parametrize(
    ("shape", "train_rows", "rows"),
    [
        ((1, 28, 28), 60_000, 937),  # 64 groups
        ((1, 28, 28), 1_000_000, 2_048),
        ((3, 64, 64), 1_000_000, 341),  # 4 MB
        ((3, 224, 224), 1_000_000, 32),
        ((3, 64, 64), 10, 1),
    ],
)
def test_row_groups_suit_images_and_rows(shape, train_rows, rows):
    assert fitting_row_group_rows(ImageSpec(shape), train_rows) == rows


def test_shards_are_numbered_through_all_splits():
    layout = Layout(
        dataset="data", prefix="part-0", splits=(("train", 3), ("test", 1), ("quarantine", 1)), form="file",
        pixel_shape=None, image=ImageSpec((3, 8, 8)), num_classes=2, row_group_rows=30, compression="none", expand=1,
        deform=DeformSettings(), seed=0,
    )  # fmt: skip
    assert [layout.file_of(shard) for shard in range(5)] == [
        *(("train", f"train/part-0-0000{number}") for number in range(3)),
        ("test", "test/part-0-00000"),
        ("quarantine", "quarantine/part-0-00000"),
    ]
