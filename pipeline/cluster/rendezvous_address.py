"""How the ranks of a gang learn where rank 0 listens, which is all that they cannot tell each other directly.

A job with a folder has it there: rank 0 publishes its address, the others read it. Spark's own exchange, `allGather`,
ends the whole executor if a worker is killed while it waits (its thread throws what cancels the task, and Spark takes
that for a reason to exit), and looks only once a second whether all have spoken; so only a function without a folder
uses it.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline import storage
from pipeline.cluster.failures import GangBrokenError, failure_path
from pipeline.cluster.store import CONNECT_GRACE_SECONDS, CONNECT_SECONDS

if TYPE_CHECKING:
    from pyspark import BarrierTaskContext

FILE_NAME = "rendezvous.json"
# How long a file that the driver has published before the launch may take to be seen by a rank.
SEEN_SECONDS = 10.0


@dataclass(frozen=True)
class RendezvousAddress:
    """Where rank 0 of a gang listens.

    Parameters
    ----------
    launch
        Id of the launch that the gang belongs to; Spark may start several gangs for it, one after the other.
    first_task
        Spark's number of rank 0's task. It numbers the tasks of a gang in rank order.
    token
        Of this gang alone. Who connects has to know it.
    address, port
        Numeric; the port is 0 before rank 0 listens.
    error
        Why rank 0 does not take part; None where it does.
    """

    launch: str
    first_task: int = -1
    token: str = ""
    address: str = ""
    port: int = 0
    error: str | None = None

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> RendezvousAddress:
        return cls(**json.loads(text))


class AddressExchange(Protocol):
    """What `rendezvous` needs: rank 0 publishes, the others look.

    ``seconds`` is how long rank 0 waits for the others once it has published; ``is_remote`` says whether each look is a
    request to remote storage.
    """

    seconds: float
    is_remote: bool

    def publish(self, address: RendezvousAddress) -> None:
        """Tell the others, as rank 0. Called again with an error, it tells those that have not looked yet."""

    def newest(self) -> RendezvousAddress | None:
        """What rank 0 has published last, as another rank sees it now; None where there is nothing yet."""

    def is_shared(self) -> bool:
        """Whether what rank 0 publishes reaches the others, as far as this rank can see."""

    def is_of_this_gang(self, address: RendezvousAddress) -> bool:
        """Whether the address is of the gang of this rank, as far as can be known."""

    def report_unreachable(self, address: RendezvousAddress, reason: str) -> None:
        """Let rank 0 know that another rank does not get through to it."""

    def read_unreachable(self, address: RendezvousAddress) -> str | None:
        """What another rank has reported, as rank 0 reads it."""


class AddressByBarrier:
    """The address travels by Spark's `allGather`, in which every rank takes part once."""

    seconds: float = CONNECT_SECONDS + CONNECT_GRACE_SECONDS  # all are there, and have nothing to do but to connect
    is_remote = False

    def __init__(self, context: BarrierTaskContext):
        self._context = context
        self._address: RendezvousAddress | None = None

    def publish(self, address: RendezvousAddress) -> None:
        if self._address is None:
            self._address = address
            self._context.allGather(address.to_json())

    def newest(self) -> RendezvousAddress | None:
        if self._address is None:
            self._address = RendezvousAddress.from_json(self._context.allGather("")[0])
        return self._address

    def is_shared(self) -> bool:
        return True

    def is_of_this_gang(self, address: RendezvousAddress) -> bool:
        return True

    def report_unreachable(self, address: RendezvousAddress, reason: str) -> None:
        """Nobody could read it: rank 0 ends by itself soon."""

    def read_unreachable(self, address: RendezvousAddress) -> str | None:
        return None


class AddressInStorage:
    """The address lies in the folder of the job, in one file that every gang replaces.

    Parameters
    ----------
    folder
        Of the job, in which the driver has called `announce_launch`.
    launch
        Its id.
    first_task
        Spark's number of rank 0's task in this rank's gang, if it numbers them in rank order.
    seconds
        How long rank 0 waits for the others.
    """

    def __init__(self, folder: str, launch: str, first_task: int, seconds: float):
        self._folder, self._launch, self._first_task, self.seconds = folder, launch, first_task, seconds
        self._path, self.is_remote = storage.join(folder, FILE_NAME), not storage.is_local(folder)
        self._seen = False
        self._give_up_at = time.monotonic() + SEEN_SECONDS

    def is_shared(self) -> bool:
        """Whether this rank sees what the driver has published for this launch."""
        self._read()
        return self._seen

    def publish(self, address: RendezvousAddress) -> None:
        storage.publish(self._path, address.to_json().encode(), durable=False)

    def newest(self) -> RendezvousAddress | None:
        """As in `AddressExchange`.

        Raises
        ------
        GangBrokenError
            What the driver has published before the launch is not seen here, or a newer launch has begun.
        """
        address = self._read()
        if not self._seen and time.monotonic() > self._give_up_at:
            raise GangBrokenError(
                f"{self._path}, written by the driver, is not seen here: set `output` to a place that all share"
            )
        return address

    def _read(self) -> RendezvousAddress | None:
        try:
            address = RendezvousAddress.from_json(storage.read_bytes(self._path))
        except FileNotFoundError:
            return None
        if address.launch != self._launch:
            return None
        self._seen = True
        return address if address.port or address.error is not None else None

    def is_of_this_gang(self, address: RendezvousAddress) -> bool:
        return address.first_task == self._first_task

    def report_unreachable(self, address: RendezvousAddress, reason: str) -> None:
        storage.publish(self._report_path(address), reason.encode(), durable=False)

    def read_unreachable(self, address: RendezvousAddress) -> str | None:
        try:
            return storage.read_bytes(self._report_path(address)).decode()
        except FileNotFoundError:
            return None

    def _report_path(self, address: RendezvousAddress) -> str:
        return failure_path(self._folder, f"rendezvous-{address.token}")


def announce_launch(folder: str, launch: str) -> None:
    """Publish, as the driver, that a launch begins: no rank then takes the address of an earlier one for its own."""
    storage.publish(storage.join(folder, FILE_NAME), RendezvousAddress(launch).to_json().encode(), durable=False)


def is_announced(folder: str, launch: str) -> bool:
    """Whether this process sees what the driver has published for a launch; no error where it cannot look."""
    try:
        with storage.retry_for(0):
            return RendezvousAddress.from_json(storage.read_bytes(storage.join(folder, FILE_NAME))).launch == launch
    except (OSError, ValueError, TypeError):
        return False
