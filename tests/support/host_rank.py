"""A rank without Spark, which joins process groups as a barrier task does; a program that speaks JSON lines.

For each group it reads ``{rank, hosts}``, answers with its endpoint and, as rank 0, the port of its store, reads
``{endpoints, port}``, joins, sums one over all ranks, leaves, and answers with ``{sum}``, or with ``{error}``.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.cluster.store import (
    connected_store,
    joined_group,
    listening_socket,
    open_store,
    rendezvous_socket,
    wait_for_all_ranks,
)
from pipeline.config.cluster import WorkerSettings
from pipeline.distributed.interfaces import Endpoint, find_endpoint

WORKERS = WorkerSettings(count=2, device="cpu", collective_timeout_seconds=20)


def read() -> dict[str, Any]:
    return json.loads(sys.stdin.readline())


def answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def one_group(rank: int, hosts: list[str]) -> float:
    endpoint = find_endpoint(hosts[rank], [host for host in hosts if host != hosts[rank]], "gloo")
    store: Any = open_store(rendezvous_socket(endpoint.address, 0), len(hosts), WORKERS) if rank == 0 else None
    with listening_socket(endpoint.address) as listener:
        endpoint = replace(endpoint, port=listener.getsockname()[1])
        answer(endpoint=asdict(endpoint), port=store.port if store is not None else 0)
        told = read()
        endpoints = [Endpoint(**each) for each in told["endpoints"]]
        store = connected_store(store, rank, endpoints, told["port"], WORKERS)
    with joined_group(store, rank, endpoints, torch.device("cpu"), timedelta(seconds=20)):
        ones = torch.ones(1)
        dist.all_reduce(ones)
    wait_for_all_ranks(store, rank, len(hosts))
    return ones.item()


if __name__ == "__main__":
    with suppress(json.JSONDecodeError):  # the end of the input
        while True:
            try:
                answer(sum=one_group(**read()))
            except (OSError, RuntimeError) as error:
                answer(error=f"{type(error).__name__}: {error}")
