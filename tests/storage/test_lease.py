"""What claims to datasets and leases of drivers have in common: see `ingest/test_claim` and `driver/test_lease` too."""

import json
import re
import threading
import time

import pytest

from pipeline import storage
from pipeline.storage.lease import Lease, numbers, wait_for_change


class NumberedLease(Lease):
    """Of the holder of the highest number, ``N.json``."""

    def _text(self, renewals, *, released=False):
        return json.dumps([renewals, released]).encode()

    def _is_newest(self):
        return max(numbers(self.folder, re.compile(r"(\d+)\.json"))) == self.number


def lease_in(folder, number=1, *, seconds=0.6):
    path = folder / f"{number}.json"
    path.write_text("[0, false]")
    return NumberedLease(str(folder), number, str(path), seconds=seconds, renewals=3)


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_is_renewed_until_it_ends_and_says_so_then(tmp_path):
    lease, file = lease_in(tmp_path), tmp_path / "1.json"
    lease.begin()
    until(lambda: json.loads(file.read_bytes())[0] >= 3)
    assert lease.holds()
    lease.end()
    assert json.loads(file.read_bytes())[1]
    assert not lease._thread.is_alive()


def test_who_has_lost_it_stops_renewing_it_and_does_not_release_it(tmp_path, caplog):
    lease = lease_in(tmp_path)
    lease.begin()
    (tmp_path / "2.json").write_text("[0, false]")
    lease._thread.join(10)
    assert not lease._thread.is_alive()
    assert not lease.holds()
    assert not lease.holds(lately=True)
    assert f"another process has taken {tmp_path} over" in caplog.text
    lease.end()
    assert not json.loads((tmp_path / "1.json").read_bytes())[1]


def test_an_outage_shorter_than_the_lease_takes_it_from_nobody(tmp_path, monkeypatch):
    lease = lease_in(tmp_path, seconds=3)
    lease.begin()
    until(lambda: lease._renewed_at and json.loads((tmp_path / "1.json").read_bytes())[0] >= 0)
    with monkeypatch.context() as outage:

        def fail(*_, **__):
            raise OSError("503 Slow Down")

        outage.setattr(storage, "names", fail)
        assert lease.holds()
        lease._renewed_at -= 3
        with pytest.raises(OSError, match="Slow Down"):
            lease.holds()
    lease.end()


def test_names_give_their_numbers(tmp_path):
    for name in ("record.json", "record-0002.json", "record-12345.json", "record-2.json", "xrecord.json", "a.txt"):
        (tmp_path / name).touch()
    assert sorted(numbers(str(tmp_path), re.compile(r"record(?:-(\d{4,}))?\.json"))) == [1, 2, 12345]
    assert numbers(str(tmp_path / "nowhere"), re.compile(r"x(\d)")) == []


def test_a_change_is_seen_and_no_change_is_the_end():
    said = ["a"]
    threading.Timer(0.1, lambda: said.append("b")).start()
    began = time.monotonic()
    assert wait_for_change(lambda: said[-1], "a", seconds=10, looks=500) == "b"
    assert time.monotonic() - began < 9
    began = time.monotonic()
    assert wait_for_change(lambda: None, None, seconds=0.3, looks=10) is None
    assert time.monotonic() - began >= 0.3
