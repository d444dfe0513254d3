"""Arms that are the same training under several names are told of; a grid that does nothing is an error."""

import re
from pathlib import Path

import pytest
from small_manifests import make

from models.build import NETWORKS
from models.norms.registry import NORMS
from models.settings_read import settings_read
from pipeline.config import SettingsError, load_settings
from pipeline.config.model import ModelSettings
from pipeline.study.arms import arms_of
from pipeline.study.same_arms import check_same_arms

REPOSITORY = Path(__file__).parents[2]
MANIFEST = make().model_copy(update={"image": make().image.model_copy(update={"shape": (3, 32, 32)})})


def check(*overrides):
    arms = arms_of(load_settings(REPOSITORY / "conf" / "quickstart.yaml", overrides))
    return check_same_arms(arms, MANIFEST)


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_reads_its_own_settings_and_no_others(norm):
    read = settings_read(ModelSettings(norm=norm), image_shape=(3, 32, 32), num_classes=10)
    assert ("norm_groups" in read) == ("group" in norm)
    assert ("norm_eps" in read) == (norm != "none")
    assert {"network", "norm", "depth", "width", "init_scale"} <= read and "heads" not in read


def test_the_recorded_settings_are_all_that_networks_ask_for():
    assert NETWORKS.keys() >= {"resnet50", "vit"}
    vit = ModelSettings(network="vit", norm="layer")
    assert {"heads", "patch", "norm_place"} <= settings_read(vit, image_shape=(3, 32, 32), num_classes=10)
    large = ModelSettings(network="resnet18")
    assert "depth" not in settings_read(large, image_shape=(3, 64, 64), num_classes=10)


def test_one_of_ones_own_may_read_everything():
    own = ModelSettings(network="mine.nets:build")
    assert settings_read(own, image_shape=(3, 32, 32), num_classes=10) is None


def test_a_setting_that_no_arm_reads_is_an_error():
    told = re.escape(
        "compare.grid varies model.depth, which makes no difference: no arm's network (resnet18) or norm reads it; "
        "take it out of the grid"
    )
    with pytest.raises(SettingsError, match=told):
        check("model.network=resnet18", "model.depth=[18, 34]", "model.norm=batch")


def test_arms_of_a_whole_grid_that_are_the_same_are_named():
    assert check("model.norm=[batch, group]", "model.norm_groups=[4, 8]") == [
        "the arms 'batch, norm_groups 4', 'batch, norm_groups 8' are the same training, since their network or norm "
        "does not read what sets them apart: leave all but one out of the grid"
    ]


def test_arms_that_differ_in_what_is_trained_are_not_the_same():
    assert check("model.norm=[none, batch]", "train.weight_decay=[0, 0.0005]") == []
    assert check("model.norm=[batch, group]", "model.depth=[3, 4]") == []
    assert check("model.input_size=[24, 32]") == []
    assert check("model.weights=[one.safetensors, other.safetensors]") == []


def test_weights_and_what_is_frozen_make_arms_of_every_network():
    """They are read around the network, not while it is built."""
    frozen = "compare.grid.model.freeze=[none, features.0]"
    assert check("model.norm=batch", "model.weights=[null, a.pt]", frozen) == []
