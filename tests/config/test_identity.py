"""What 0.7.0 has begun and finished is found again, also by versions that have more settings."""

import json
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config import identity
from pipeline.config.dotted import leaves
from pipeline.config.identity import NEUTRAL, identity_of
from pipeline.config.settings import Settings
from pipeline.config.study import CompareSettings
from pipeline.config.training import FinalNetwork, TrainSettings
from pipeline.driver import trial
from pipeline.ingest import existing
from pipeline.study import job as study
from pipeline.training.checkpoint import differences

# The sections of 0.7.0's default settings, which are fixed here: a default that changes later changes nothing here.
OF_0_7_0 = json.loads(Path(__file__).with_name("settings-0.7.0.json").read_text())
MANIFEST = SimpleNamespace(digest="sha256:0", version=1)


@pytest.fixture
def old(tmp_path):
    """Settings as a file for 0.7.0 states them in full."""
    return Settings.model_validate({"name": "x", "output": str(tmp_path), **OF_0_7_0})


def test_every_entry_is_a_setting_or_a_section():
    assert {"train.final_network", "compare.checkpoint"} <= NEUTRAL.keys()
    settings = Settings(name="x")
    for name in NEUTRAL:
        *sections, last = name.split(".")
        assert last in type(reduce(getattr, sections, settings)).model_fields, name


@pytest.mark.parametrize("section", OF_0_7_0)
def test_settings_that_came_later_have_a_neutral_value(old, section):
    later = set(dict(leaves(identity_of(section, getattr(old, section))))) - set(dict(leaves(OF_0_7_0[section])))
    assert not later, f"enter {section}.{later} into NEUTRAL, with the value that does what versions before it did"
    assert identity_of(section, getattr(old, section)) == OF_0_7_0[section]


def test_what_0_7_0_has_begun_goes_on(old):
    """The folders and the digest that 0.7.0 itself has made of these settings."""
    assert Path(trial._begin(old, MANIFEST, "x", None).record.folder).name == "x-9a7b65db6b31"
    assert Path(study._find_record(old, MANIFEST).folder).name == "x-443f255f47ba"
    digest = "sha256:52dcb09810c2947f35801d7a7eacb35688ce7a4dab56ae4776d56bbbc05d3a89"
    assert existing.settings_digest(old.dataset, SimpleNamespace(fingerprint="f")) == digest


class ChangedTrain(TrainSettings):
    """Of a version still later, with another default."""

    final_network: FinalNetwork = "lowest_loss"


def test_a_later_setting_at_its_neutral_value_is_no_part_and_at_another_it_is():
    train = {"final_network": "lowest_loss"}
    assert identity_of("train", TrainSettings(**train)) == {**identity_of("train", TrainSettings()), **train}
    compared = {"checkpoint": "best_on_validation"}
    assert identity_of("compare", CompareSettings(**compared)) == identity_of("compare", CompareSettings()) | compared


def test_a_default_that_changes_later_is_not_taken_for_the_old_one():
    before, after = TrainSettings(), ChangedTrain()
    assert identity_of("train", after) == {**identity_of("train", before), "final_network": "lowest_loss"}
    assert identity_of("train", ChangedTrain(final_network="last")) == identity_of("train", before)


def test_a_later_section_with_a_setting_later_still(monkeypatch):
    """The section has an entry for what it began with, and each later setting of it one of its own."""
    others = {name: value for name, value in NEUTRAL.items() if name.startswith("train.augment.")}
    section = {"train.augment": {"flip": False, "shift": 0}, "train.augment.cutout": 0, **others}
    monkeypatch.setattr(identity, "NEUTRAL", section)
    assert "augment" not in identity_of("train", TrainSettings())
    assert identity_of("train", TrainSettings(augment={"cutout": 2}))["augment"] == {
        "flip": False, "shift": 0, "cutout": 2,
    }  # fmt: skip


def test_a_refusal_names_the_neutral_value():
    before, after = ({"train": identity_of("train", TrainSettings(final_network=f))} for f in ("last", "lowest_loss"))
    assert differences(before, after) == ["train.final_network is 'last' there, 'lowest_loss' here"]
    assert differences(after, before) == ["train.final_network is 'lowest_loss' there, 'last' here"]
