"""At which of its addresses other hosts reach this one, and which network interface has that address.

Left alone, gloo listens where the host's own name leads, which is 127.0.1.1 as Debian and Ubuntu are installed, and
NCCL takes the first interface that it finds. Both can be told an interface through the environment.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# The variable by which a user decides for a backend.
_USERS_CHOICE = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}

_SIOCGIFCONF = 0x8912  # Linux: every IPv4 address with its interface
_IFREQ = struct.Struct("16s 2x 2x 4s 16x")  # name, family, port, IPv4 address
_ANY_PORT = 9  # connecting a UDP socket sends nothing: the port does not matter


@dataclass(frozen=True)
class Endpoint:
    """Where a rank listens.

    address : numeric, IPv4 or IPv6
    interface : the network interface that has the address; None where the system does not say (it is no Linux)
    setting : ``NAME=interface`` where the user chose the interface; empty where nobody did
    port : of a socket at which the first rank of each host can be reached until the gang has found together; 0: none
    """

    address: str
    interface: str | None = None
    setting: str = ""
    port: int = 0

    def __str__(self) -> str:
        how = self.setting or self.interface
        return f"{self.address} ({how})" if how else self.address

    def at(self, port: int) -> str:
        """The address with a port, as it is written."""
        return f"[{self.address}]:{port}" if ":" in self.address else f"{self.address}:{port}"

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let process groups that are made in this block use the interface, where the user chose none."""
        ours = {} if self.setting or self.interface is None else {
            "GLOO_SOCKET_IFNAME": self.interface,
            "NCCL_SOCKET_IFNAME": f"={self.interface}",  # without "=" it is the beginning of a name
            "NCCL_SOCKET_FAMILY": "AF_INET6" if ":" in self.address else "AF_INET",
        }  # fmt: skip
        ours = {name: value for name, value in ours.items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)


def find_endpoint(host: str, others: Sequence[str], backend: str) -> Endpoint:
    """Where ranks on other hosts reach this one.

    It is the address of the interface that the user chose for the backend. Otherwise it is the address that the
    cluster knows this host by, if an interface has it; and where none has (a name that this host itself takes for
    127.0.1.1, or cannot resolve; an address that is translated on the way), the address with which this host would
    speak to another one.

    Parameters
    ----------
    host : name or address by which the cluster knows this host
    others : names or addresses of the other hosts; with none, an address of the loopback interface is good enough
    backend : "gloo" or "nccl"

    Raises
    ------
    ConnectionError
        There is no such address: this host knows no way to any of the others.
    """
    owners = interfaces()
    setting, chosen = _users_choice(backend)
    for address, interface in owners.items():
        if interface in chosen:
            return Endpoint(address, interface, setting)
    own = _addresses(host)
    reached = [address for address in own if not _is_loopback(address)] if others else [*own, "127.0.0.1"]
    known = [address for address in reached if address in owners or not owners]
    if not known:
        known = [address for other in others for address in _addresses_towards(other) if not _is_loopback(address)]
    if not known:
        raise ConnectionError(
            f"{socket.gethostname()}, which the cluster knows as {host}, finds no way to {', '.join(others)}: "
            "it must be able to resolve their names, and needs a route to them"
        )
    return Endpoint(known[0], owners.get(known[0]), setting)


def _users_choice(backend: str) -> tuple[str, list[str]]:
    """The setting of the user's, and the interfaces that it names; none where it excludes some or gives a pattern."""
    name = _USERS_CHOICE.get(backend, "")
    value = os.environ.get(name, "")
    return (f"{name}={value}", value.lstrip("=").split(",")) if value else ("", [])


def interfaces() -> Mapping[str, str]:
    """The interface of each address of this host; empty where the system is no Linux."""
    owners: dict[str, str] = {}
    with suppress(ImportError, OSError):
        owners.update(_interfaces_of_ipv4())
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            owners[str(ipaddress.IPv6Address(bytes.fromhex(digits)))] = name
    return owners


def _interfaces_of_ipv4() -> dict[str, str]:
    import array
    import fcntl

    entries = array.array("B", bytes(_IFREQ.size * 1024))
    start, size = entries.buffer_info()
    request = array.array("B", struct.pack("iP", size, start))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, _SIOCGIFCONF, request)
    (used,) = struct.unpack_from("i", request)
    found = _IFREQ.iter_unpack(entries.tobytes()[:used])
    return {socket.inet_ntoa(address): name.rstrip(b"\0").decode() for name, address in found}


def _addresses(host: str) -> list[str]:
    """The numeric addresses that a name means here, or the address itself; empty where it means nothing."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(ipaddress.ip_address(str(entry[4][0]).partition("%")[0])) for entry in found]


def _addresses_towards(other: str) -> list[str]:
    """The addresses with which this host would speak to another one: the system's routes say them."""
    sources = []
    for address in _addresses(other):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, _ANY_PORT))
            sources.append(str(probe.getsockname()[0]))
    return sources


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
