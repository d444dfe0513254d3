"""Mixup and cutmix: what images and labels become, that both agree, and that no number of workers changes them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.config.augment import AugmentSettings
from pipeline.config.training import TrainSettings
from pipeline.training.augment import mix
from pipeline.training.augment.draws import BatchRows
from pipeline.training.augment.mixing import _draw_shares
from pipeline.training.step import MeanLoss

LANES, LANE_ROWS, CLASSES = 4, 8, 5
# Each image has one grey value that no other has: what is mixed can be read off.
GREY = torch.arange(LANES * LANE_ROWS) * 8
IMAGES = GREY.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 20, 30).contiguous()
LABELS = torch.from_numpy(np.random.default_rng(0).integers(0, CLASSES, LANES * LANE_ROWS))
MIXED = {
    "mixup": AugmentSettings(mixup=0.4),
    "cutmix": AugmentSettings(cutmix=1.0),
    "both": AugmentSettings(mixup=0.4, cutmix=1.0),
    "some": AugmentSettings(cutmix=1.0, mix_probability=0.5),
}


def mixed(settings, lanes=range(LANES), step=0):
    rows = BatchRows(0, step, lanes, LANES, LANE_ROWS)
    own = torch.cat([torch.arange(lane * LANE_ROWS, (lane + 1) * LANE_ROWS) for lane in lanes])
    return mix(IMAGES[own], LABELS[own], settings, rows, classes=CLASSES)


@pytest.mark.parametrize("kind", MIXED)
def test_labels_are_shares_of_what_is_seen_and_come_from_the_same_lane(kind):
    """With n shades of grey in an image its mean tells the share of the other one."""
    for step in range(8):
        images, labels = mixed(MIXED[kind], step=step)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.float32
        assert torch.allclose(labels.sum(1), torch.ones(len(labels)))
        for row, (image, label) in enumerate(zip(images.double(), labels, strict=True)):
            lane = slice(row // LANE_ROWS * LANE_ROWS, (row // LANE_ROWS + 1) * LANE_ROWS)
            own, seen, share = float(GREY[row]), float(image.mean()), float(label[LABELS[row]])
            explained = False
            for grey, other in zip(GREY[lane].tolist(), LABELS[lane].tolist(), strict=True):
                if other == LABELS[row]:  # any share of both has this label
                    explained |= share == 1 and min(own, grey) <= seen <= max(own, grey)
                elif label[other] > 0:
                    explained |= abs(share * own + (1 - share) * grey - seen) <= 0.5
            assert explained


def test_mixup_blends_whole_images_and_cutmix_fills_one_rectangle():
    blended, _ = mixed(MIXED["mixup"])
    assert (blended == blended[:, :1, :1, :1]).all()
    assert (blended[:, 0, 0, 0] != GREY).float().mean() > 0.3
    filled, _ = mixed(MIXED["cutmix"])
    sizes = set()
    for image, grey in zip(filled, GREY, strict=True):
        other = image[0] != grey
        if other.any():
            y, x = other.nonzero(as_tuple=True)
            assert other[y.min() : y.max() + 1, x.min() : x.max() + 1].all()
            assert image[0][other].unique().numel() == 1
            sizes.add((int(y.max() - y.min()), int(x.max() - x.min())))
    assert len(sizes) > 8


def test_both_kinds_and_a_probability():
    images, _ = mixed(MIXED["both"])
    whole = (images == images[:, :1, :1, :1]).all(dim=(1, 2, 3))
    assert 5 < int(whole.sum()) < 27
    unchanged = [int((mixed(MIXED["some"], step=step)[1].amax(1) == 1).sum()) for step in range(30)]
    none = [int((mixed(MIXED["cutmix"], step=step)[1].amax(1) == 1).sum()) for step in range(30)]
    assert sum(unchanged) - sum(none) > 250  # of 960


def test_weights_are_drawn_of_the_beta_distribution():
    """Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2 a + 1))."""
    for alpha in (0.2, 1.0):
        shares = []
        for step in range(150):
            rows = BatchRows(0, step, range(LANES), LANES, LANE_ROWS)
            shares.append(_draw_shares(AugmentSettings(mixup=alpha), rows)[1])
        shares = np.concatenate(shares)
        assert shares.mean() == pytest.approx(0.5, abs=0.02)
        assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("world_size", [2, 4])
def test_mixed_images_are_the_same_for_any_number_of_workers(kind, world_size):
    images, labels = mixed(MIXED[kind], step=7)
    for rank in range(world_size):
        lanes = range(rank, LANES, world_size)
        own_images, own_labels = mixed(MIXED[kind], lanes, step=7)
        assert torch.equal(own_images, images.view(LANES, LANE_ROWS, 3, 20, 30)[list(lanes)].flatten(0, 1))
        assert torch.equal(own_labels, labels.view(LANES, LANE_ROWS, CLASSES)[list(lanes)].flatten(0, 1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 2.0, 1.0, 0.5])], ids=["", "weights"])
def test_the_loss_of_mixed_labels_is_the_mixed_loss_of_labels(smoothing, weight):
    """Zhang et al. 2018, section 3: the loss is linear in the label."""
    logits = torch.randn(32, CLASSES, generator=torch.Generator().manual_seed(0))
    loss = MeanLoss(TrainSettings(batch_size=32, label_smoothing=smoothing), "cpu", weight)
    other = LABELS.roll(1)
    share = 0.3
    one_hot = F.one_hot(LABELS, CLASSES).float()
    both = share * one_hot + (1 - share) * one_hot.roll(1, 0)
    expected = share * loss(logits, LABELS, lambda x: x) + (1 - share) * loss(logits, other, lambda x: x)
    assert float(loss(logits, both, lambda x: x)) == pytest.approx(float(expected), rel=1e-5)
    assert loss(logits.double(), both, lambda x: x).dtype == torch.float64


def test_a_lane_of_one_row_has_nothing_to_mix_with():
    with pytest.raises(ValueError, match=r"mixup mixes images of one lane.*use fewer train\.lanes, or a larger batch"):
        AugmentSettings(mixup=0.2).check(image_shape=(3, 28, 28), lane_rows=1, reader="arrow")
    AugmentSettings(mixup=0.2, mix_probability=0).check(image_shape=(3, 28, 28), lane_rows=1, reader="arrow")
