"""Where commands write what a person reads: standard error, since standard output has the path of the result alone."""

from __future__ import annotations

from rich.console import Console

# Eighty columns is what rich assumes of a file or a CI log; our tables want more.
console = Console(stderr=True, width=None if Console(stderr=True).is_terminal else 120)
