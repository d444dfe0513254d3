"""Find Java, or say in one line how to get it; start it without its warning about a module that Spark asks for.

Standard library only: `make setup` runs this file before anything is installed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator

MINIMUM = 17
ADVICE = (
    "install it (Debian, Ubuntu: `apt-get install openjdk-17-jre-headless`; Fedora: `dnf install java-17-openjdk`; "
    "macOS: `brew install openjdk@17`) or point JAVA_HOME at it"
)

# Spark 4's launcher adds this module to every JVM it starts, and Java has no option that leaves the warning out.
_INCUBATOR_WARNING = b"WARNING: Using incubator modules: jdk.incubator.vector"


class JavaError(RuntimeError):
    """Java is missing or too old."""


def require_java() -> str:
    """The path of a Java that Spark can use.

    Raises
    ------
    JavaError
        There is none, or it is older than 17.
    """
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None)
    if java is None:
        where = f"JAVA_HOME={home} has no bin/java" if home else "there is no `java` on the PATH"
        raise JavaError(f"Spark needs Java {MINIMUM} or newer, but {where}: {ADVICE}")
    report = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r'version "(?:1\.)?(\d+)', report.stderr + report.stdout)
    if found is None or int(found[1]) < MINIMUM:
        version = f"version {found[1]}" if found else "of an unknown version"
        raise JavaError(f"Spark needs Java {MINIMUM} or newer, but {java} is {version}: {ADVICE}")
    return java


@contextlib.contextmanager
def without_incubator_warning() -> Iterator[int]:
    """Give a file descriptor to be a child's standard error: all that the child writes there appears on this process's
    standard error but that one warning. The child must be started within the block.
    """
    reading, writing = os.pipe()
    threading.Thread(target=_forward, args=(reading,), name="sparknorm-java-stderr", daemon=True).start()
    try:
        yield writing
    finally:
        os.close(writing)


def _forward(reading: int) -> None:
    """Write a pipe's lines to standard error until its last writer has closed it."""
    with open(reading, "rb") as lines:
        for line in lines:
            if line.rstrip() != _INCUBATOR_WARNING:
                with contextlib.suppress(OSError):  # a closed terminal: go on reading, or the JVM would block
                    os.write(2, line)


if __name__ == "__main__":
    try:
        require_java()
    except JavaError as problem:
        sys.exit(str(problem))
