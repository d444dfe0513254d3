"""A process that keeps its freed memory gets it again without page faults, and gives it back when it is told to."""

import json
import os
import subprocess
import sys

import pytest
from standalone_cluster import REPOSITORY

# Ten tensors of 30 MB that are freed; then forty of 8 MB, one after the other, as layers make them. Nothing as large was
# freed before the ten, so that as usual each is a mapping of its own, whatever else the heap holds. (The usual page
# faults of the forty hang on what that is: from none to 50,000.)
PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from pipeline.distributed.host_memory import give_back_freed_memory, keep_freed_memory

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

kept = keep_freed_memory() if sys.argv[1] == "keep" else False
start = held()
many = [torch.ones(7_500_000) for _ in range(10)]
del many
freed = held()
values = torch.ones(2_000_000)
for count in (20, 40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        values = values * 2
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
used = held()
give_back_freed_memory()
print(json.dumps({"kept": kept, "freed": freed - start, "faults": faults, "given_back": used - held()}))
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"),
                                reason="another C library than glibc")  # fmt: skip


def ran(what, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, what]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**clean, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def test_what_is_freed_stays_and_is_taken_again_without_page_faults():
    kept, usual = ran("keep"), ran("as usual")
    assert (kept["kept"], usual["kept"]) == (True, False)
    assert kept["freed"] > 200_000_000
    assert usual["freed"] < 50_000_000
    assert kept["faults"] < 8_000  # of forty times 2,000 pages


def test_it_can_be_given_back():
    assert ran("keep")["given_back"] > 200_000_000


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_thresholds_of_the_environment_stay(name):
    assert ran("keep", **{name: "131072"})["kept"] is False
