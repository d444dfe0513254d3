"""Disks that one process and all below it see: a namespace of mounts, which Linux's `unshare` makes for root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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


@dataclass(frozen=True)
class SmallDisk:
    """A disk that only the commands see which `enter` is put before.

    seen_here : the same folder, as this process reaches it
    """

    enter: list[str]
    seen_here: Path

    def fill(self) -> None:
        """Leave no byte of room, until `make_room`."""
        for size in (1 << 20, 512):
            with (self.seen_here / "fill").open("ab", buffering=0) as file, suppress(OSError):
                while file.write(bytes(size)):
                    pass

    def make_room(self) -> None:
        (self.seen_here / "fill").unlink()


@contextmanager
def small_disk(folder: Path, *options: str) -> Iterator[SmallDisk]:
    """A disk at a folder that is there, for as many commands as it takes; it is gone at the end, or with this process.

    The test is skipped, in CI failed, where this user or this kernel cannot mount.
    """
    need("nsenter", package="util-linux")
    words = on_a_disk(folder, *options)
    with subprocess.Popen(
        [*words, "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as keeper:
        keeper.stdout.readline()  # it is mounted
        where = f"/proc/{keeper.pid}"
        yield SmallDisk(
            ["nsenter", f"--mount={where}/ns/mnt", "sh", "-c", 'cd "$0" && exec "$@"', str(folder.parent)],
            Path(f"{where}/root{folder}"),
        )
        keeper.stdin.close()
