"""Drivers that claim records, in processes of their own and without Spark.

Run as a program (``python record_claims.py FOLDER SECONDS HOST``) it claims the record of a folder, prints one line of
JSON, and then writes into it for each line of its input; the line ``slow`` stops it (SIGSTOP) between the look at its
lease and the write that follows. It ends with the end of its input, and prints the error that it ended with.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from pipeline import storage
from pipeline.driver.lease import BusyError, DriverProcess, this_process
from pipeline.driver.record import Record


def process_on(host: str) -> DriverProcess:
    """This process, as if it ran on a host of another name; with no name, as it is."""
    return this_process().model_copy(update={"host": host, "machine": host} if host else {})


def claim_at(moment: float, folder: str, host: str, seconds: float, work_seconds: float) -> str:
    """Claim a record at a moment (of time.time()), work, and write a result; or what it is told instead."""
    record = Record(folder)
    while time.time() < moment:
        pass
    try:
        with record.claim("a", process=process_on(host), seconds=seconds):
            time.sleep(work_seconds)
            record.update(result=f"of {os.getpid()}")
    except BusyError as error:
        return str(error)
    return f"done by {os.getpid()}"


def main(folder: str, seconds: float, host: str) -> None:
    try:
        record = Record(folder)
        with record.claim("a", process=process_on(host), seconds=seconds) as lease:
            print(json.dumps({"number": lease.number}), flush=True)
            for line in sys.stdin:
                if line.strip() == "slow":
                    _stop_before_the_next_write()
                record.update(run_id=line.strip())
                print(json.dumps({"wrote": line.strip()}), flush=True)
    except RuntimeError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}), flush=True)


def _stop_before_the_next_write() -> None:
    """Storage that takes its time: the process stops when it is asked to write a record."""
    publish = storage.publish

    def slow(path: str, data: bytes, **options: bool) -> None:
        if "/record" in path:
            os.kill(os.getpid(), signal.SIGSTOP)
        publish(path, data, **options)

    storage.publish = slow


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
