"""What is asked of every value that a study or a search may train, before anything is launched."""

from __future__ import annotations

from pipeline.config import Settings
from pipeline.data import Manifest
from pipeline.driver.checks import check_dataset, check_network
from pipeline.report.names import Values

# Up to so many networks are built before launch.
MOST_NETWORKS = 64


def check_trainable(settings: Settings, manifest: Manifest, networks: set[str]) -> None:
    """Check that settings go with the dataset and that their network can be built.

    Parameters
    ----------
    networks : those that were built before, which are not built again; this one is added. There are `MOST_NETWORKS` at
        most, and those beyond are built when they are trained

    Raises
    ------
    ValueError
        They cannot be trained.
    """
    check_dataset(settings, manifest)
    if (key := settings.model.model_dump_json()) not in networks and len(networks) < MOST_NETWORKS:
        check_network(settings, manifest)
        networks.add(key)


def values_in_words(values: Values) -> str:
    """``model.norm=group with model.norm_groups=3``"""
    return " with ".join(f"{name}={value}" for name, value in values.items())
