"""A process that keeps its freed memory gets it again without page faults, and gives it back when it is told to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kept_memory
import pytest
from standalone_cluster import REPOSITORY

# What it keeps, then forty tensors of 8 MB, one after the other, as layers make them.
PROGRAM = """
import json, resource, sys
import torch
from kept_memory import bytes_held, bytes_kept
from pipeline.distributed.host_memory import give_back_freed_memory, keep_freed_memory

is_kept = keep_freed_memory() if sys.argv[1] == "keep" else False
kept = bytes_kept()
values = torch.ones(2_000_000)
for count in (20, 40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        values = values * 2
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
used = bytes_held()
give_back_freed_memory()
print(json.dumps({"is_kept": is_kept, "kept": kept, "faults": faults, "given_back": used - bytes_held()}))
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"),
                                reason="another C library than glibc")  # fmt: skip


def ran(what, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    code = os.pathsep.join([str(REPOSITORY), str(Path(kept_memory.__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what],
        env={**clean, "PYTHONPATH": code, **environment}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_what_is_freed_stays_and_is_taken_again_without_page_faults():
    kept, usual = ran("keep"), ran("as usual")
    assert (kept["is_kept"], usual["is_kept"]) == (True, False)
    assert kept["kept"] > 200_000_000 > 100_000_000 > usual["kept"]
    assert kept["faults"] < 8_000  # of forty times 2,000 pages


def test_it_can_be_given_back():
    assert ran("keep")["given_back"] > 200_000_000


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_thresholds_of_the_environment_stay(name):
    assert ran("keep", **{name: "131072"})["is_kept"] is False
