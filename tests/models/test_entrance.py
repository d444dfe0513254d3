"""The centre that a network cuts out of larger images, in evaluation, export and folding alike."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model, fold
from models.entrance import CentreCrop
from models.resample import bilinear_taps
from pipeline.config.model import ModelSettings
from pipeline.serving.formats import FORMATS
from pipeline.serving.result import ONNX_PACKAGES

HAS_ONNX = all(importlib.util.find_spec(name) for name in ONNX_PACKAGES)
KINDS = [
    pytest.param(
        name, marks=pytest.mark.skipif(name == "onnx" and not HAS_ONNX, reason="needs pip install 'sparknorm[onnx]'")
    )
    for name in FORMATS
]


def images_of(height, width, rows=3, seed=0):
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, (rows, 3, height, width), dtype=np.uint8))


def make(image_shape, **settings):
    settings = ModelSettings(**{"network": "resnet", "depth": 8, "width": 4, **settings})
    return build_model(settings, image_shape=image_shape, num_classes=5, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2])


@pytest.mark.parametrize(("stored", "size"), [((20, 20), 16), ((21, 30), 16), ((16, 20), 16)])
def test_the_centre_is_cut_out_as_it_is(stored, size):
    images = images_of(*stored)
    top, left = (stored[0] - size) // 2, (stored[1] - size) // 2
    out = CentreCrop(None, size)(images)
    assert torch.equal(out, images[:, :, top : top + size, left : left + size])
    assert CentreCrop(None, size)(out) is out


@pytest.mark.parametrize(
    ("stored", "share", "size", "side"),
    [((40, 40), 0.875, 16, 35), ((40, 60), 1.0, 16, 40), ((50, 41), 0.5, 16, 20), ((20, 20), 0.8, 32, 16)],
)
def test_a_centre_of_another_size_is_resized_as_pillow_does(stored, share, size, side):
    images = images_of(*stored)
    out = CentreCrop(share, size)(images)
    assert out.dtype == torch.float32
    top, left = (stored[0] - side) // 2, (stored[1] - side) // 2
    for image, found in zip(images, out.numpy(), strict=True):
        part = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + side, top + side))
        expected = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(expected - found).max() <= 1  # it rounds twice


@pytest.mark.parametrize(("length", "out"), [(256, 224), (7, 7), (5, 20), (300, 3), (1, 4)])
def test_weights_of_a_pixel_sum_to_one(length, out):
    taps = bilinear_taps(length, out)
    assert taps.weights.sum(-1).numpy() == pytest.approx(np.ones(out), abs=1e-12)
    assert taps.weights.min() >= 0
    assert 0 <= taps.indices.min() <= taps.indices.max() <= length - 1
    centres = (taps.weights * (taps.indices + 0.5)).sum(-1)
    inner = slice(out // 4, out - out // 4)  # the filter of a pixel at the border is cut off on one side
    assert centres[inner].numpy() == pytest.approx((np.arange(out) + 0.5)[inner] * length / out, abs=length / out)


def test_a_network_gives_the_same_for_an_image_and_for_its_centre():
    model = make((3, 20, 24), input_size=16).eval()
    images = images_of(20, 24)
    torch.testing.assert_close(model(images), model(images[:, :, 2:18, 4:20]), rtol=0, atol=0)
    assert list(model.state_dict()) == list(make((3, 16, 16)).state_dict())
    plain = make((3, 16, 16)).eval()
    assert torch.equal(plain(images[:, :, 2:18, 4:20]), model(images))


def test_in_bfloat16_the_centre_is_cut_out_as_exactly():
    model = make((3, 24, 24), input_size=16, centre_crop=1.0).eval()
    exact = model[0](images_of(24, 24))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0](images_of(24, 24)), exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("how", "evaluated"),
    [
        ({"input_size": 16}, True),
        ({"input_size": 12, "centre_crop": 0.875}, False),
        ({"input_size": 12, "centre_crop": 0.875}, True),
    ],
    ids=["cut", "resized", "resized before"],
)
def test_every_format_serves_stored_images(kind, how, evaluated):
    """Also where the network was evaluated before, as where a trained one is exported."""
    model = make((3, 20, 24), **how).eval().requires_grad_(False)
    if evaluated:
        with torch.inference_mode():
            model(images_of(20, 24))
    form = FORMATS[kind]
    run = form.load(form.write(model, torch.zeros(2, 3, 20, 24, dtype=torch.uint8)))
    for rows in (1, 3):
        images = images_of(20, 24, rows)
        with torch.inference_mode():
            torch.testing.assert_close(run(images), model(images), rtol=1e-5, atol=1e-5)


def test_norms_of_such_a_network_are_folded():
    model = make((3, 20, 20), input_size=16, centre_crop=0.9).eval()
    folded = fold(model)
    assert folded.folded
    torch.testing.assert_close(folded.model(images_of(20, 20)), model(images_of(20, 20)), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"model\.input_size 32 is larger than stored images, 20 x 24"):
        make((3, 20, 24), input_size=32)
    make((3, 20, 24), input_size=32, centre_crop=1.0)
    with pytest.raises(
        ValueError, match=r"centre_crop 0\.9 cuts out of images .* stored ones have that size: set it to"
    ):
        make((3, 32, 32), input_size=32, centre_crop=0.9)
    with pytest.raises(ValueError, match=r"centre_crop 0\.5 is resized to input_size, which is not set"):
        ModelSettings(centre_crop=0.5)
    with pytest.raises(ValueError, match="at least 32"):  # of the network's own size
        make((3, 64, 64), network="resnet18", input_size=16)
