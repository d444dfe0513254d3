"""Arms that are one training under several names, since their networks do not read a setting that the grid varies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipeline.config.settings import SettingsError
from pipeline.data import Manifest
from pipeline.study.arms import Arm

_MODEL = "model."


def check_same_arms(arms: Sequence[Arm], manifest: Manifest) -> list[str]:
    """Return a sentence for each group of arms that are the same training.

    A grid of several settings may have such arms: of ``norm: [batch, group]`` and ``norm_groups: [4, 8]`` batch norm
    ignores the groups.

    Raises
    ------
    SettingsError
        The grid varies a setting of the model that no arm's network reads.
    """
    varied = [name for name in arms[0].values if name.startswith(_MODEL)]
    if not varied:
        return []
    read = [_settings_read(arm, manifest) for arm in arms]
    for name in varied:
        if not any(names is None or name.removeprefix(_MODEL) in names for names in read):
            networks = ", ".join(dict.fromkeys(arm.settings.model.network for arm in arms))
            raise SettingsError(
                f"compare.grid varies {name}, which makes no difference: no arm's network ({networks}) or norm reads "
                "it; take it out of the grid"
            )
    groups: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for arm, names in zip(arms, read, strict=True):
        different = [
            (name, repr(value))
            for name, value in arm.values.items()
            if names is None or not name.startswith(_MODEL) or name.removeprefix(_MODEL) in names
        ]
        groups[tuple(different)].append(arm.name)
    return [
        f"the arms {', '.join(map(repr, names))} are the same training, since their network or norm does not read what "
        "sets them apart: leave all but one out of the grid"
        for names in groups.values()
        if len(names) > 1
    ]


def _settings_read(arm: Arm, manifest: Manifest) -> frozenset[str] | None:
    from models.settings_read import settings_read

    return settings_read(arm.settings.model, image_shape=manifest.image.shape, num_classes=len(manifest.classes))
