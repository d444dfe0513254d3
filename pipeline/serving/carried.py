"""The part of this package that a registered model carries, so that it is loaded where sparknorm is not installed.

MLflow puts a model's code before everything else on the path of imports. Carried as ``pipeline`` it would stand in the
place of an installed sparknorm, or of whatever else has that name; so it is renamed, to a name that its content makes
unique: several models, of several versions, can be loaded by one process (docs/decisions/0028).
"""

from __future__ import annotations

import hashlib
import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from pipeline import __version__

# What `pyfunc` imports of this package, itself included; a test imports the copy where there is nothing else.
_FILES = (
    "config/frozen.py", "config/secrets.py", "data/codec.py", "data/jpeg.py", "data/reasons.py",
    "ingest/geometry.py", "ingest/images.py", "serving/predictor.py", "serving/pyfunc.py", "serving/result.py",
    "serving/served.py",
)  # fmt: skip
_OUR_IMPORT = re.compile(r"^(\s*(?:from|import)\s+)pipeline(?=[.\s])", re.MULTILINE)


class CarriedCode(NamedTuple):
    """A folder that holds the renamed package, and the module that MLflow is to load.

    folder : its name is that of the package
    loader : dotted name of a module that has ``_load_pyfunc``
    """

    folder: Path
    loader: str


def write_carried(parent: Path) -> CarriedCode:
    """Write the package into a folder of a local disk."""
    root = resources.files("pipeline")
    sources = {name: root.joinpath(*name.split("/")).read_text("utf-8") for name in _FILES}
    digest = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sources.items()).encode()).hexdigest()
    name = f"sparknorm_{digest[:12]}"
    folder = parent / name
    for file, text in sources.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_OUR_IMPORT.sub(rf"\g<1>{name}", text), "utf-8")
        (path.parent / "__init__.py").touch()
    about = f'"""A part of sparknorm {__version__} that the model beside it needs, renamed."""\n'
    (folder / "__init__.py").write_text(about, "utf-8")
    return CarriedCode(folder, f"{name}.serving.pyfunc")
