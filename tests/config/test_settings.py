import pytest

from pipeline.config import Settings
from pipeline.config.settings import digest_of


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings(name="x").train.epochs = 3


def test_digest_depends_on_values_and_not_on_order():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of(Settings(name="x")) != digest_of(Settings(name="y"))
