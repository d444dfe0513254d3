"""What a user has named is shown as it is, on a line and in a table."""

import pytest
from rich.table import Table

from pipeline.console import console, progress_bar

# Of rich's markup these are an emoji, a style, and the end of a style that never began, an error.
NAMES = ["model.network crab:Crab: no", "dataset cats [bold]", "arm a [/b]"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_not_markup(name, capsys):
    table = Table(name, title=f"title of {name}")
    table.add_row(f"row of {name}")
    console.print(table)
    console.print(f"line of {name}", soft_wrap=True)
    said = capsys.readouterr().err
    assert all(f"{place} of {name}" in said for place in ("title", "row", "line"))


@pytest.mark.parametrize("name", NAMES)
def test_names_are_not_markup_in_a_bar(name):
    bar = progress_bar()
    bar.add_task(name, total=1, detail=name)
    (task,) = bar.tasks
    shown = [column.render(task).plain for column in (bar.columns[1], bar.columns[-1])]
    assert shown == [name, name]
