"""Two ranks on two hosts, whatever their hosts files say, and what they say when they cannot reach each other.

The ranks are those of a barrier task without its Spark: each is given the address by which a cluster knows it.
"""

import itertools
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from two_hosts import two_hosts

REPOSITORY = Path(__file__).parents[2]
ANSWER_SECONDS = 100
OWN_NAME = {"loopback": "127.0.0.1", "debian": "127.0.1.1", "address": None, "missing": ""}


class Rank:
    """A process of `host_rank.py` on a host."""

    def __init__(self, number, host, environment):
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "support")])
        plain = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
        self.number = number
        self.process = subprocess.Popen(
            [*host.enter(), sys.executable, "-m", "host_rank"],
            env={**plain, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def tell(self, **values):
        self.process.stdin.write(json.dumps(values) + "\n")
        self.process.stdin.flush()

    def answer(self):
        timer = threading.Timer(ANSWER_SECONDS, self.process.kill)  # the answer is then the end of the output
        timer.start()
        try:
            return json.loads(self.process.stdout.readline() or '{"error": "no answer"}')
        finally:
            timer.cancel()


@contextmanager
def ranks_on(hosts, **environment):
    ranks = [Rank(number, host, environment) for number, host in enumerate(hosts)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.communicate()


def join(ranks, known_as, meanwhile=lambda port: None):
    """What the ranks answer once they have tried to join; ``known_as`` are the names that the cluster has for them.

    meanwhile : called with the port of rank 0's store before the ranks are told of it
    """
    for rank in ranks:
        rank.tell(rank=rank.number, hosts=known_as)
    introductions = [rank.answer() for rank in ranks]
    if any("error" in introduction for introduction in introductions):
        return introductions
    port = introductions[0]["port"]
    meanwhile(port)
    for rank in ranks:
        rank.tell(endpoints=[introduction["endpoint"] for introduction in introductions], port=port)
    return [rank.answer() for rank in ranks]


@pytest.fixture(scope="module", params=[4, 6])
def pair(request):
    """Two hosts of one version of the internet protocol, and a rank on each, which join one group after another."""
    with two_hosts(request.param) as hosts, ranks_on(hosts) as ranks:
        yield hosts, ranks


@pytest.mark.parametrize("own_names", list(itertools.product(OWN_NAME, repeat=2)), ids="-".join)
@pytest.mark.parametrize("known_by", ["address", "name"])
def test_they_train_whatever_the_hosts_files_say(pair, known_by, own_names):
    """Spark knows a task by its address; settings may make it a name."""
    hosts, ranks = pair
    for host, other, own in zip(hosts, hosts[::-1], own_names, strict=True):
        meaning = host.address if OWN_NAME[own] is None else OWN_NAME[own]
        host.write_hosts(f"{other.address} {other.name}", *[f"{meaning} {host.name}"] * bool(meaning))
    assert join(ranks, [getattr(host, known_by) for host in hosts]) == [{"sum": 2.0}] * 2


def test_a_host_that_cannot_resolve_another_says_so(pair):
    hosts, ranks = pair
    for host in hosts:
        host.write_hosts()
    for answer, other in zip(join(ranks, [host.name for host in hosts]), hosts[::-1], strict=True):
        assert f"finds no way to {other.name}: it must be able to resolve their names" in answer["error"]


def test_a_cable_that_is_plugged_in_again_is_no_error():
    """Of version 4 alone: the router's addresses of version 6 do not come back to life with the cable."""
    with two_hosts() as (one, other), ranks_on((one, other)) as ranks:
        timer = threading.Timer(5, other.plug_in_cable)

        def disconnect(port):
            other.pull_cable()
            timer.start()

        assert join(ranks, [one.address, other.address], disconnect) == [{"sum": 2.0}] * 2
        timer.join()


@pytest.mark.slow
def test_the_users_interface_wins_and_the_error_names_it():
    with two_hosts() as hosts, ranks_on(hosts, GLOO_SOCKET_IFNAME="lo") as ranks:
        first, second = join(ranks, [host.address for host in hosts])
    assert "rank 0 at 127.0.0.1 (GLOO_SOCKET_IFNAME=lo) cannot reach rank 1 at 127.0.0.1:" in first["error"]
    assert "rank 1 at 127.0.0.1 (GLOO_SOCKET_IFNAME=lo) cannot reach" in second["error"]


@pytest.mark.slow
@pytest.mark.parametrize("firewall", ["the rendezvous alone", "all but the rendezvous", "a cable that is pulled"])
def test_ranks_that_cannot_reach_each_other_name_host_and_port(firewall):
    with two_hosts() as (one, other), ranks_on((one, other)) as ranks:
        ports = []

        def disconnect(port):
            ports.append(port)
            if firewall == "the rendezvous alone":
                other.drop_ports(port, port)
            elif firewall == "all but the rendezvous":
                other.drop_ports(1024, port - 1)
                other.drop_ports(port + 1, 65534)
            else:
                other.pull_cable()

        first, second = join(ranks, [one.address, other.address], disconnect)
    wanted = f"rank 0 at {one.address}:" if firewall == "all but the rendezvous" else (
        f"the rendezvous of rank 0 at {one.address}:{ports[0]} within 30 s"
    )  # fmt: skip
    assert f"ConnectionError: rank 1 at {other.address} (eth0) cannot reach {wanted}" in second["error"]
    assert f"{other.address}" in first["error"]
    assert f"{one.address}" in first["error"]
