"""The environment of the peers, `.venv-peers`, made by `make bench-peers`: they pin other versions than sparknorm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PYTHON = Path(".venv-peers/bin/python")
IS_THERE = _PYTHON.exists()


def in_peers(program: str, *arguments: str) -> str:
    """What a program of the folder `peers` prints."""
    command = [str(_PYTHON), str(Path(__file__).parent / "peers" / program), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout
