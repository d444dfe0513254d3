"""One call at a time is at a registered model: real processes, real stores."""

import contextlib
import threading
import time

import mlflow
import pytest
import register_driver
from mlflow_server import MlflowServer
from second_driver import second_driver

from pipeline.config.study import TrackingSettings
from pipeline.driver.lease import DriverProcess, this_process
from pipeline.serving import claim
from pipeline.serving.claim import ClaimContent, claimed
from pipeline.tracking.registry import Registry, RegistryError

PROGRAM, MODEL, PREFIX = register_driver.__file__, "pets", "sparknorm.claim."
ELSEWHERE = DriverProcess(host="far", pid=7, started="1", machine="another kernel", since="2026-01-01T00:00:00Z")


@pytest.fixture(params=["sqlite", "server"])
def uri(request, store_uri, tmp_path):
    """The address of a store: a file, and a server on such a file."""
    if request.param == "sqlite":
        yield store_uri
        return
    server = MlflowServer(tmp_path, store_uri)
    server.start()
    yield server.uri
    server.kill()


@pytest.fixture
def registry(store_uri):
    """A registered model without a version."""
    made = Registry(TrackingSettings(uri=store_uri, outage_seconds=5), None, MODEL)
    made.create()
    return made


def claims(registry: Registry) -> list[str]:
    return [key for key in registry.model_tags() if key.startswith(PREFIX)]


def have(registry: Registry, wait_seconds: float = 60):
    return claimed(registry, wait_seconds=wait_seconds, outage_seconds=5)


@pytest.mark.parametrize(
    ("processes", "times"), [(3, 4), pytest.param(6, 20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_processes_that_read_and_write_one_after_the_other_lose_no_count(uri, tmp_path, processes, times):
    registry = Registry(TrackingSettings(uri=uri, outage_seconds=30), None, MODEL)
    registry.create()
    registry.tag_model(register_driver.COUNTER, "0")
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(second_driver(PROGRAM, tmp_path / f"log-{n}")) for n in range(processes)]
        for other in others:
            other.begin("count", uri, MODEL, times)
        assert [other.result() for other in others] == [""] * processes
    assert registry.model_tags()[register_driver.COUNTER] == str(processes * times)
    assert claims(registry) == []


def test_threads_of_one_process_wait_for_each_other(registry):
    inside, most = [], []

    def enter() -> None:
        with have(registry):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
    assert claims(registry) == []


def test_a_process_of_this_machine_that_was_killed_is_not_waited_for(registry, store_uri, tmp_path):
    with second_driver(PROGRAM, tmp_path / "log") as other:
        other.begin("hold", store_uri, MODEL)
        give_up_at = time.monotonic() + 60
        while registry.model_tags().get(register_driver.COUNTER) != "held":
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        with (
            pytest.raises(RegistryError, match=rf"pets is being changed by process {other.process.pid} on .* = 1: run"),
            have(registry, wait_seconds=1),
        ):
            raise AssertionError("two at once")
        other.process.kill()
        other.process.wait(60)
        began_at = time.monotonic()
        with have(registry):
            assert time.monotonic() - began_at < 20  # its claim lasts for 90 s
            assert len(claims(registry)) == 1


@pytest.mark.parametrize("ticket", [0, 1])
def test_a_process_elsewhere_is_waited_for_while_it_shows_a_sign_of_life(registry, ticket):
    """Also while it draws its ticket."""
    content = ClaimContent(ticket=ticket, driver=ELSEWHERE, seconds=1.5)
    ended = threading.Event()

    def renew() -> None:
        number = 0
        while not ended.wait(0.1):
            number += 1
            registry.tag_model(f"{PREFIX}far", content.model_copy(update={"renewals": number}).model_dump_json())

    registry.tag_model(f"{PREFIX}far", content.model_dump_json())
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        message = r"changed by process 7 on far since 2026-.*, for longer than registry\.wait_seconds = 4"
        with pytest.raises(RegistryError, match=message), have(registry, wait_seconds=4):
            raise AssertionError("two at once")
    finally:
        ended.set()
        thread.join()
    assert claims(registry) == [f"{PREFIX}far"]
    began_at = time.monotonic()
    with have(registry):  # it has died
        assert time.monotonic() - began_at >= 1.5
        assert f"{PREFIX}far" not in claims(registry)


def test_whoever_was_believed_dead_changes_nothing_more(registry, store_uri, tmp_path):
    client = mlflow.MlflowClient(store_uri)
    for _ in range(2):
        client.create_model_version(MODEL, f"{tmp_path}/model")
    message = r"no sign of life for 65 s, .*: nothing more was changed; run it again"
    with pytest.raises(RegistryError, match=message), have(registry):
        registry.set_alias("champion", "1")
        registry.untag_model(claims(registry)[0])  # as who has taken it over
        registry.set_alias("champion", "2")
    assert client.get_model_version_by_alias(MODEL, "champion").version == 1


def test_a_claim_that_could_not_be_renewed_in_its_time_is_over_although_nobody_has_it(registry, monkeypatch):
    monkeypatch.setattr(claim, "GRACE_SECONDS", -4.5)  # half a second
    monkeypatch.setattr(claim.Claim, "_write", lambda *_, **__: time.sleep(1))
    with pytest.raises(RegistryError, match=r"no sign of life for 0\.5 s"), have(registry):
        time.sleep(0.6)
        registry.set_alias("champion", "1")


def test_a_claim_that_cannot_be_read_is_named(registry):
    registry.tag_model(f"{PREFIX}abc", "of a later version")
    message = r"the tag sparknorm\.claim\.abc of pets is no claim that this version can"
    with pytest.raises(RegistryError, match=message), have(registry):
        raise AssertionError("two at once")
    assert claims(registry) == [f"{PREFIX}abc"]


def test_what_died_in_this_very_process_is_not_waited_for(registry):
    dead = ClaimContent(ticket=1, driver=this_process(), seconds=600)
    registry.tag_model(f"{PREFIX}0", dead.model_dump_json())
    with have(registry, wait_seconds=0):
        assert len(claims(registry)) == 1
