"""The history of a search as small files in the output folder, wherever that is: what `Journal` of `sampling` keeps.

Optuna's own file needs a local disk, appends to it, and takes a lock that a killed process leaves behind. A search has
one writer already, the driver that holds its lease, so whole files with an atomic publish are enough: each holds up to
`LINES` lines of JSON, and the last of them is written anew with each line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from pipeline import storage

LINES = 50

# One JSON object of Optuna's.
Line = dict[str, Any]


class JournalFiles:
    """The lines of a history, in the order written.

    Parameters
    ----------
    folder : of these files
    check : called before each write; raises where this process may not write any more

    Raises
    ------
    ValueError
        A file is damaged.
    """

    def __init__(self, folder: str, check: Callable[[], None]):
        self._folder, self._check = folder, check
        self._files: list[list[Line]] = []
        names = sorted(name for name in storage.names(folder) if name.endswith(".jsonl"))
        for name, data in zip(names, storage.read_many([storage.join(folder, n) for n in names]), strict=True):
            if isinstance(data, Exception):
                raise data
            self._files.append(_lines(storage.join(folder, name), data))

    @property
    def lines(self) -> list[Line]:
        return [line for file in self._files for line in file]

    def append(self, lines: Iterable[Line]) -> None:
        """Write lines down; where this raises, none of them counts."""
        self._check()
        is_full = not self._files or len(self._files[-1]) >= LINES
        number, before = (len(self._files), []) if is_full else (len(self._files) - 1, self._files[-1])
        now = [*before, *lines]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in now)
        storage.publish(storage.join(self._folder, f"{number:06d}.jsonl"), text.encode())
        self._files[number:] = [now]


def _lines(path: str, data: bytes) -> list[Line]:
    try:
        return [json.loads(line) for line in data.splitlines()]
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged, and the search cannot go on: {error}. Set another `name` or `output` to begin anew"
        ) from None
