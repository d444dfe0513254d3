"""What is an outage, and what is about the file."""

import errno
import io
import pickle
import random

import aiohttp
import botocore.exceptions
import fsspec
import pytest
from s3fs.errors import translate_boto_error

from pipeline import storage
from pipeline.storage.outage import retry
from pipeline.storage.remote_file import open_remote


def s3_error(code: str) -> BaseException:
    """What s3fs raises where S3 answers with this code."""
    answer = {"Error": {"Code": code, "Message": "The message."}}
    return translate_boto_error(botocore.exceptions.ClientError(answer, "GetObject"))


@pytest.mark.parametrize(
    "error",
    [
        *map(s3_error, ("SlowDown", "ServiceUnavailable", "InternalError", "503", "500", "400", "RequestTimeout",
                        "ExpiredToken", "TokenRefreshRequired", "SignatureDoesNotMatch", "SomethingNew")),
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
        botocore.exceptions.NoCredentialsError(),
        aiohttp.ClientPayloadError("cut"),
        TimeoutError(),
        OSError(errno.EIO, "a network disk that is away"),
        OSError(errno.ESTALE, "the same"),
        ConnectionResetError(),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:60],
)  # fmt: skip
def test_an_outage(error):
    assert storage.is_outage(error)


@pytest.mark.parametrize(
    "error",
    [
        *map(s3_error, ("NoSuchKey", "NoSuchBucket", "404", "AccessDenied", "403")),
        FileNotFoundError(errno.ENOENT, "no such file"),
        PermissionError(errno.EACCES, "forbidden"),
        IsADirectoryError(errno.EISDIR, "a folder"),
        OSError(errno.ELOOP, "links in a circle"),
        OSError(errno.ENAMETOOLONG, "too long"),
        OSError(errno.ENOSPC, "no space left"),
        ValueError("a mistake"),
        ImportError("Install s3fs to access S3"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:60],
)
def test_no_outage(error):
    assert not storage.is_outage(error)


class FailsAtFirst:
    """Raises the errors one after the other, then answers."""

    def __init__(self, *errors: BaseException):
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls


def test_the_drivers_own_errors_are_tried_again_and_draw_no_random_number(caplog):
    random.seed(1)
    before = random.getstate()
    call = FailsAtFirst(aiohttp.ClientPayloadError("cut"), s3_error("ExpiredToken"))
    assert retry(call, "read", "s3://bucket/x") == 3
    assert random.getstate() == before
    assert len(caplog.records) == 1


def test_whoever_tries_again_by_himself_gets_one_error_of_one_kind():
    call = FailsAtFirst(*[botocore.exceptions.NoCredentialsError()] * 2)
    with storage.retry_for(0), pytest.raises(storage.UnreachableError, match=r"bucket/x cannot be read .*credentials"):
        retry(call, "read", "s3://bucket/x")
    assert call.calls == 1
    assert retry(call, "read", "s3://bucket/x") == 3  # outside of it, as ever


def test_the_error_reaches_the_driver_of_spark_whole():
    error = storage.UnreachableError("s3://bucket/x cannot be read")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


class Breaks(io.BytesIO):
    """A remote file whose every second reading fails, after which it is at another place."""

    failing = True

    def read(self, *count):
        Breaks.failing = not Breaks.failing
        if not Breaks.failing:
            return super().read(*count)
        super().read(3)
        raise aiohttp.ClientPayloadError("cut")


def test_a_file_goes_on_from_the_byte_where_it_broke(monkeypatch):
    data = bytes(range(256)) * 400
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(fs, "open", lambda *_: Breaks(data))
    with open_remote(fs, "x", "memory://x") as file:
        assert file.read(10) == data[:10]
        assert file.seek(5) == 5
        assert file.read(70_000) == data[5:70_005]
        assert file.tell() == 70_005
        assert file.seek(-7, io.SEEK_END) == len(data) - 7
        assert file.read() == data[-7:]
        assert file.read() == b""
