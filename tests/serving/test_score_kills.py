"""Drivers, executors and Python workers that are killed at random moments of `score` change nothing in its scores."""

import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from score_driver import LEASE_SECONDS, scorer
from small_models import write_model
from small_scores import aside_of, rows_of, score_settings, write_photos

from pipeline.ingest import claim
from pipeline.serving import load_scores, score

pytestmark = [pytest.mark.spark, pytest.mark.long, pytest.mark.slow]

PHOTOS, VICTIMS = 600, ("driver", "worker", "executor")
MASTER = "local-cluster[2,1,1024]"


def outcome(folder):
    """What must be the same: the digest of the scores, every row to the bit, and what was set aside."""
    rows = rows_of(folder)
    assert len({row["id"] for row in rows}) == len(rows)
    written = {str(path.relative_to(folder)) for path in Path(folder).rglob("part-*.parquet")}
    found = load_scores(str(folder))
    assert written == {*(part.path for part in found.parts), *found.quarantine}
    return found.digest, rows, aside_of(folder)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [6, 20])
def test_kills_at_random_moments(spark, tmp_path, empty_store, monkeypatch, kills):
    monkeypatch.setattr(claim, "LEASE_SECONDS", LEASE_SECONDS)
    model, _ = write_model(tmp_path)
    photos = write_photos(tmp_path / "in", PHOTOS)
    for number in range(4):
        (photos / f"bad {number}.png").write_bytes(b"no image")
    store = shutil.copy(empty_store, tmp_path / "mlflow.db")
    source = {"kind": "folder", "path": str(photos)}

    def settings(name):
        return score_settings(tmp_path / name, model, store, source=source)

    score(spark, settings("undisturbed"))
    expected = outcome(tmp_path / "undisturbed" / "scores")
    seed, done, given_again = random.Random(0), Counter(), Counter()
    turn, log = 0, tmp_path / "log"
    while done.total() < kills and turn < 2 * kills:
        with scorer(MASTER, log) as other:
            other.begin(settings(f"warm-{turn}").model_dump_json())
            assert other.result() == ""
            started = time.monotonic()
            other.begin(settings(f"timed-{turn}").model_dump_json())
            assert other.result() == ""
            seconds = time.monotonic() - started
            victim = ""
            while victim != "driver" and done.total() < kills and turn < 2 * kills:
                victim, name = VICTIMS[turn % len(VICTIMS)], f"run-{turn}"
                turn += 1
                other.begin(settings(name).model_dump_json())
                time.sleep(seed.uniform(0, seconds))
                if victim == "driver":
                    other.process.kill()
                    done[victim] += 1
                    before = (tmp_path / name / "scores" / "scores.json").exists()
                    found = score(spark, settings(name))  # the same again, in another session
                    given_again["published before" if before else f"{min(found.parts_found, 1)} parts found"] += 1
                else:
                    done[victim] += other.kill_one(victim, seed)
                    assert other.result() == "", f"turn {turn}, {victim}"
                assert outcome(tmp_path / name / "scores") == expected, f"turn {turn}, {victim}"
    print(f"{done.total()} kills ({dict(done)}), undisturbed {seconds:.1f} s; after drivers: {dict(given_again)}")
    assert done.total() == kills
