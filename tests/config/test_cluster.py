import pytest

from pipeline.config import SettingsError, load_settings
from pipeline.config.cluster import SparkSettings


def test_numbers_and_booleans_become_the_texts_that_spark_writes():
    assert SparkSettings(conf={"a": True, "b": 2, "c": 0.5, "d": "x"}).conf == {
        "a": "true", "b": "2", "c": "0.5", "d": "x",
    }  # fmt: skip


@pytest.mark.parametrize("value", [".inf", "1e9"])
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("workers.stall_seconds", 604800),
        ("workers.collective_timeout_seconds", 604800),
        ("workers.slots_wait_seconds", 604800),
        ("workers.heartbeat_seconds", 3600),
        ("tracking.outage_seconds", 604800),
        ("registry.wait_seconds", 604800),
    ],
)
def test_waits_are_bounded(tmp_path, name, most, value):
    (tmp_path / "study.yaml").write_text("name: x\n")
    with pytest.raises(SettingsError) as refused:
        load_settings(tmp_path / "study.yaml", [f"{name}={value}"])
    (line,) = str(refused.value).splitlines()
    assert f"{name}: input should be less than or equal to {most}" in line.lower()
