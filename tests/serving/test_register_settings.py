"""Settings that `register` refuses before it asks MLflow for anything."""

import pytest
from small_models import train_network

from pipeline.config.registry import RegistrySettings
from pipeline.config.settings import Settings, SettingsError
from pipeline.serving import register
from pipeline.serving.gate import check_split
from pipeline.tracking.registry import RegistryError


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a/b", r"'a/b' cannot be the name of a registered model: write it without"),
        ("main..pets", r"'main\.\.pets' cannot be the name of a registered model"),
        ("é" * 121, r"é{20}\.\.\. has 242 bytes: the name of a registered model has 240 at most"),
    ],
)
def test_names_that_no_registry_takes(name, words):
    with pytest.raises(ValueError, match=words):
        RegistrySettings(model=name)


def test_the_name_of_the_study_has_to_do_as_a_name(tmp_path):
    with pytest.raises(SettingsError, match=r"name 'a:b' cannot be the name of a registered model: .*; or set reg"):
        register(Settings(name="a:b", output=str(tmp_path)))


def test_a_split_without_images_is_named(tmp_path):
    manifest = train_network(tmp_path).manifest
    check_split(manifest, "test")
    with pytest.raises(RegistryError, match=r"registry.split validation: dataset .* has no images of it; it has test,"):
        check_split(manifest, "validation")
