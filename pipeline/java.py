"""Find Java, or say in one line how to get it. Standard library only: `make setup` runs it before anything else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

MINIMUM = 17
ADVICE = (
    "install it (Debian, Ubuntu: `apt-get install openjdk-17-jre-headless`; Fedora: `dnf install java-17-openjdk`; "
    "macOS: `brew install openjdk@17`) or point JAVA_HOME at it"
)


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


if __name__ == "__main__":
    try:
        require_java()
    except JavaError as problem:
        sys.exit(str(problem))
