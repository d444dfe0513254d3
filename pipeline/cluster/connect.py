"""A session on a Spark Connect server: no Java and no SparkContext here, and a server that may be away for a while."""

from __future__ import annotations

import atexit
import hashlib
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cluster.errors import spark_reason
from pipeline.config.cluster import SparkSettings
from pipeline.config.secrets import mask

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# How long a Connect server may take to answer at first, and later, about, to come back. pyspark itself would try for
# ten minutes, at every call.
CONNECT_SECONDS, OUTAGE_SECONDS = 10, 60

# What `with_files` has sent in each session: the name of a file, and the digest of its content.
_SENT: weakref.WeakKeyDictionary[SparkSession, dict[str, str]] = weakref.WeakKeyDictionary()


class ConnectError(RuntimeError):
    """No Spark Connect session can be had; the message names the address and where it is set."""


def is_connect(spark: SparkSession) -> bool:
    """Whether the session is one of Spark Connect, which has no SparkContext."""
    connect = sys.modules.get("pyspark.sql.connect.session")  # whoever has such a session has imported it
    return connect is not None and isinstance(spark, connect.SparkSession)


def connect_session(address: str, setting: str, settings: SparkSettings, app_name: str) -> SparkSession:
    """Open a session on the Connect server at an address; the server's own properties are as they are.

    Parameters
    ----------
    address
        ``sc://host:port``, perhaps with parameters such as a token, which no message shows.
    setting
        Where the address was set, for messages: "spark.master" or "SPARK_REMOTE".

    Raises
    ------
    ConnectError
        Packages are missing, the address cannot be read, or no server answers there within `CONNECT_SECONDS`.
    """
    from pyspark.errors import PySparkException

    where = f"{setting} is {mask(address.partition(';')[0])}"  # what follows may be a token
    try:
        _wait_for_server(address)
        return with_files(_open_session(address, settings, app_name), settings)
    except ImportError as error:
        raise ConnectError(
            f"{where}, but Spark Connect needs more packages ({error}): pip install 'sparknorm[connect]'"
        ) from error
    except TimeoutError:
        raise ConnectError(
            f"{where}, but no Spark Connect server answers there (waited {CONNECT_SECONDS} s): start one "
            "(start-connect-server.sh), or correct the address"
        ) from None
    except (PySparkException, ValueError) as error:
        raise ConnectError(f"{where}, but no session can be had there: {spark_reason(error)}") from error


def with_files(session: SparkSession, settings: SparkSettings) -> SparkSession:
    """The same session, its executors able to import what is in the settings' ``py_files``, and so this process.

    What a session has got already is not sent again.

    Raises
    ------
    FileNotFoundError
        A file is missing; it is named.
    ValueError
        A file was changed since this session got it, or two have one name.
    """
    sent, paths = _SENT.setdefault(session, {}), dict[str, Path]()
    for path in (Path(file).resolve() for file in settings.py_files):
        if paths.setdefault(path.name, path) != path:
            raise ValueError(
                f"spark.py_files: {paths[path.name]} and {path} have one name, and executors keep one file of a name: "
                "rename one, or zip both"
            )
    for file in settings.py_files:
        path = Path(file).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"spark.py_files: {file}: no such file (`make dist` makes dist/sparknorm.zip)")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if sent.get(path.name, digest) != digest:
            raise ValueError(
                f"spark.py_files: {file} was changed since this Spark session got it, and Spark replaces no file: "
                "begin a new session (in a notebook: restart Python)"
            )
        if path.name not in sent:
            session.addArtifacts(file, pyfile=True)
            sent[path.name] = digest
    import_from(settings)
    return session


def import_from(settings: SparkSettings) -> None:
    """Let this process import what is in the settings' ``py_files``, where nothing else has the same name."""
    for file in settings.py_files:
        path = Path(file).resolve()
        place = str(path.parent if path.suffix == ".py" else path)
        if place not in sys.path:
            sys.path.append(place)


def _wait_for_server(address: str) -> None:
    """Return once a gRPC server answers; raise TimeoutError if none does for `CONNECT_SECONDS`."""
    import grpc
    from pyspark.sql.connect.client import DefaultChannelBuilder

    channel = DefaultChannelBuilder(address).toChannel()
    try:
        grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
    except grpc.FutureTimeoutError:
        raise TimeoutError from None
    finally:
        channel.close()


def _open_session(address: str, settings: SparkSettings, app_name: str) -> SparkSession:
    from pyspark.sql import SparkSession
    from pyspark.sql.connect.client.retries import DefaultPolicy

    builder = SparkSession.builder.remote(address).appName(app_name)
    for key, value in settings.conf.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    wait_seconds = 2
    patience = DefaultPolicy(max_retries=OUTAGE_SECONDS // wait_seconds, max_backoff=1_000 * wait_seconds)
    session.client.set_retry_policies([patience])
    atexit.register(_close_session, session)
    return session


def _close_session(session: SparkSession) -> None:
    """Let the server end what still runs and forget the session, which it would keep for an hour."""
    session.client.set_retry_policies([])  # a server that is gone is not waited for
    session.stop()
