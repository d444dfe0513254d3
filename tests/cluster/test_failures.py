"""Which failure of a gang is the news, and how it is told."""

from pipeline.cluster.failures import Failure, describe, failure_from, first_of


def failure(rank, *, echo=False, time=0.0, **more):
    return Failure(rank, "host", "KeyError: 'x'", "Traceback\nKeyError: 'x'\n", echo, time, **more)


def test_the_first_that_is_no_echo_is_the_news():
    failures = [failure(0, echo=True, time=1), failure(1, time=3), failure(2, time=2)]
    assert first_of(failures).rank == 2
    assert describe(failures) == "rank 2 on host (also on ranks [1]): KeyError: 'x'\nTraceback\nKeyError: 'x'"
    assert first_of(failures[:1]).rank == 0


def test_device_and_position_are_told_where_they_are_known():
    text = describe([failure(1, device="cuda:0", where="forward, epoch 1, step 4")])
    assert text.startswith("rank 1 on host (cuda:0) in forward, epoch 1, step 4: KeyError: 'x'\n")


def test_an_exception_says_itself_whether_it_is_final():
    class StopError(ValueError):
        final = True

    for error, final in ((StopError("no"), True), (ValueError("no"), False)):
        made = failure_from(error, rank=1, device="cpu", where="start", echo=False)
        assert (made.final, made.error) == (final, f"{type(error).__name__}: no")


def test_secrets_in_an_exception_are_masked():
    try:
        raise OSError("cannot open s3://me:hunter2@bucket")
    except OSError as error:
        made = failure_from(error, rank=1, device="cpu", where="start", echo=False)
    assert made.error == "OSError: cannot open s3://***@bucket"
    assert "OSError: cannot open s3://***@bucket" in made.traceback
    assert "hunter2" not in describe([made])
