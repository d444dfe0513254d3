"""Ranks hear one text of each other, over sockets of rank 0: threads stand for ranks, sockets and files are real."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest

from pipeline.cluster import gather, rendezvous_address
from pipeline.cluster.failures import GangBrokenError
from pipeline.cluster.gather import FirstRankFailedError, gather_as_first, gather_from_first
from pipeline.cluster.rendezvous_address import AddressInStorage, RendezvousAddress, announce_launch
from pipeline.cluster.store import rendezvous_socket


class Gang:
    """The ranks of one gang of a launch, whose tasks Spark numbers from ``first_task`` on."""

    def __init__(self, folder, first_task=0, *, launch="launch", seconds=30.0, count=3):
        self.folder, self.launch, self.first_task, self.seconds = str(folder), launch, first_task, seconds
        self.hosts = [f"host-{rank}" for rank in range(count)]
        self.listener = rendezvous_socket("127.0.0.1", 0)
        host, port = self.listener.getsockname()
        self.address = RendezvousAddress(launch, first_task, f"token-{first_task}", host, port)

    def exchange(self):
        return AddressInStorage(self.folder, self.launch, self.first_task, self.seconds)

    def first(self, *, publish=True):
        exchange = self.exchange()

        def check():
            if (reason := exchange.read_unreachable(self.address)) is not None:
                raise RuntimeError(reason)

        if publish:
            exchange.publish(self.address)
        token = self.address.token
        return gather_as_first(self.listener, "0", self.hosts, token=token, seconds=self.seconds, check=check)

    def other(self, rank, *, seconds=30.0):
        return gather_from_first(self.exchange(), rank, str(rank), me=f"host-{rank}", seconds=seconds)

    def connect(self, **message):
        connection = socket.create_connection((self.address.address, self.address.port), 5)
        connection.sendall(json.dumps(message).encode() + b"\n")
        return connection


@pytest.fixture
def threads():
    with ThreadPoolExecutor(80) as pool:
        yield pool


@pytest.fixture
def gang(tmp_path):
    announce_launch(str(tmp_path), "launch")
    made = Gang(tmp_path)
    with closing(made.listener):
        yield made


@pytest.mark.parametrize("count", [2, 64])
def test_every_rank_hears_all_texts_in_rank_order(tmp_path, threads, count):
    announce_launch(str(tmp_path), "launch")
    gang = Gang(tmp_path, count=count)
    others = [threads.submit(gang.other, rank) for rank in range(1, count)]
    time.sleep(0.1)  # they wait for the address
    started = time.monotonic()
    expected = [str(rank) for rank in range(count)]
    assert gang.first() == expected
    assert [other.result(10) for other in others] == [expected] * (count - 1)
    assert time.monotonic() - started < 5
    gang.listener.close()


def test_a_text_may_be_long(gang, threads):
    long = "ä" * (2 << 20)
    first = threads.submit(gang.first)
    one = threads.submit(gather_from_first, gang.exchange(), 1, long, me="", seconds=30)
    assert gang.other(2) == first.result(10) == one.result(10) == ["0", long, "2"]


@pytest.mark.parametrize(
    "line",
    [b"GET / HTTP/1.1\r\n\r\n", b'{"token": "x", "rank": 1, "text": ""}\n', b"[]\n", b"", b"\xff\n",
     b'{"token": "token-0", "rank": 3, "text": ""}\n', b'{"token": "token-0", "rank": 0, "text": "me"}\n',
     b'{"token": "x", "rank": 1e999, "text": ""}\n', b'{"token": "token-0", "rank": 1e999, "text": ""}\n',
     100_000 * b"[" + b"\n"],
)  # fmt: skip
def test_a_stranger_changes_nothing(gang, threads, line):
    first = threads.submit(gang.first)
    with socket.create_connection((gang.address.address, gang.address.port), 5) as stranger:
        stranger.sendall(line)
    others = [threads.submit(gang.other, rank) for rank in (1, 2)]
    assert first.result(10) == ["0", "1", "2"]
    assert [other.result(10) for other in others] == [["0", "1", "2"]] * 2


def test_a_rank_that_dies_meanwhile_breaks_the_gang_at_once(gang, threads):
    gang.hosts.append("host-3")  # which the others still wait for
    first, second = threads.submit(gang.first), threads.submit(gang.other, 2)
    with gang.connect(token=gang.address.token, rank=1, text="1"):
        time.sleep(0.2)
    with pytest.raises(GangBrokenError, match="rank 1 on host-1 was lost while the ranks found together"):
        first.result(5)
    with pytest.raises(GangBrokenError, match="rank 2 at host-2 lost rank 0 at 127"):
        second.result(5)


def test_ranks_that_do_not_come_are_named_and_the_others_are_told(gang, threads):
    gang.seconds = 1.0
    first, second = threads.submit(gang.first), threads.submit(gang.other, 2)
    with pytest.raises(ConnectionError, match=r"^rank 1 on host-1 did not come to the rendezvous .* within 1 s"):
        first.result(10)
    with pytest.raises(FirstRankFailedError, match="rank 1 on host-1 did not come"):
        second.result(10)


def test_a_rank_that_cannot_get_through_says_so_and_rank_0_need_not_wait(gang, threads, monkeypatch):
    monkeypatch.setattr(gather, "CONNECT_SECONDS", 1)
    first = threads.submit(gang.first)
    time.sleep(0.5)
    blocked = replace(gang.address, port=9)  # where nobody listens, as behind a firewall that refuses
    exchange = gang.exchange()
    exchange.newest = lambda: blocked
    with pytest.raises(ConnectionError, match=r"rank 1 at eth0 cannot reach the rendezvous of rank 0 at 127.0.0.1:9"):
        gather_from_first(exchange, 1, "1", me="eth0", seconds=30)
    with pytest.raises(RuntimeError, match="rank 1 at eth0 cannot reach"):
        first.result(10)


def test_an_address_of_an_earlier_gang_is_passed_over(tmp_path, threads):
    """Also where its rank 0 still lives: Spark leaves a Python worker two seconds after it has ended its task."""
    announce_launch(str(tmp_path), "launch")
    earlier, gang = Gang(tmp_path, 0), Gang(tmp_path, 3)
    earlier.exchange().publish(earlier.address)
    zombie = threads.submit(earlier.first)
    others = [threads.submit(gang.other, rank) for rank in (1, 2)]
    time.sleep(2)
    assert gang.first() == ["0", "1", "2"]
    assert [other.result(10) for other in others] == [["0", "1", "2"]] * 2
    assert not zombie.done()
    earlier.seconds = 0
    earlier.connect(token=earlier.address.token, rank=1, text="").close()
    with pytest.raises(GangBrokenError):
        zombie.result(10)
    earlier.listener.close()
    gang.listener.close()


def test_where_nobody_listens_any_more_it_waits_for_the_next_address(tmp_path, threads, monkeypatch):
    monkeypatch.setattr(gather, "OTHER_GANG_SECONDS", 0.2)
    monkeypatch.setattr(gather, "CONNECT_SECONDS", 0.5)
    announce_launch(str(tmp_path), "launch")
    earlier, gang = Gang(tmp_path, 0), Gang(tmp_path, 3)
    earlier.exchange().publish(earlier.address)
    earlier.listener.close()
    others = [threads.submit(gang.other, rank) for rank in (1, 2)]
    time.sleep(2)
    assert gang.first() == ["0", "1", "2"]
    assert [other.result(10) for other in others] == [["0", "1", "2"]] * 2
    gang.listener.close()


def test_where_spark_numbers_tasks_in_another_order_it_is_slower_and_works(gang, threads, monkeypatch):
    monkeypatch.setattr(gather, "OTHER_GANG_SECONDS", 0.5)
    shifted = Gang(gang.folder, 7)
    shifted.listener.close()
    first = threads.submit(gang.first)
    others = [threads.submit(shifted.other, rank) for rank in (1, 2)]
    assert [other.result(10) for other in others] == [["0", "1", "2"]] * 2
    assert first.result(10) == ["0", "1", "2"]


def test_the_reason_of_rank_0_reaches_those_that_come_later(gang):
    gang.exchange().publish(RendezvousAddress("launch", 0, error="no GPU here"))
    with pytest.raises(FirstRankFailedError, match="no GPU here"):
        gang.other(1)


def test_an_address_of_another_launch_is_none(gang, monkeypatch):
    monkeypatch.setattr(rendezvous_address, "SEEN_SECONDS", 0.5)
    gang.exchange().publish(replace(gang.address, launch="an earlier one"))
    assert not gang.exchange().is_shared()
    with pytest.raises(
        GangBrokenError, match=r"rendezvous.json, written by the driver, is not seen here: set `output`"
    ):
        gang.other(1)


def test_without_an_address_it_does_not_wait_for_ever(gang):
    assert gang.exchange().is_shared()
    with pytest.raises(ConnectionError, match=r"rank 1 at host-1 was not told within 0\.5 s where rank 0 listens"):
        gang.other(1, seconds=0.5)


def test_the_socket_of_the_rendezvous_becomes_that_of_the_store(gang, threads):
    from pipeline.cluster.store import open_store
    from pipeline.config.cluster import WorkerSettings

    others = [threads.submit(gang.other, rank) for rank in (1, 2)]
    gang.first()
    assert [len(other.result(10)) for other in others] == [3, 3]
    store = open_store(gang.listener, 3, WorkerSettings(count=3))
    assert store.port == gang.address.port
