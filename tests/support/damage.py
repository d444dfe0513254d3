"""Damaged bytes, as a disk, a network or a stranger leaves them; Hypothesis makes them, and shows the smallest."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_COMMON = settings(
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# The same few cases in every run; thousands of others in each run of the slow tests.
FEW = settings(_COMMON, max_examples=50, derandomize=True)
MANY = settings(_COMMON, max_examples=2000)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def _cut_or_changed(draw: st.DrawFn, original: bytes) -> bytes:
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 64)))
        kind = draw(st.sampled_from(("flip", "zeros", "random", "insert", "delete", "cut", "repeat")))
        if kind == "flip" and data:
            data[min(start, len(data) - 1)] ^= 1 << draw(st.integers(0, 7))
        elif kind == "zeros":
            data[start:end] = bytes(end - start)
        elif kind == "random":
            data[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
        elif kind == "insert":
            data[start:start] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "delete":
            del data[start:end]
        elif kind == "cut":
            del data[start:]
        elif kind == "repeat":
            data[end:end] = data[start:end]
    return bytes(data)


@st.composite
def _json_changed(draw: st.DrawFn, tree: dict[str, Any]) -> bytes:
    """One key or a few, at any depth, with other values or names, so that it is still JSON."""
    changed = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        node = changed
        while True:
            key = draw(st.sampled_from(sorted(node)))
            if isinstance(node[key], dict) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            break
        value = node.pop(key)
        if draw(st.booleans()):
            node[key] = draw(JSON)
        else:
            node[draw(st.text(max_size=8))] = value
    return json.dumps(changed).encode()


def damaged(original: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that were these once, or any others; now and then they are these still."""
    return _cut_or_changed(original) | st.binary(max_size=64) | st.just(original)


def damaged_json(tree: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """The same of a JSON object, and objects that are JSON still but not what was written."""
    return damaged(json.dumps(tree).encode()) | _json_changed(tree) | JSON.map(lambda value: json.dumps(value).encode())
