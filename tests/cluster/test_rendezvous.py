"""What ranks tell each other before they join."""

import pytest

from pipeline.cluster.introduction import Introduction, check_agreement
from pipeline.cluster.rendezvous import RankState, host_of
from pipeline.distributed.interfaces import Endpoint
from pipeline.telemetry.heartbeat import Attempt


@pytest.mark.parametrize(
    "introduction",
    [
        Introduction({"torch": "2.13", "classes": ["a", "b"]}, "GPU-1", Endpoint("::1", "lo"), 4711, Attempt(2, "id")),
        Introduction({"torch": "2.13"}),
        Introduction(error=""),  # an exception without a text is one, too
    ],
)
def test_an_introduction_arrives_as_it_was_sent(introduction):
    assert Introduction.from_json(introduction.to_json()) == introduction


def test_a_fact_that_only_one_rank_has_is_a_disagreement():
    check_agreement([{"a": 1}, {"a": 1}], ["x", "y"])
    with pytest.raises(ValueError, match="ranks disagree about b: rank 0 on x has None, rank 1 on y has 2"):
        check_agreement([{"a": 1}, {"a": 1, "b": 2}], ["x", "y"])


@pytest.mark.parametrize(
    ("task_address", "host"),
    [
        ("10.0.0.1:4711", "10.0.0.1"),
        ("host-a:4711", "host-a"),
        ("localhost", "localhost"),
        ("[fd77:1:0:0:0:0:0:1]:4711", "fd77:1::1"),
        ("[fe80:0:0:0:0:0:0:1%eth0]:4711", "fe80::1"),
    ],
)
def test_the_host_of_a_task_is_what_getaddrinfo_understands(task_address, host):
    assert host_of(task_address) == host


def test_ranks_of_a_host_are_counted_in_rank_order():
    ranks = [RankState(rank, ["x", "y", "x"]) for rank in range(3)]
    assert [(rank.local_rank, rank.local_world_size) for rank in ranks] == [(0, 2), (0, 1), (1, 2)]
    assert [rank.other_hosts for rank in ranks] == [["y"], ["x"], ["y"]]
