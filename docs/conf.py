"""How `make docs` builds the site: MyST pages, and pages that follow from the code. No network is used."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from generate import write_pages  # noqa: E402
from pydantic import BaseModel  # noqa: E402

from pipeline import __version__  # noqa: E402

PARAMETER = re.compile(r"[a-z_]\w*(, \w+)* : \S")

project = "sparknorm"
author = "the maintainers of sparknorm"
project_copyright = "Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = False
napoleon_numpy_docstring = True
default_role = "code"  # `name` in a docstring is code

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"sparknorm {version}"
html_show_sphinx = False
html_copy_source = False
html_show_copyright = False


def signature(app, what, name, thing, options, arguments, returns):
    """Show no arguments of pydantic classes: generate.py lists their fields, and the defaults would fill a page."""
    return ("", None) if what == "class" and issubclass(thing, BaseModel) else None


def parameters(app, what, name, thing, options, lines):
    """Give lines ``name : what it is`` that stand without a heading one that napoleon knows."""
    for at in reversed(range(1, len(lines))):
        if PARAMETER.match(lines[at]) and not lines[at - 1].strip():
            lines[at:at] = ["Parameters", "----------"]


def setup(app):
    """Write the generated pages before Sphinx reads any."""
    app.connect("builder-inited", lambda _: write_pages(HERE / "reference" / "generated"))
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", parameters, priority=400)  # before napoleon
