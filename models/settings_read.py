"""Which settings of the model its network reads while it is built: the others make no difference to it."""

from __future__ import annotations

from typing import Any

from models.build import build_model
from pipeline.config.import_path import is_import_path
from pipeline.config.model import ModelSettings

# What is done to every network after it is built, also to one of one's own.
OF_EVERY_NETWORK = frozenset({"weights", "weights_sha256", "freeze", "mean", "std"})


class _Recorder:
    """The settings, and the names of those that were asked for."""

    def __init__(self, settings: ModelSettings):
        self._settings = settings
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self._settings, name)


def settings_read(
    settings: ModelSettings, *, image_shape: tuple[int, int, int], num_classes: int
) -> frozenset[str] | None:
    """The names of the settings that the network of these settings depends on, as ``depth`` or ``norm_groups``.

    Returns
    -------
    names : frozenset of str or None
        None for a network of one's own, whose function may do as it likes with its options.
    """
    if is_import_path(settings.network):
        return None
    recorder = _Recorder(settings)
    build_model(recorder, image_shape=image_shape, num_classes=num_classes)  # type: ignore[arg-type]
    return frozenset(recorder.names) | OF_EVERY_NETWORK
