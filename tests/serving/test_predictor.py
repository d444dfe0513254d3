"""A model folder gives what the trained network gives, of images that it makes as ingest does."""

import json
import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch
from small_models import photo, write_model
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data import reasons
from pipeline.data.codec import BadImageError, decode_stored
from pipeline.data.manifest import Image, Preparation
from pipeline.ingest.images import ImageSpec, from_file
from pipeline.serving import Predictor
from pipeline.serving.served import ServedImage, ServedModelError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def predictor(made):
    return Predictor.load(made[0])


def expected(trained, images):
    with torch.inference_mode():
        return torch.softmax(trained.network(torch.from_numpy(images)), dim=1).numpy()


def test_probabilities_are_those_of_the_trained_network(made, predictor):
    images = np.random.default_rng(1).integers(0, 256, (37, 3, 12, 10), dtype=np.uint8)
    probabilities = predictor.probabilities(images)
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (37, 3))
    np.testing.assert_allclose(probabilities, expected(made[1], images), atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert len(predictor.served.fold.folded) == 3
    assert predictor.probabilities(images[:0]).shape == (0, 3)


def test_an_image_does_not_depend_on_its_batch(predictor, monkeypatch):
    images = np.random.default_rng(2).integers(0, 256, (9, 3, 12, 10), dtype=np.uint8)
    together = predictor.probabilities(images)
    alone = np.concatenate([predictor.probabilities(images[n : n + 1]) for n in range(9)])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    monkeypatch.setattr("pipeline.serving.predictor._PIXELS_AT_ONCE", 2 * 120)
    np.testing.assert_allclose(predictor.probabilities(torch.from_numpy(images)), together, atol=1e-6)


@pytest.mark.parametrize(("side", "at_once"), [(28, 167), (64, 32), (400, 8), (2048, 1)])
def test_a_cpu_gets_as_many_images_at_once_as_its_caches_hold(predictor, side, at_once):
    """Those of one core, at least 8, and fewer only where memory says so."""
    lots = []

    def network(images):
        lots.append(len(images))
        return torch.zeros(len(images), 3)

    served = predictor.served.model_copy(
        update={"image": predictor.served.image.model_copy(update={"shape": (1, side, side)})}
    )
    count, before = 2 * at_once + 1, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        answers = Predictor(served, network, torch.device("cpu")).probabilities(np.zeros((count, 1, side, side), "u1"))
    finally:
        torch.set_num_threads(before)
    assert (lots, len(answers)) == ([at_once, at_once, 1], count)


@pytest.mark.parametrize("channels", [1, 3])
def test_convolutions_give_channels_last(tmp_path, channels):
    """Of one channel both layouts have the same bytes, and torch goes by the strides of the weights."""
    outputs = []

    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **kwargs or {})
            if "conv" in function.__name__:
                outputs.append(found)
            return found

    folder, trained = write_model(tmp_path, shape=(channels, 12, 10))
    images = np.random.default_rng(3).integers(0, 256, (5, channels, 12, 10), dtype=np.uint8)
    made = Predictor.load(folder)
    with Convolutions():
        probabilities = made.probabilities(images)
    assert len(outputs) == 3
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)
    np.testing.assert_allclose(probabilities, expected(trained, images), atol=1e-5)


def test_pixels_are_read_where_they_lie(predictor):
    """Arrow's buffers cannot be written to, and torch would warn of that."""
    images = np.frombuffer(bytes(3 * 12 * 10), np.uint8).reshape(1, 3, 12, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert predictor.probabilities(images).shape == (1, 3)


def test_arrays_that_are_turned_round_and_those_that_are_none(predictor):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 12, 10), dtype=np.uint8)
    turned = predictor.probabilities(images[:, ::-1])
    np.testing.assert_array_equal(turned, predictor.probabilities(images[:, ::-1].copy()))
    with pytest.raises(ValueError, match="images are a list: the model takes an array of numpy or torch"):
        predictor.probabilities([images[0]])
    with pytest.raises(ValueError, match="images are an array of objects, as of images of several shapes"):
        predictor.probabilities(np.array([images[0], None], dtype=object))


