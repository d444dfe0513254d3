"""Which versions have made a checkpoint or a finished training, and what happens where they are not those of today.

Numbers depend on them: another torch adds in another order, another sparknorm may count or train otherwise. So what
others have made is taken up only with a warning, or not at all (``checkpoint.other_versions``).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Mapping

from pipeline import __version__
from pipeline.config.training import OtherVersions

PACKAGES = ("sparknorm", "torch")


class VersionsError(ValueError):
    """Other versions have made this, and the settings refuse it."""


def current_versions() -> dict[str, str]:
    """The versions of `PACKAGES` here, without that of the build (``+cpu``). A driver may have no torch."""
    versions = {"sparknorm": __version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["torch"] = importlib.metadata.version("torch").partition("+")[0]
    return versions


def check_versions(what: str, made_with: Mapping[str, str], rule: OtherVersions, warn: Callable[[str], None]) -> None:
    """Warn, or refuse, where something was made with other versions than those here.

    Parameters
    ----------
    what : names it in a sentence: ``checkpoint runs/...``
    made_with : by package; empty where 0.7.0 or an earlier version has made it, which did not say
    rule : the setting ``checkpoint.other_versions``
    warn : is called with the warning

    Raises
    ------
    VersionsError
        The versions differ, and the rule is ``refuse``.
    """
    here = current_versions()
    if made_with and all(made_with.get(package) == version for package, version in here.items()):
        return
    text = f"{what} was made with {_words(made_with)}, and here is {_words(here)}"
    if rule == "refuse":
        raise VersionsError(
            f"{text}: use those versions, begin anew in another `output`, or set checkpoint.other_versions=warn"
        )
    warn(f"{text}: its numbers may differ from what these versions give (checkpoint.other_versions)")


def _words(versions: Mapping[str, str]) -> str:
    if not versions:
        return "sparknorm 0.7.0 or earlier, which did not note versions"
    return " and ".join(f"{package} {versions[package]}" for package in PACKAGES if package in versions)
