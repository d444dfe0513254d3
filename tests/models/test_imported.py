"""A network by its import path: what its function gets, what may be wrong with it, and which source it is of."""

import os
import random
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import build_model
from models.build import build_own
from models.imported import NetworkError, load, source_digest
from models.swap import NOTHING_REPLACED
from models.trial_batch import check_trains
from pipeline.config.model import ModelSettings

STRANGER = Path(__file__).parents[1] / "support" / "stranger"
SHAPE, CLASSES = (1, 8, 8), 5

OWN = """import torch
from torch import nn


def build(image_shape, num_classes, width=8, depth=1):
    channels, height, breadth = image_shape
    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width), nn.Flatten(),
                         nn.Linear(width * (height - 2) * (breadth - 2), num_classes))


class Net(nn.Module):
    def __init__(self, *, num_classes, image_shape, mode="good"):
        super().__init__()
        self.linear = nn.Linear(image_shape[1] * image_shape[2], num_classes)
        self.idle = nn.Linear(2, 2) if mode == "idle" else None
        self.mode = mode
        if mode == "raises":
            raise RuntimeError("no such weights\\nand more")

    @classmethod
    def small(cls, num_classes, image_shape):
        return cls(num_classes=num_classes, image_shape=image_shape)

    def forward(self, x):
        y = self.linear(x.flatten(1))
        if self.mode == "nan gradient":
            y = y + (self.linear.weight.sum() * 0).sqrt()
        return {
            "tuple": lambda: (y, y), "shape": lambda: y[:, :-1], "nan": lambda: y / 0 - y / 0,
            "detached": lambda: y.detach(), "view": lambda: y.view(7, 99),
            "argmax": lambda: y.argmax(1, keepdim=True).expand_as(y), "one": lambda: y if len(y) > 1 else y[0],
        }.get(self.mode, lambda: y)()


def any_option(num_classes, **options):
    return nn.Sequential(nn.Flatten(), nn.Linear(options["inputs"], num_classes))


def needs(num_classes, size):
    pass


def by_position(size, /):
    pass


def nothing(num_classes):
    pass


def draws(num_classes):
    import random, numpy
    linear = nn.Linear(64, num_classes)
    linear.bias.data[:2] = torch.tensor([random.random(), numpy.random.rand()])
    return nn.Sequential(nn.Flatten(), linear)


number, network = 3, nn.Linear(3, 3)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of modules that can be imported, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("own", "photonets", "lacks", "broken", "raises"):
            del sys.modules[name]


def make(path, norm="keep", seed=0, **options):
    settings = ModelSettings(network=path, options=options, norm=norm, norm_groups=2)
    return build_model(settings, image_shape=SHAPE, num_classes=CLASSES, seed=seed)


def tried(path, **options):
    check_trains(path, make(path, **options), image_shape=SHAPE, num_classes=CLASSES)


def test_its_function_gets_shape_classes_and_options(folder):
    network = make("own:build", width=6)
    assert [tuple(p.shape) for p in network.parameters()] == [(6, 1, 3, 3), (6,), (6,), (6,), (5, 216), (5,)]
    images = torch.randint(0, 256, (3, *SHAPE), dtype=torch.uint8)
    assert network(images).shape == (3, CLASSES)
    for path in ("own:build", "own:Net", "own:Net.small"):
        tried(path)
    tried("own:any_option", inputs=64)  # which names no image_shape, and so does not get it


def test_the_norm_comes_after_it_was_built_and_leaves_its_weights(folder):
    kept, grouped, batch = (make("own:build", norm) for norm in ("keep", "group", "batch"))
    assert isinstance(kept[1][1], nn.BatchNorm2d)
    assert {type(network[1][1]).__name__ for network in (grouped, batch)} == {"GroupNorm", "BatchNorm"}
    for network in (grouped, batch):
        assert torch.equal(network[1][0].weight, kept[1][0].weight)
        assert torch.equal(network[1][3].weight, kept[1][3].weight)


def test_one_seed_draws_the_same_weights_and_leaves_random_states_alone(folder):
    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    def seed_all():
        torch.manual_seed(7), random.seed(7), np.random.seed(7)

    seed_all()
    expected = draw()
    seed_all()
    weights = [[p.clone() for p in make("own:draws", seed=seed).parameters()] for seed in (3, 3, 4)]
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not any(map(torch.equal, weights[0], weights[2]))
    assert draw() == expected


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("nowhere:build", {}, "there is no module nowhere to import here: give its .py file or zip in spark.py_files"),
        ("own.nets:build", {}, "there is no module own.nets to import here"),
        ("lacks:build", {}, r"importing lacks raised ModuleNotFoundError: No module named 'not_installed' \(lacks.py"),
        ("broken:build", {}, r"importing broken raised SyntaxError: .* \(broken.py, line 1\)"),
        ("raises:build", {}, r"importing raises raised KeyError: 'x' \(raises.py, line 2\)"),
        ("own:biuld", {}, "own has no biuld; did you mean build?"),
        ("own:Net.large", {}, "own has no Net.large"),
        ("own:number", {}, "number is a int: name a function or class that builds a network"),
        ("own:network", {}, "network is a network already: name a function or class that builds one"),
        (
            "own:build",
            {"widht": 3},
            r"its signature has no widht \(model.options\); it has depth, width; did you mean w",
        ),
        ("own:build", {"num_classes": 3}, "model.options.num_classes is given by sparknorm itself: take it out"),
        ("own:needs", {}, "it needs size: set model.options.size"),
        ("own:by_position", {}, "it takes size by position, and is called with keywords alone"),
        ("own:nothing", {}, "it returned None, and must return a torch.nn.Module"),
        ("own:any_option", {}, r"it raised KeyError: 'inputs' \(own.py, line 36\)"),
        ("own:Net", {"mode": "raises"}, r"it raised RuntimeError: no such weights \(own.py, line 18\)"),
        ("own:Net", {"mode": "tuple"}, r"training on 4 images of 1 x 8 x 8 gave a tuple, and must give one tensor"),
        ("own:Net", {"mode": "shape"}, r"gave the shape \(4, 4\), and must give logits \(4, 5\)"),
        ("own:Net", {"mode": "argmax"}, "gave torch.int64, and logits are floats"),
        ("own:Net", {"mode": "nan"}, "gave logits that are not finite"),
        ("own:Net", {"mode": "view"}, r"training on 4 images of 1 x 8 x 8 raised RuntimeError: .* \(own.py, line 30\)"),
        ("own:Net", {"mode": "one"}, r"evaluation on one image of 1 x 8 x 8 gave the shape \(5,\)"),
        ("own:Net", {"mode": "idle"}, "no gradient reaches idle.weight, idle.bias: use them in the forward pass"),
        ("own:Net", {"mode": "detached"}, "its logits depend on no parameter that is trained"),
        ("own:Net", {"mode": "nan gradient"}, "the gradient of linear.weight is not finite"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_that_names_the_setting(folder, path, options, words):
    (folder / "lacks.py").write_text("import not_installed\n")
    (folder / "broken.py").write_text("x = (\n")
    (folder / "raises.py").write_text("a = 1\nraise KeyError('x')\n")
    with pytest.raises(NetworkError, match=words) as error:
        tried(path, **options)
    assert str(error.value).startswith(f"model.network {path}: ")
    assert len(str(error.value).splitlines()) == 1


def test_keep_is_for_a_network_of_ones_own():
    with pytest.raises(ValueError, match=r"model\.norm keep leaves the norm layers of a network of your own"):
        make("cnn")
    with pytest.raises(ValueError, match="one of your own is written as module:function"):
        make("own.build", norm="batch")


def test_a_norm_that_does_not_fit_is_said_of_the_network(folder):
    with pytest.raises(NetworkError, match=r"own:build: model\.norm 'nrm' is unknown; known are none, batch"):
        make("own:build", "nrm")
    with pytest.raises(NetworkError, match=r"own:Net: evaluation raised RuntimeError: shape .* \(own.py, line 30\)"):
        make("own:Net", "group", mode="view")


def test_what_of_a_strangers_network_stays_as_it_was_is_remarked(monkeypatch, folder):
    monkeypatch.syspath_prepend(STRANGER)
    settings = ModelSettings(network="photonets.nets:build", options={"head_norm": True}, norm="group", norm_groups=4)
    network, remarks = build_own(settings, image_shape=SHAPE, num_classes=CLASSES)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert any("head_norm" in remark for remark in remarks)
    kept, remarks = build_own(settings.model_copy(update={"norm": "keep"}), image_shape=SHAPE, num_classes=CLASSES)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in kept.modules()) == 5
    assert remarks == []


@pytest.mark.parametrize("norm", ["group", "none", "batch"])
def test_a_network_without_norm_layers_is_remarked(norm, recwarn):
    settings = ModelSettings(network="fine_tuned_net:without_norm", norm=norm)
    _, remarks = build_own(settings, image_shape=SHAPE, num_classes=CLASSES)
    assert remarks == [f"nothing was replaced: {NOTHING_REPLACED}"]
    assert not recwarn.list


def zip_of(package, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(package.rglob("*.py")):
            archive.write(file, file.relative_to(package.parent))
    return path


def test_the_digest_is_of_the_whole_package_wherever_it_lies(folder, monkeypatch):
    monkeypatch.syspath_prepend(STRANGER)
    in_a_folder = source_digest("photonets.nets:build")
    monkeypatch.syspath_prepend(zip_of(STRANGER / "photonets", folder / "photonets.zip"))
    load("photonets.nets:build")
    assert "photonets.zip" in sys.modules["photonets"].__file__
    assert source_digest("photonets.nets:build") == source_digest("photonets.blocks:Residual") == in_a_folder
    assert source_digest("own:build") != in_a_folder
    before = source_digest("own:build")
    (folder / "own.py").write_text(OWN + "# a comment\n")
    assert source_digest("own:build") != before


def test_source_that_changes_is_imported_anew(folder, monkeypatch):
    """Also within a second, with as many letters, where Python keeps what it compiles."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert len(make("own:build")[1][0].weight) == 8
    written = (folder / "own.py").stat()
    (folder / "own.py").write_text(OWN.replace("width=8", "width=9"))
    os.utime(folder / "own.py", ns=(written.st_atime_ns, written.st_mtime_ns))
    assert len(make("own:build")[1][0].weight) == 9
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "own.py").write_text(OWN.replace("width=8", "width=7"))
    sys.path.insert(0, str(elsewhere))
    try:
        assert len(make("own:build")[1][0].weight) == 7
    finally:
        sys.path.remove(str(elsewhere))
