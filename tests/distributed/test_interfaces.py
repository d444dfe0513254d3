"""Which address and interface of this host a rank takes. Two hosts are in `tests/cluster/test_two_hosts.py`."""

import os
import socket

import pytest

from pipeline.distributed.interfaces import Endpoint, find_endpoint, interfaces


def test_the_interfaces_are_those_that_the_system_has():
    names = {name for _, name in socket.if_nameindex()}
    assert interfaces()["127.0.0.1"] == "lo"
    assert {label.partition(":")[0] for label in interfaces().values()} <= names


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid", "198.51.100.7"])
def test_one_host_alone_needs_no_network(host):
    endpoint = find_endpoint(host, [], "gloo")
    assert endpoint.interface == "lo"
    assert str(endpoint) in ("127.0.0.1 (lo)", "::1 (lo)")


def test_a_host_without_a_way_to_the_others_says_so():
    with pytest.raises(ConnectionError, match=r"cluster knows as 127\.0\.0\.1, finds no way to no-such-host\.invalid"):
        find_endpoint("127.0.0.1", ["no-such-host.invalid"], "gloo")


@pytest.mark.parametrize(
    ("backend", "value"), [("gloo", "lo"), ("gloo", "lo,none"), ("nccl", "=lo"), ("nccl", "lo"), ("nccl", "none,lo")]
)
def test_the_users_interface_is_taken(monkeypatch, backend, value):
    name = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}[backend]
    monkeypatch.setenv(name, value)
    endpoint = find_endpoint("no-such-host.invalid", ["neither.invalid"], backend)
    assert str(endpoint) == f"127.0.0.1 ({name}={value})"
    with endpoint.used():
        assert os.environ[name] == value


def test_one_that_no_address_has_is_left_to_the_backend(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0")
    endpoint = find_endpoint("127.0.0.1", [], "nccl")
    assert (endpoint.address, endpoint.interface) == ("127.0.0.1", "lo")
    with endpoint.used():
        assert os.environ["NCCL_SOCKET_IFNAME"] == "^docker0"
        assert "NCCL_SOCKET_FAMILY" not in os.environ


@pytest.mark.parametrize(("address", "family"), [("10.0.0.1", "AF_INET"), ("fd00::1", "AF_INET6")])
def test_gloo_and_nccl_are_told_while_the_group_is_there(monkeypatch, address, family):
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with Endpoint(address, "eth7").used():
        assert [os.environ[name] for name in names] == ["eth7", "=eth7", family]
    assert not any(name in os.environ for name in names)
