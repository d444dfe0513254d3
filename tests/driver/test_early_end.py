"""What ends a training before its schedule does."""

import pytest

from pipeline.cluster.stop import Stop
from pipeline.driver.early_end import EarlyEnd
from pipeline.tracking.relay import _Pauses


def evaluation(step):
    return {"kind": "evaluation", "step": step}


def test_the_first_evaluation_that_says_so_prunes_and_later_ones_are_not_asked():
    asked = []
    end = EarlyEnd(lambda event: bool(asked.append(event["step"])) or event["step"] == 2, Stop())
    end.see([{"kind": "step", "step": 1}, evaluation(1)])
    assert not end.is_set()
    end.see([evaluation(2), evaluation(3)])
    end.see([evaluation(4)])
    assert (asked, end.pruned, end.is_set()) == ([1, 2], True, True)


def test_the_end_of_all_trials_is_its_own_and_prunes_nothing():
    everything = Stop()
    end = EarlyEnd(lambda _: False, everything)
    everything.set()
    assert end.is_set()
    assert not end.pruned


def test_an_error_of_the_decision_ends_the_training_and_is_kept():
    def decide(_):
        raise OSError("disk full")

    end = EarlyEnd(decide, Stop())
    end.see([evaluation(1), evaluation(2)])
    assert end.is_set()
    assert not end.pruned
    with pytest.raises(OSError, match="disk full"):
        raise end.error


def test_events_on_remote_storage_are_looked_for_often_where_somebody_decides_by_them():
    def longest(**how):
        pauses = _Pauses(is_local=False, **how)
        return max(pauses.next(0.1, found=True) for _ in range(20))

    assert longest(is_watched=True) <= 2
    assert longest() > 10
