"""What tells a file from the one that it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What drivers tell of a file that becomes another when it is replaced.
_KEYS = ("size", "ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "updated", "created")


def version_of(entry: Mapping[str, Any]) -> str:
    """A text of what fsspec tells of a file; where that is nothing but the size, the size."""
    return " ".join(str(entry[key]) for key in _KEYS if entry.get(key) is not None)
