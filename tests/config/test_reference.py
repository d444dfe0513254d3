from pipeline.config import Settings
from pipeline.config.dotted import leaves
from pipeline.config.reference import reference_page


def rows():
    cells = [line.strip("| ").split(" | ") for line in reference_page().splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_every_setting_has_one_row_with_a_description():
    tree = {name for name, _ in leaves(Settings(name="x").model_dump())} | {
        "compare.grid",
        "tune.space",
        "spark.conf",
        "model.options",
    }
    assert rows().keys() == tree
    for name, row in rows().items():
        assert len(row) == 4 and len(row[3]) > 10, f"{name} has no description"


def test_rows_say_type_default_and_range():
    page = rows()
    assert page["name"][:3] == ["text", "required", "not empty"]
    assert page["train.momentum"][:3] == ["number", "`0.9`", "at least 0, below 1"]
    assert page["train.batch_size"][:3] == ["integer or null or `auto`", "`null`", "at least 1"]
    assert page["model.norm_scale"][:2] == ["one of `learned`, `fixed`, `off`", "`learned`"]
    assert page["dataset.image.shape"][:2] == ["list of 3 integers or null", "`null`"]
    assert page["compare.seeds"][:2] == ["one of `auto` or list of integers", "`[0, 1, 2]`"]
    assert page["spark.conf"][:2] == ["mapping of text to text", "`{}`"]
    assert page["model.options"][:2] == ["mapping of text to any value", "`{}`"]
    assert page["export.fold"][0] == "one of `auto`, `true`, `false`"


def test_sections_are_introduced_by_a_sentence():
    lines = reference_page().splitlines()
    for index, line in enumerate(lines):
        if line.startswith("#"):
            assert lines[index + 2][0].isupper(), line
