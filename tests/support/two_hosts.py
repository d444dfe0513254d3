"""Two hosts on this machine, with a cable each to a router between them: network namespaces with names of their own.

Each host has its own address in a network of its own, host name, hosts file and no other way to resolve names. Disk,
clock and processors are those of this machine. The router drops what it is told to drop, and the cable of a host can be
pulled. Only Linux's own `ip` and `unshare` are needed, and root.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from debian import need, skip_unless_ci

COMMAND_SECONDS = 20
END_SECONDS = 10
_NUMBERS = itertools.count()  # of one process, which may have several pairs of hosts at once
FILES = Path("/etc/netns")  # `ip netns exec` puts what lies in here over the files of /etc


@dataclass(frozen=True)
class NamedHost:
    """One of the two hosts.

    name : its host name
    namespace : the network namespace that it is
    address : at which the other one reaches it
    router : the namespace at the other end of its cable
    """

    name: str
    namespace: str
    address: str
    router: str

    def enter(self) -> list[str]:
        """The words that, put before a command, let it run on this host. The process keeps its number."""
        name_it = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", name_it, self.name]

    def write_hosts(self, *lines: str) -> None:
        """Replace the hosts file, also for processes that run; localhost is always in it."""
        # The same file: processes have it mounted.
        (FILES / self.namespace / "hosts").write_text("\n".join(["127.0.0.1 localhost", "::1 localhost", *lines, ""]))

    def pull_cable(self) -> None:
        """The host's interface loses its carrier, at once and until `plug_in_cable`; it keeps its addresses."""
        _ip("-n", self.router, "link", "set", self.namespace, "down")

    def plug_in_cable(self) -> None:
        _ip("-n", self.router, "link", "set", self.namespace, "up")

    def drop_ports(self, first: int, last: int) -> None:
        """From now on a firewall on the way drops all that comes from this host for these TCP ports, without a word."""
        self._firewall("add", first, last)

    def let_ports_through(self, first: int, last: int) -> None:
        """The end of `drop_ports`."""
        self._firewall("delete", first, last)

    def _firewall(self, change: str, first: int, last: int) -> None:
        family = "-6" if ":" in self.address else "-4"
        _ip(family, "-n", self.router, "rule", change, "iif", self.namespace, "ipproto", "tcp",
            "dport", f"{first}-{last}", "blackhole")  # fmt: skip

    def lose_power(self) -> None:
        """Nothing runs here any more, and nobody outside hears of it."""
        self.pull_cable()
        _end_processes(self.namespace)


@contextmanager
def two_hosts(version: int = 4) -> Iterator[tuple[NamedHost, NamedHost]]:
    """Make the hosts and take them away again, with all that runs on them, whatever happens.

    Both names resolve on both hosts, to their addresses. The test is skipped, in CI failed, where this user or this
    kernel cannot make hosts.

    Parameters
    ----------
    version : of the internet protocol, 4 or 6; the hosts do not have the other one
    """
    need("ip", package="iproute2")
    if os.geteuid() != 0:
        skip_unless_ci("only root may make network namespaces")
    mine = f"sn{os.getpid()}{next(_NUMBERS)}"
    router = f"{mine}r"
    address = {4: "10.77.{}.1", 6: "fd77:{}::1"}[version]
    hosts = [
        NamedHost(f"host-{letter}", f"{mine}{letter}", address.format(n), router)
        for n, letter in enumerate("ab", start=1)
    ]
    try:
        try:
            _make_router(router)
            for host in hosts:
                _make_host(host)
        except subprocess.CalledProcessError as error:
            skip_unless_ci(f"{' '.join(error.cmd)}: {error.stderr.strip()}")
        for host in hosts:
            host.write_hosts(*(f"{each.address} {each.name}" for each in hosts))
        yield hosts[0], hosts[1]
    finally:
        for namespace in (router, *(host.namespace for host in hosts)):
            _end_processes(namespace)
            with suppress(subprocess.CalledProcessError):  # it was never made
                _ip("netns", "delete", namespace)
            shutil.rmtree(FILES / namespace, ignore_errors=True)
        with suppress(OSError):  # somebody else's are in it
            FILES.rmdir()


def _make_router(namespace: str) -> None:
    _ip("netns", "add", namespace)
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/all/keep_addr_on_down"):
        _run(["ip", "netns", "exec", namespace, "sh", "-c", f"echo 1 > /proc/sys/net/{name}"])


def _make_host(host: NamedHost) -> None:
    files = FILES / host.namespace
    files.mkdir(parents=True)
    (files / "hosts").touch()
    (files / "resolv.conf").touch()
    (files / "nsswitch.conf").write_text("hosts: files\n")
    _ip("netns", "add", host.namespace)
    # The router's end of the cable has the name of the host's namespace.
    _ip("-n", host.router, "link", "add", host.namespace, "type", "veth",
        "peer", "name", "eth0", "netns", host.namespace)  # fmt: skip
    _ip("-n", host.namespace, "link", "set", "lo", "up")
    # Without duplicate address detection, which keeps an address of version 6 unused for a second.
    length, nodad = (64, ["nodad"]) if ":" in host.address else (24, [])
    network = host.address[:-1]
    _ip("-n", host.namespace, "address", "add", f"{host.address}/{length}", "dev", "eth0", *nodad)
    _ip("-n", host.router, "address", "add", f"{network}2/{length}", "dev", host.namespace, *nodad)
    _ip("-n", host.namespace, "link", "set", "eth0", "up")
    host.plug_in_cable()
    _ip("-n", host.namespace, "route", "add", "default", "via", f"{network}2")
    # Behind a cable that was pulled is silence: the router does not tell the sender that nobody is there.
    _ip("-n", host.router, "route", "add", "blackhole", f"{network}0/{length}", "metric", "9999")


def _ip(*words: str) -> str:
    return _run(["ip", *words])


def _run(words: Sequence[str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True).stdout


def _end_processes(namespace: str) -> None:
    """SIGKILL of all that runs in a namespace: processes that a test has started there."""
    try:
        pids = [int(pid) for pid in _ip("netns", "pids", namespace).split()]
    except subprocess.CalledProcessError:  # it was never made
        return
    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
            processes[-1].kill()
    psutil.wait_procs(processes, END_SECONDS)
