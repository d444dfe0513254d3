"""What a run in MLflow says of itself: its settings as params, and where it comes from."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Settings, dotted, weights_text

_LONGEST_NAME = 250  # that MLflow allows


def params_of(settings: Settings, varied: Mapping[str, Sequence[Any]] | None = None) -> dict[str, object]:
    """Every effective setting by its dotted name.

    Parameters
    ----------
    varied
        The settings of which a comparison tries several values, with these: no single one would be true.
    """
    several = {name: ", ".join(map(str, values)) for name, values in (varied or {}).items()}
    tree = settings.model_dump(mode="json")
    weights = tree["train"]["class_weights"]
    if isinstance(weights, dict):  # names of classes may have any letters, and names of params few
        tree["train"]["class_weights"] = weights_text.write(weights)
    return {_param_name(name): value for name, value in {**dict(dotted.leaves(tree)), **several}.items()}


def _param_name(name: str) -> str:
    """A name as MLflow takes it for a param: other letters than those it allows become underscores."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:_LONGEST_NAME]


def origin() -> dict[str, str]:
    """Versions, and the git commit where there is one."""
    import pyspark
    import torch

    from pipeline import __version__

    versions = {"sparknorm": __version__, "version.torch": torch.__version__, "version.pyspark": pyspark.__version__}
    return versions | ({"mlflow.source.git.commit": commit} if (commit := _git_commit()) else {})


def _git_commit() -> str:
    """The commit this package runs from; empty where it is installed, or git is not."""
    folder = Path(__file__).parent
    if shutil.which("git") is None or not folder.is_dir():
        return ""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
