"""Disks that one process and all below it see: a namespace of mounts, which Linux's `unshare` makes for root."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from debian import need, skip_unless_ci

COMMAND_SECONDS = 20


def on_a_disk(folder: Path, *options: str, fill: bool = False) -> list[str]:
    """The words that, put before a command, let it see a small disk at a folder that is there; nobody else sees it.

    The test is skipped, in CI failed, where this user or this kernel cannot mount.

    Parameters
    ----------
    options : of the mount of a tmpfs, as "ro" or "size=1m"
    fill : whether no byte is left on it
    """
    need("unshare", package="util-linux")
    if os.geteuid() != 0:
        skip_unless_ci("only root may make namespaces of mounts")
    mount = f'mount -t tmpfs -o {",".join(options) or "rw"} none "$0"'
    full = ' && { cat /dev/zero > "$0/fill" 2> /dev/null; true; }' if fill else ""
    words = ["unshare", "--mount", "sh", "-c", f'{mount}{full} && exec "$@"', str(folder)]
    tried = subprocess.run([*words, "true"], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    if tried.returncode != 0:
        skip_unless_ci(f"{' '.join(words)}: {tried.stderr.strip()}")
    return words
