import numpy as np
import pytest
import torch

from pipeline.config.augment import AugmentSettings
from pipeline.training.augment import augment, placement

LANES = 8
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (LANES * 4, 2, 6, 5), dtype=np.uint8))
BOTH = AugmentSettings(flip=True, shift=2)


def part(lanes):
    return IMAGES.view(LANES, 4, 2, 6, 5)[list(lanes)].flatten(0, 1)


def changed(lanes, settings=BOTH, step=0, seed=0):
    return augment(part(lanes), settings, seed=seed, step=step, lanes=lanes, num_lanes=LANES)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_images_are_the_same_for_any_number_of_workers(world_size):
    whole = changed(range(LANES)).view(LANES, 4, 2, 6, 5)
    for rank in range(world_size):
        lanes = range(rank, LANES, world_size)
        assert torch.equal(changed(lanes), whole[list(lanes)].flatten(0, 1))


def test_another_step_or_seed_changes_other_images():
    assert torch.equal(changed(range(LANES)), changed(range(LANES)))
    assert not torch.equal(changed(range(LANES)), changed(range(LANES), step=1))
    assert not torch.equal(changed(range(LANES)), changed(range(LANES), seed=1))


def test_off_is_the_identity():
    assert torch.equal(changed(range(LANES), AugmentSettings()), IMAGES)


def test_flip_gives_each_image_or_its_mirror():
    out = changed(range(LANES), AugmentSettings(flip=True))
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(out, IMAGES, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(out, IMAGES, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 4 < sum(mirrored) < 28


def test_shift_is_a_crop_of_the_padded_image():
    out = changed(range(LANES), AugmentSettings(shift=2))
    padded = np.pad(IMAGES.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    corners = set()
    for image, frame in zip(out.numpy(), padded, strict=True):
        found = [(y, x) for y in range(5) for x in range(5) if np.array_equal(image, frame[:, y : y + 6, x : x + 5])]
        assert len(found) == 1
        corners.add(found[0])
    assert len(corners) > 10


def test_cutout_puts_the_mean_colour_into_a_square():
    settings = AugmentSettings(cutout=3)
    out = augment(IMAGES, settings, seed=0, step=0, lanes=range(LANES), num_lanes=LANES, mean=[0.5, 0.2])
    colour = torch.tensor([128, 51], dtype=torch.uint8).view(2, 1, 1)
    sizes, places = set(), set()
    for before, after in zip(IMAGES, out, strict=True):
        inside = (after == colour).all(0) & (before != colour).any(0)
        assert torch.equal(after[:, ~inside], before[:, ~inside])
        y, x = inside.nonzero(as_tuple=True)
        assert inside[y.min() : y.max() + 1, x.min() : x.max() + 1].all()
        sizes.add((int(y.max() - y.min()) + 1, int(x.max() - x.min()) + 1))
        places.add((int(y.min()), int(x.min())))
    assert {(3, 3), (2, 3)} <= sizes  # whole inside, cut off at the borders
    assert max(max(size) for size in sizes) == 3
    assert len(places) > 5


def test_cutout_is_the_same_for_any_number_of_workers_and_leaves_the_other_draws_alone():
    settings = AugmentSettings(flip=True, shift=2, cutout=2)
    whole = changed(range(LANES), settings).view(LANES, 4, 2, 6, 5)
    assert torch.equal(changed(range(1, LANES, 2), settings), whole[1::2].flatten(0, 1))
    unmarked = (whole.flatten(0, 1) == changed(range(LANES), BOTH)).all(1)
    assert unmarked.float().mean() > 0.7


def test_alternating_flip_shows_every_image_both_ways_in_two_epochs():
    """Jordan 2024: half of the images are mirrored in even epochs, the others in odd ones."""
    ids = torch.from_numpy(np.random.default_rng(1).integers(-(2**62), 2**62, LANES * 4))
    settings = AugmentSettings(flip="alternating")

    def mirrored(epoch, step, images=IMAGES, ids=ids, lanes=range(LANES), seed=0):
        options = {"seed": seed, "step": step, "lanes": lanes, "num_lanes": LANES, "epoch": epoch, "ids": ids}
        out = augment(images, settings, **options)
        return [not torch.equal(a, b) for a, b in zip(out, images, strict=True)]

    first, second = mirrored(0, 3), mirrored(1, 20)
    assert [not flip for flip in first] == second
    assert mirrored(2, 31) == first
    assert 8 < sum(first) < 24
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    assert mirrored(0, 3, IMAGES[order], ids[order]) == [first[number] for number in order]  # whatever its place
    assert mirrored(0, 3, part(range(1, 8, 2)), ids.view(LANES, 4)[1::2].flatten(), range(1, 8, 2)) == list(
        np.array(first).reshape(LANES, 4)[1::2].ravel()
    )
    assert mirrored(0, 3, seed=1) not in (first, second)


def test_alternating_flip_is_even_over_ids_that_follow_each_other():
    flips = np.array([placement.alternating(np.arange(100_000), 0, seed) for seed in range(3)])
    assert flips.mean(1) == pytest.approx(np.full(3, 0.5), abs=0.006)
    assert (flips[0] == flips[1]).mean() == pytest.approx(0.5, abs=0.006)
    assert (flips[0, 1:] == flips[0, :-1]).mean() == pytest.approx(0.5, abs=0.006)


def test_the_names_of_flips():
    assert AugmentSettings(flip="random") == AugmentSettings(flip=True)
    assert AugmentSettings(flip="random").model_dump(mode="json")["flip"] is True
    with pytest.raises(ValueError, match="flip"):
        AugmentSettings(flip="sometimes")
    with pytest.raises(ValueError, match=r"flip alternating needs reader\.kind arrow"):
        AugmentSettings(flip="alternating").check(image_shape=(3, 28, 28), lane_rows=2, reader="petastorm")
