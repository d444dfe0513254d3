"""A cluster on two hosts, trained on while cables are pulled. Master and driver are on the first host."""

import json
import re
import threading
import time

import pytest
from small_training import Running, equal, events, final_state, make_job, seconds_lost, steps_not_told
from standalone_cluster import WorkerOffer, run_driver, standalone_cluster
from two_hosts import two_hosts

pytestmark = pytest.mark.spark

# When a cable is pulled: what `slow_at` takes.
DURING = {"training": ("before_data", 40), "evaluation": ("after_step", None), "checkpoint": ("checkpoint_begun", 20)}
STALL_SECONDS = 15
# What the driver adds to `workers.stall_seconds` until training goes on, or an error tells why not.
MORE_SECONDS = 30

DRIVER = """
import json, sys
from pathlib import Path
from pipeline.cluster import barrier
from small_training import TWO, launch, make_job
from standalone_cluster import driver_session
from rank_faults import slow_at

master, dataset, folder, wanted = sys.argv[1:]
wanted = json.loads(wanted)
spark = driver_session(master, {"spark.python.daemon.module": "pipeline.daemon", "spark.executor.memory": "512m"})
workers = TWO.model_copy(update={"slots_wait_seconds": 60, **wanted.get("workers", {})})
for name, moment in wanted["trainings"].items():
    hook = slow_at(*moment, seconds=1) if moment else None
    outcome = launch(spark, make_job(dataset, f"{folder}/{name}", **wanted["train"]), workers, hook=hook)
    Path(folder, f"{name}.json").write_text(json.dumps(outcome.values()))
print(json.dumps(barrier.run(spark, lambda worker: str(worker.endpoint), workers=workers) if wanted["ask"] else []))
spark.stop()
"""


def as_debian_installs(hosts):
    for host, other in (hosts, hosts[::-1]):
        host.write_hosts(f"127.0.1.1 {host.name}", f"{other.address} {other.name}")


class Scene:
    """Two hosts with a Worker each, and a driver that runs trainings one after the other."""

    def __init__(self, hosts, cluster, dataset, folder):
        self.hosts, self.cluster, self.dataset, self.folder = hosts, cluster, dataset, folder

    def drive(self, trainings, meanwhile=lambda scene: None, *, ask=False, workers=None, **train):
        """The outcomes of the trainings, and what the driver printed last; ``meanwhile`` runs in a thread."""
        wanted = {"trainings": trainings, "workers": workers or {}, "train": train, "ask": ask}
        thread = threading.Thread(target=meanwhile, args=(self,), daemon=True)
        thread.start()
        words = [self.dataset, str(self.folder), json.dumps(wanted)]
        printed = run_driver(DRIVER, self.cluster.master, *words, host=self.hosts[0], timeout=400)
        thread.join(30)
        assert not thread.is_alive()
        return [self.outcome(name) for name in trainings], json.loads(printed.splitlines()[-1])

    def at_moment(self, name):
        """Returns when the training is at the moment at which it takes its time."""
        Running(self.folder / name).wait_until("the moment came", (self.folder / name / "slow").exists)
        return self.hosts[1]

    def outcome(self, name):
        return json.loads((self.folder / f"{name}.json").read_text())

    def job(self, name, **train):
        return make_job(self.dataset, self.folder / name, **train)


@pytest.fixture
def scene(dataset, tmp_path):
    with two_hosts() as hosts:
        as_debian_installs(hosts)
        offers = [WorkerOffer(cores=1, host=host) for host in hosts]
        with standalone_cluster(offers, tmp_path, host=hosts[0]) as cluster:
            yield Scene(hosts, cluster, dataset, tmp_path)


def test_two_hosts_train_though_each_takes_its_own_name_for_loopback(scene):
    [outcome], endpoints = scene.drive({"plain": None}, ask=True, epochs=2)
    assert outcome["error"] == ""
    assert outcome["result"]["world_size"] == 2
    assert sorted(endpoints) == [f"{host.address} (eth0)" for host in scene.hosts]


@pytest.mark.slow
def test_a_cable_that_is_out_for_five_seconds_changes_no_bit(scene):
    def pull_and_plug_in(scene):
        for name in DURING:
            host = scene.at_moment(name)
            host.pull_cable()
            time.sleep(5)
            host.plug_in_cable()

    outcomes, _ = scene.drive({"undisturbed": None, **DURING}, pull_and_plug_in, epochs=3)
    assert [outcome["error"] for outcome in outcomes] == [""] * 4
    undisturbed, *others = [final_state(scene.job(name, epochs=3)) for name in ("undisturbed", *DURING)]
    assert [equal(undisturbed, other) for other in others] == [True] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "power"), [("training", False), ("evaluation", False), ("checkpoint", False), ("training", True)]
)
def test_without_a_host_that_is_cut_off_for_good_it_goes_on(scene, when, power):
    cut_at = []

    def cut_off(scene):
        host = scene.at_moment("cut")
        cut_at.append(time.time())
        host.lose_power() if power else host.pull_cable()

    workers = {"min_count": 1, "stall_seconds": STALL_SECONDS}
    [outcome], _ = scene.drive({"cut": DURING[when]}, cut_off, workers=workers, epochs=4)
    assert outcome["error"] == ""
    assert outcome["result"]["world_size"] == 1
    job = scene.job("cut", epochs=4)
    assert [start["world_size"] for start in events(job, "start")] == [2, 1]
    assert steps_not_told(job, outcome["result"]["steps"]) == []
    lost = seconds_lost(job, cut_at[0])
    print(f"{when}{', power lost' if power else ''}: {lost:.1f} s from the cut to the next new step")
    assert lost <= STALL_SECONDS + MORE_SECONDS


@pytest.mark.slow
def test_where_all_workers_are_wanted_the_error_names_the_host_that_is_cut_off(scene):
    def cut_off(scene):
        scene.at_moment("cut").pull_cable()

    [outcome], _ = scene.drive({"cut": DURING["training"]}, cut_off, workers={"stall_seconds": STALL_SECONDS}, epochs=4)
    ended_at = (scene.folder / "cut.json").stat().st_mtime
    assert outcome["error_type"] == "ShortageError"
    assert f" at {scene.hosts[1].address}:" in outcome["error"]
    assert "does not answer, and workers.count is 2, but spark://" in outcome["error"]
    slow_at = (scene.folder / "cut" / "slow").stat().st_mtime
    print(f"{ended_at - slow_at:.1f} s from the cut to the error")
    assert ended_at - slow_at <= STALL_SECONDS + MORE_SECONDS


@pytest.mark.slow
def test_a_firewall_that_drops_the_rendezvous_is_an_error_that_names_both_addresses(scene):
    for host in scene.hosts:
        host.drop_ports(29571, 29571)
    [outcome], _ = scene.drive({"dropped": None}, workers={"port": 29571})
    one, other = (host.address.replace(".", r"\.") for host in scene.hosts)
    assert outcome["error_type"] == "WorkerError"
    assert re.search(
        rf"ConnectionError: rank 1 at ({one}|{other}) \(eth0\) cannot reach the rendezvous of rank 0 at "
        rf"({one}|{other}):29571 within 30 s: look at the routes and firewalls between them",
        outcome["error"],
    )
    assert outcome["seconds"] < 90
