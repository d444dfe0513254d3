"""Where commands write what a person reads: standard error, since standard output has the path of the result alone."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

# Eighty columns is what rich assumes of a file or a CI log; our tables want more. Names are a user's own: neither
# `nets:cat:`, which rich shows as an emoji, nor `[b]` in one is meant for rich.
console = Console(
    stderr=True,
    width=None if Console(stderr=True).is_terminal else 120,
    markup=False,
    emoji=False,
    highlight=False,
)


def progress_bar() -> Progress:
    """A bar that appears on a terminal alone; its tasks have a field ``detail``."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