@pytest.mark.parametrize("device", ["cuda:7", "gpu"])
def test_a_device_that_is_not_there(tmp_path, device):
    folder, _ = write_model(tmp_path)
    with pytest.raises(ServedModelError, match=f"device {device} cannot be used here: .+"):
        Predictor.load(folder, device)


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_file_becomes_what_ingest_stores_of_it(tmp_path, encoding, orientation):
    folder, _ = write_model(tmp_path, resize="letterbox", jpeg_quality=40)
    content = json.loads((folder / "served.json").read_text())
    content["image"]["encoding"] = encoding
    (folder / "served.json").write_text(json.dumps(content))
    predictor = Predictor.load(folder)
    data = photo(31, 44, orientation=orientation)
    assert (predictor.image.encoding, predictor.image.resize) == (encoding, "letterbox")
    stored = decode_stored(from_file(data, predictor.image), encoding, (3, 12, 10))
    np.testing.assert_array_equal(predictor.decode(data), stored)
    assert predictor.decode(data).shape == (3, 12, 10)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, reasons.MISSING_IMAGE),
        (b"", reasons.EMPTY),
        (b"no image", reasons.UNDECODABLE),
        (photo(40, 40)[:-200], reasons.TRUNCATED),
        (photo(40, 40, kind="PNG") + bytes(1 << 20), reasons.TOO_MANY_BYTES),
        (photo(1001, 1000), reasons.TOO_MANY_PIXELS),
    ],
)
def test_a_file_that_is_no_image_is_refused_with_the_reason(predictor, data, reason):
    with pytest.raises(BadImageError) as error:
        predictor.decode(data)
    assert str(error.value) == reason


def test_images_of_another_shape_or_dtype_are_refused(predictor):
    words = r"images are uint8 of shape \[2, 1, 12, 10\]: the model takes uint8 of shape \[2, 3, 12, 10\], values 0 to"
    with pytest.raises(ValueError, match=words):
        predictor.probabilities(np.zeros((2, 1, 12, 10), np.uint8))
    with pytest.raises(ValueError, match="images are float32 of shape"):
        predictor.probabilities(np.zeros((2, 3, 12, 10), np.float32))


def test_a_folder_that_holds_no_model(made, tmp_path):
    with pytest.raises(ServedModelError, match=r"holds no model of sparknorm: there is no served\.json"):
        Predictor.load(tmp_path)
    content = json.loads((made[0] / "served.json").read_text())
    for change, words in (
        ({"format": 2}, "has format 2, this version of sparknorm runs 1: install the one that wrote it"),
        ({"classes": 3}, "served.json is damaged: 1 validation error for ServedModel"),
    ):
        (tmp_path / "served.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(ServedModelError, match=words):
            Predictor.load(tmp_path)
    (tmp_path / "served.json").write_text("{")
    with pytest.raises(ServedModelError, match=r"served\.json is damaged: Expecting property name"):
        Predictor.load(tmp_path)
    (tmp_path / "served.json").write_text(json.dumps(content))
    with pytest.raises(ServedModelError, match=r"has a served.json and no network.pt2 that can be read"):
        Predictor.load(tmp_path)
    (tmp_path / "network.pt2").write_bytes((made[0] / "network.pt2").read_bytes()[:-1])
    with pytest.raises(ServedModelError, match=r"network.pt2 is not what served.json says: it was cut or changed"):
        Predictor.load(tmp_path)


def test_all_that_ingest_decides_of_an_image_is_known_to_the_model():
    """What is added to one of them and not to the others would be another preprocessing."""
    decided = {field.name for field in fields(ImageSpec)} | {"max_bytes"}
    assert set(ServedImage.model_fields) == decided
    assert set(Preparation.model_fields) | set(Image.model_fields) == decided
