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

# Eighty columns is what rich assumes of a file or a CI log; our tables want more.
console = Console(stderr=True, width=None if Console(stderr=True).is_terminal else 120)


def progress_bar() -> Progress:
    """A bar that appears on a terminal alone; its tasks have a field ``detail``."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
