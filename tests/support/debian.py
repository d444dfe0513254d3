"""Programs that tests use where a machine has them or can get them from Debian."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

INSTALL_SECONDS = 300


def skip_unless_ci(reason: str) -> NoReturn:
    """Skip the test with a reason; in CI, where nothing may be missing, fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def need(name: str, *, package: str, below: str = "") -> Path:
    """The path of a program, installed first where this user may do that. Without it, the test is skipped, in CI
    failed.

    Parameters
    ----------
    name : of the program
    package : Debian's package that has it
    below : pattern of absolute folders to look in before PATH, as Debian has some programs in one folder per version
    """
    if found := _find(name, below):
        return found
    problem = _install(package)
    if found := _find(name, below):
        return found
    skip_unless_ci(f"{name} is not here, and Debian's package {package} cannot be installed: {problem}")


def need_files(folder: Path, *, package: str) -> None:
    """Have a folder of a package, which is installed first where this user may do that; else skip, in CI fail.

    Parameters
    ----------
    folder : absolute
    package : Debian's package that has it
    """
    if folder.is_dir():
        return
    problem = _install(package)
    if not folder.is_dir():
        skip_unless_ci(f"{folder} is not here, and Debian's package {package} cannot be installed: {problem}")


def _find(name: str, below: str) -> Path | None:
    if below:
        pattern = Path(below, name).relative_to("/")
        versions = [path for path in Path("/").glob(str(pattern)) if os.access(path, os.X_OK)]
        if versions:  # 9 sorts before 17
            return max(versions, key=lambda path: [int(part) if part.isdecimal() else -1 for part in path.parts])
    on_path = shutil.which(name)
    return Path(on_path) if on_path else None


def _install(package: str) -> str:
    """Returns what is in the way, empty if nothing is."""
    if os.geteuid() != 0:
        return "only root may do that"
    if shutil.which("apt-get") is None:
        return "there is no apt-get"
    # Another test process may be installing something else at the same time.
    command = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=120", "--no-install-recommends"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        for words in (["update"], ["install", package]):
            done = subprocess.run(
                [*command, *words],
                env=environment,
                capture_output=True,
                text=True,
                timeout=INSTALL_SECONDS,
                check=False,
            )
            if done.returncode != 0:
                return (done.stderr.strip().splitlines() or ["apt-get failed"])[-1]
    except subprocess.TimeoutExpired:
        return f"apt-get took longer than {INSTALL_SECONDS} s"
    return ""
