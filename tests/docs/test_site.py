"""How the documentation looks in a browser: at a window of 1400 pixels nothing is cut, and descriptions have room."""

import shutil

import pytest
from browser import chromium
from doc_blocks import REPOSITORY
from sphinx.cmd.build import build_main

from pipeline.config.reference import reference_page

pytestmark = [pytest.mark.ui, pytest.mark.long]

CONF = """
extensions = ["myst_parser"]
html_theme, html_static_path, html_css_files = "furo", ["_static"], ["site.css"]
"""
# Right edge of the list, and of each table how wide it is, what of that is in sight, and the width of descriptions.
SIZES = """
const tables = [...document.querySelectorAll('.table-wrapper')]
return [document.querySelector('.toc-drawer').getBoundingClientRect().right,
  tables.map(one => [one.scrollWidth, one.clientWidth, one.querySelector('th:nth-child(5)').offsetWidth])]
"""


def test_the_settings_fit_the_window(tmp_path):
    (tmp_path / "conf.py").write_text(CONF)
    (tmp_path / "index.md").write_text(reference_page())
    shutil.copytree(REPOSITORY / "docs" / "_static", tmp_path / "_static")
    assert build_main(["-q", str(tmp_path), str(tmp_path / "site")]) == 0
    with chromium() as page:
        page.open((tmp_path / "site" / "index.html").as_uri(), width=1400)
        right, tables = page.driver.execute_script(SIZES)
    assert right <= 1400
    assert len(tables) > 10
    for whole, shown, description in tables:
        assert whole == shown
        assert description >= 200
