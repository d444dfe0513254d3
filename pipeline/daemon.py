"""Spark's Python daemon with torch imported once, before it forks: ``spark.python.daemon.module=pipeline.daemon``.

A new Python worker then has what a rank needs, instead of importing it for one to three seconds, which counts most
when a killed one is replaced. `get_session` sets it for sessions on this machine. On a cluster set it where this
package is installed on the executors: the daemon starts before Spark adds the files of ``--py-files``.
"""

from __future__ import annotations

import contextlib
import gc
import os

# A forked process keeps the threads of nobody: what is imported here must not have started any that it needs.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

with contextlib.suppress(ImportError):  # a cluster whose executors only ingest has no torch
    import torch._dynamo  # the first optimizer imports it: two seconds
    import torch.distributed
    import torch.distributed.algorithms.ddp_comm_hooks.default_hooks
    import torch.nn.parallel
    import torch.utils.data  # noqa: F401

from pyspark import daemon

import pipeline.cluster.task  # noqa: F401 - no pyarrow and no pandas here: they start threads when they are imported

# Spark's daemon collects garbage in a worker after each task: a fifth of a second of a core, to look through torch,
# 64 times for 64 ranks. What is here before the fork stays, and is looked through no more.
gc.collect()
gc.freeze()

if __name__ == "__main__":
    daemon.manager()
