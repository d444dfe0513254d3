"""Listings that come in parts, so that a folder of millions of files is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline import storage
from pipeline.storage.outage import retry

_S3 = {"s3", "s3a"}


def pages(folder: str, *, below: bool) -> Iterator[list[Any]]:
    """What fsspec tells of all that is in a folder of remote storage now (``name``, ``size``, ``type``), in parts.

    Parts are a thousand entries on S3. Of other storage fsspec knows no parts: there all comes at once.

    Parameters
    ----------
    below : whether all files below the folder are listed, instead of the files and folders in it

    Raises
    ------
    UnreachableError
        Storage fails; parts that came before are right.
    """
    fs, inner = storage.filesystem(folder)
    protocols = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
    if _S3.isdisjoint(protocols) or not hasattr(fs, "call_s3"):  # s3fs has it, other drivers of S3 have not
        yield storage.entries(folder, below=below)
        return
    bucket, key, _ = fs.split_path(inner)
    prefix = f"{key.rstrip('/')}/" if key else ""
    query = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "" if below else "/"}
    query |= getattr(fs, "req_kw", {})  # where who asks has to pay
    while True:
        page = retry(lambda: fs.call_s3("list_objects_v2", **query), "listed", folder)
        yield [
            *({"name": f"{bucket}/{found['Prefix'].rstrip('/')}", "size": 0, "type": "directory"}
              for found in page.get("CommonPrefixes", ())),
            *({**found, "name": f"{bucket}/{found['Key']}", "size": found["Size"], "type": "file"}
              for found in page.get("Contents", ()) if not found["Key"].endswith("/")),
        ]  # fmt: skip
        if not page.get("IsTruncated"):
            return
        query["ContinuationToken"] = page["NextContinuationToken"]
