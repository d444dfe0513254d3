"""What every rank tells all others before they join, and what must be equal in it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from pipeline.distributed.interfaces import Endpoint
from pipeline.telemetry import heartbeat

# Names and JSON values of what all ranks must see alike.
Facts = Mapping[str, object]


@dataclass(frozen=True)
class Introduction:
    """What one rank tells all others.

    ``endpoint`` is where it listens. ``port`` and ``attempt`` come from rank 0: the port of its store, and the number
    and id of this gang where the job has a folder. A rank that cannot take part has an ``error`` and nothing else.
    """

    facts: Facts = field(default_factory=dict)
    gpu: str | None = None
    endpoint: Endpoint | None = None
    port: int | None = None
    attempt: heartbeat.Attempt | None = None
    error: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Introduction:
        fields = json.loads(text)
        for name, part in (("attempt", heartbeat.Attempt), ("endpoint", Endpoint)):
            fields[name] = part(**fields[name]) if fields[name] else None
        return cls(**fields)


def check_agreement(facts: Sequence[Facts], hosts: Sequence[str]) -> None:
    """Raise ValueError where a rank's facts are not those of rank 0, naming the fact and both values."""
    for name in sorted({name for rank_facts in facts for name in rank_facts}):
        for rank, rank_facts in enumerate(facts):
            if rank_facts.get(name) != facts[0].get(name):
                raise ValueError(
                    f"ranks disagree about {name}: rank 0 on {hosts[0]} has {facts[0].get(name)}, "
                    f"rank {rank} on {hosts[rank]} has {rank_facts.get(name)}"
                )


def one_gpu_each(gpus: Sequence[str | None], hosts: Sequence[str]) -> None:
    """Raise ValueError where two ranks of a host have the same GPU: NCCL would refuse them later, in its own words."""
    owners: dict[tuple[str, str], int] = {}
    for rank, (host, gpu) in enumerate(zip(hosts, gpus, strict=True)):
        if gpu is not None and (other := owners.setdefault((host, gpu), rank)) != rank:
            raise ValueError(
                f"ranks {other} and {rank} on {host} were both assigned GPU {gpu}: set workers.task_gpus=1"
            )


def package_versions() -> dict[str, str]:
    """The versions that decide whether ranks compute the same."""
    import numpy
    import pyarrow
    import torch

    from pipeline import __version__

    return {
        "sparknorm": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pyarrow": pyarrow.__version__,
    }
