"""What the documentation names is there: files, tests, settings and error messages."""

import ast
import re

import pytest
from doc_blocks import REPOSITORY, pages

from pipeline.config.reference import reference_page

PAGES = {str(path.relative_to(REPOSITORY)): path.read_text() for path in pages()}
NOW = {page: text for page, text in PAGES.items() if "Superseded" not in text}
SECTIONS = "dataset|reader|model|train|checkpoint|workers|compare|tune|export|score|registry|tracking|spark"


def messages():
    """Every text of the source, with an ellipsis for each value in it."""
    texts = []
    for path in [*REPOSITORY.glob("pipeline/**/*.py"), *REPOSITORY.glob("models/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_every_message_of_the_troubleshooting_page_is_in_the_code():
    rows = re.findall(r"^\| (`+)(.+?)\1 \| ", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    assert len(rows) > 20
    known = "\n".join(messages())
    for _, message in rows:
        for part in filter(lambda part: len(part) > 3, (part.strip() for part in message.split("…"))):
            assert part in known, f"no message says {part!r}"


@pytest.mark.parametrize("page", NOW)
def test_files_and_tests_that_a_page_names(page):
    new = {"models/networks/NAME.py", "models/norms/rms.py", "tests/models/test_cnn_dropout.py"}
    for path in re.findall(r"`((?:pipeline|models|tests|conf|docs|notebooks)/[\w./-]+)`", NOW[page]):
        assert path in new or (REPOSITORY / path).exists() or path.startswith("docs/_build"), path
    tests = {path.stem for path in REPOSITORY.glob("tests/**/test_*.py")}
    for name in re.findall(r"`(test_\w+)`", NOW[page]):
        assert name in tests or f"def {name}(" in "".join(p.read_text() for p in REPOSITORY.glob("tests/**/*.py")), name


@pytest.mark.parametrize("page", NOW)
def test_settings_that_a_page_names(page):
    not_now = ("model.dropout", "compare.norms", "compare.learning_rates")  # an example, and what was before 0.5.0
    known = reference_page()
    for name in re.findall(rf"`(?:-o )?((?:{SECTIONS})\.[a-z_.]+)(?:=[^`]*)?`", NOW[page]):
        file = re.match(r"(model\.(pt2|ts|onnx)|(train|export|comparison|tune|score)\.json|(tune|score)\.html)", name)
        if not file and not name.startswith("spark."):  # Spark's own properties
            assert f"`{name}" in known or name in not_now, name
