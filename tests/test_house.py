"""The measure of the house: nothing in it is longer than a head or a screen can hold."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES, ROOT_FILES, UNTYPED = 330, 60, 6, 20


def code() -> Iterator[tuple[str, str]]:
    """The name below the repository and the text of each file of the packages."""
    for folder in ("pipeline", "models"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            yield str(path.relative_to(REPOSITORY)), path.read_text()


def test_no_file_is_long():
    lengths = {name: text.count("\n") for name, text in code()}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_no_function_is_longer_than_a_screen():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {
        f"{name}:{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for name, text in code()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, functions)
    }
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}


def test_the_hall_is_empty():
    assert len(list((REPOSITORY / "pipeline").glob("*.py"))) <= ROOT_FILES


def test_few_values_cross_a_border_without_a_type():
    places = [f"{name}: {hit}" for name, text in code() for hit in re.findall(r".*[dD]ict\[str, Any\].*", text)]
    assert len(places) <= UNTYPED, "\n".join(places)
