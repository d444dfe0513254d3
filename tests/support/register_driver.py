"""A process that registers, rolls back or counts when it is told to: `python register_driver.py`, asked with what `act`
takes.
"""

from __future__ import annotations

import random
import time

from second_driver import answer_without_spark

COUNTER = "counter"


def act(name: str, *request: object) -> str:
    """Do what a name says with the rest of a request; empty where that is done, or the error's name and text."""
    from pipeline.tracking.registry import RegistryError

    try:
        {"register": register_later, "rollback": rollback_later, "count": count, "hold": hold}[name](*request)
    except RegistryError as error:
        return f"RegistryError: {error}"
    return ""


def register_later(settings: str, most_seconds: float, seed: int) -> None:
    """`register` with settings (JSON) after a random while."""
    from pipeline.config.settings import Settings
    from pipeline.serving import register

    time.sleep(random.Random(seed).uniform(0, most_seconds))
    register(Settings.model_validate_json(settings))


def rollback_later(settings: str, most_seconds: float, seed: int) -> None:
    """`rollback` with settings (JSON) after a random while."""
    from pipeline.config.settings import Settings
    from pipeline.serving import rollback

    time.sleep(random.Random(seed).uniform(0, most_seconds))
    rollback(Settings.model_validate_json(settings))


def count(uri: str, model: str, times: int) -> None:
    """Add 1 to a number in a tag of the model so often, by a read and a write that only a claim can keep together."""
    registry = _registry(uri, model)
    from pipeline.serving.claim import claimed

    for _ in range(times):
        with claimed(registry, wait_seconds=120, outage_seconds=30):
            number = int(registry.model_tags()[COUNTER])
            time.sleep(0.02)
            registry.tag_model(COUNTER, str(number + 1))


def hold(uri: str, model: str) -> None:
    """Have the model until this process is killed."""
    from pipeline.serving.claim import claimed

    registry = _registry(uri, model)
    with claimed(registry, wait_seconds=120, outage_seconds=30):
        registry.tag_model(COUNTER, "held")
        time.sleep(600)


def _registry(uri: str, model: str):
    from pipeline.config.study import TrackingSettings
    from pipeline.tracking.registry import Registry

    return Registry(TrackingSettings(uri=uri, outage_seconds=30), None, model)


if __name__ == "__main__":
    answer_without_spark(act)
