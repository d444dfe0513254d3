"""Fashion-MNIST (Xiao et al. 2017): find its four files or fetch them, and check that they are the published ones.

Tried in order: the folder in the settings; the installed Debian package ``dataset-fashion-mnist``; what was fetched
before; that package fetched and unpacked without root; the public address.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

from pipeline import storage

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# SHA-256 of the uncompressed files: gzip headers differ between distributors, the images do not.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
PACKAGE = "dataset-fashion-mnist"
INSTALLED = "usr/share/datasets/fashion-mnist"
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
TIMEOUT_SECONDS = 120


class FashionMnistError(ValueError):
    """The files cannot be had, or are not the published ones."""


def locate(path: str | None, cache: str) -> str:
    """The folder of the four files.

    Raises
    ------
    FashionMnistError
        ``path`` is given and is no folder, or no way to get the files worked; each is named with its reason.
    """
    if path is not None:
        if not storage.exists(path):
            raise FashionMnistError(f"dataset.source.path {path}: no such folder")
        return storage.absolute(path)
    fetched = Path(cache) / "fashion-mnist"
    for folder in (Path("/") / INSTALLED, fetched):
        if _complete(folder):
            return str(folder.absolute())
    if "://" in cache:
        raise FashionMnistError(
            f"Fashion-MNIST can be fetched to a disk, not to {cache}: set dataset.source.path to a folder with its "
            "four files that the executors see too"
        )
    problems = []
    fetched.parent.mkdir(parents=True, exist_ok=True)
    for way in (_from_debian_package, _from_public_address):
        staging = Path(tempfile.mkdtemp(prefix=".fashion-mnist-", dir=fetched.parent))
        try:
            way(staging)
            verify({name: (str(path), sha256_of(path)) for name, path in _files(staging).items()})
            shutil.rmtree(fetched, ignore_errors=True)  # an incomplete one
            staging.rename(fetched)
            return str(fetched.absolute())
        except (OSError, EOFError, subprocess.SubprocessError, FashionMnistError) as error:
            problems.append(f"{way.__name__.strip('_').replace('_', ' ')}: {error}")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    raise FashionMnistError(
        "Fashion-MNIST is not here and could not be fetched ("
        + "; ".join(problems)
        + f"). Install the package {PACKAGE}, or set dataset.source.path to a folder with its four files"
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's uncompressed content, as hexadecimal digits."""
    with gzip.open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(files: dict[str, tuple[str, str]]) -> None:
    """Check name -> (path, SHA-256 of the content) against the published files.

    Raises
    ------
    FashionMnistError
        A file is another one; its path and both checksums are named.
    """
    for name, (path, sha256) in files.items():
        if sha256 != SHA256[name]:
            raise FashionMnistError(
                f"{path} is not the published {name}: SHA-256 {sha256}, expected {SHA256[name]}. "
                "Delete it to have it fetched again, or use `kind: idx` for other data"
            )


def _files(folder: Path) -> dict[str, Path]:
    """Those of the four files that are in the folder, compressed or not."""
    candidates = {name: (folder / name, folder / f"{name}.gz") for name in SHA256}
    return {name: path for name, paths in candidates.items() for path in paths if path.is_file()}


def _complete(folder: Path) -> bool:
    return len(_files(folder)) == len(SHA256)


def _from_debian_package(folder: Path) -> None:
    """`apt-get download` needs no root, nor does `dpkg -x`. Package lists of our own where the system has none."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise FashionMnistError("apt-get and dpkg are not here")
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    ours = ["-o", f"Dir::State::Lists={lists.absolute()}"]
    _say(f"fetching the Debian package {PACKAGE}")
    if _command(["apt-get", "download", PACKAGE], folder) != "":
        _command(["apt-get", *ours, "-o", f"Dir::Cache={lists.absolute()}", "update"], folder)
        problem = _command(["apt-get", *ours, "download", PACKAGE], folder)
        if problem:
            raise FashionMnistError(problem)
    packages = list(folder.glob(f"{PACKAGE}_*.deb"))
    if not packages or _command(["dpkg", "-x", packages[0].name, "unpacked"], folder):
        raise FashionMnistError(f"{PACKAGE} could not be unpacked")
    for name in SHA256:
        shutil.move(folder / "unpacked" / INSTALLED / f"{name}.gz", folder / f"{name}.gz")
    shutil.rmtree(folder / "unpacked")
    shutil.rmtree(lists)
    packages[0].unlink()


def _command(words: list[str], folder: Path) -> str:
    """Run a command; its last line of complaint, or the empty string where it succeeded."""
    done = subprocess.run(
        words,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _from_public_address(folder: Path) -> None:
    for name in SHA256:
        _say(f"fetching {ADDRESS}/{name}.gz")
        with (
            urllib.request.urlopen(f"{ADDRESS}/{name}.gz", timeout=TIMEOUT_SECONDS) as answer,
            (folder / f"{name}.gz").open("wb") as file,
        ):
            shutil.copyfileobj(answer, file)


def _say(text: str) -> None:
    from pipeline.console import console  # executors import this file, and have no rich

    console.print(text)
