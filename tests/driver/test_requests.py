"""How many requests a training makes of an object store: counted by a proxy in front of a real S3 server."""

import itertools
import json
import sys
import time
from collections import Counter

import pytest
from paced_training import is_sign_of_life, paced_training, table
from pyspark import cloudpickle
from small_data import dataset_settings

from pipeline.cluster.watch import Watch
from pipeline.ingest.job import ingest_dataset

pytestmark = [pytest.mark.spark, pytest.mark.long]
cloudpickle.register_pickle_by_value(sys.modules[__name__])

# Of 50 steps of 0.7 s on two ranks; 0.5.0 made 137 PUT, 638 GET, 366 HEAD, 238 LIST.
MOST = {"PUT": 27, "GET": 127, "HEAD": 73, "LIST": 47}


def slow_steps(moment):
    if moment.name == "after_step":
        time.sleep(0.7)


@pytest.fixture
def beats(monkeypatch):
    """When the driver heard of which rank directly: (rank, time.monotonic())."""
    hear, heard = Watch.hear, []

    def note(watch, text):
        hear(watch, text)
        heard.append((json.loads(text)["rank"], time.monotonic()))

    monkeypatch.setattr(Watch, "hear", note)
    return heard


def test_a_training_of_35_seconds_makes_a_fifth_of_the_requests(spark, s3, idx_folder, store_uri, tmp_path, beats):
    bucket = s3.new_bucket()
    ingest_dataset(spark, dataset_settings(f"{bucket}/data", idx_folder), cache=str(tmp_path))
    s3.faults.requests.clear()
    trained = paced_training(spark, bucket, tmp_path, store_uri, ranks=2, epochs=2, pace=slow_steps)
    requests = list(s3.faults.requests)
    print(table(requests))
    assert (trained.steps, trained.attempts) == (50, 1)
    kinds = Counter(request.kind for request in requests)
    assert {kind: kinds[kind] for kind, most in MOST.items() if kinds[kind] > most} == {}
    assert len(requests) <= sum((137, 638, 366, 238)) / 5
    # Nothing was bought by silence: every step is told, and each rank has given signs of life all the time.
    for rank in range(2):
        times = [at for who, at in beats if who == rank]
        assert len(times) >= 6
        assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 15
    assert not any(request.kind == "PUT" and "/ranks/" in request.path for request in requests)
    assert sum(is_sign_of_life(request) for request in requests) < len(requests)
