"""A filesystem that replaces a file as HDFS does: it deletes the old one, and then renames the new one.

A process whose environment has ``DIES_WITHOUT`` set to the name of a file is killed in between. Processes find the
class by its entry point, also the executors of Spark, where their PYTHONPATH has the folder of `install`.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

PROTOCOL = "delete-then-move"


class DeleteThenMove(DirFileSystem):
    """The local disk, but for `mv`."""

    protocol = PROTOCOL

    def __init__(self, **options):
        super().__init__(path="/", fs=LocalFileSystem(auto_mkdir=True), **options)

    def mv(self, path1, path2, **options):
        if self.exists(path2):
            self.rm_file(path2)
            if path2.endswith(f"/{os.environ.get('DIES_WITHOUT')}"):
                os.kill(os.getpid(), signal.SIGKILL)
        super().mv(path1, path2, **options)


def install(folder: Path) -> list[str]:
    """What PYTHONPATH must have for the class to be found; ``folder`` gets the entry point."""
    about = folder / "delete_then_move-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: delete-then-move\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[fsspec.specs]\n{PROTOCOL} = {__name__}:DeleteThenMove\n")
    return [str(folder), str(Path(__file__).parent)]
