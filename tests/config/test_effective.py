from pathlib import Path

import pytest

from pipeline.config import Settings, load_settings
from pipeline.config.dotted import leaves
from pipeline.config.effective import effective_yaml
from pipeline.config.yaml_text import read

CONF = Path(__file__).parents[2] / "conf"
STUDIES = sorted([*CONF.glob("*.yaml"), *CONF.glob("study/*.yaml")])
UNUSUAL = [
    "model.norm_scale=[learned, off]", "reader.verify=off", "spark.conf.spark.executor.memory=4g", "export.fold=true",
    "spark.conf.spark.speculation=true", "spark.conf.spark.sql.version=3.10", "train.weight_decay=1e-3",
    "output='runs/1e-3 # 1: off'", "tracking.experiment=null and void",
    "dataset.source.classes=[off, '1', 'null', é, \"two\\nlines\", \"a\\u2028b\"]",
    "compare.target_accuracy=0.9", "dataset.image.shape=[1, 28, 28]", "train.batch_size=null", "workers.count=[2, 4]",
    "spark.py_files=[dist/sparknorm.zip]", "tracking.artifacts=\"two\\nlines\"",
    "model.network=a.b:c", "model.options={stem: {kernel: 3, 'a.b': null}, widths: [8, 16], act: off, rate: 1e-3}",
]  # fmt: skip


@pytest.mark.parametrize("overrides", [[], UNUSUAL], ids=["as shipped", "unusual values"])
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_it_is_read_back_to_the_same_settings(path, overrides, tmp_path):
    if path.name == "batch_size.yaml":
        overrides = [o for o in overrides if not o.startswith("workers.count")]  # it has two lanes
    settings = load_settings(path, overrides)
    (tmp_path / "whole.yaml").write_text(effective_yaml(settings))
    assert load_settings(tmp_path / "whole.yaml").model_dump(mode="json") == settings.model_dump(mode="json")


def test_it_has_every_setting_with_its_description():
    whole = effective_yaml(Settings(name="x"))
    written = {name for name, _ in leaves(read(whole))}
    assert written == {name for name, _ in leaves(Settings(name="x").model_dump())}
    lines = whole.splitlines()
    for index, line in enumerate(lines):
        assert len(line) <= 120
        if line.strip() and not line.lstrip().startswith("#"):
            assert lines[index - 1].lstrip().startswith("#"), f"{line} has no description"


def test_what_differs_from_the_default_has_the_default_beside_it():
    settings = load_settings(CONF / "quickstart.yaml", ["model.depth=9", "spark.conf.spark.x=1"])
    lines = [line.strip() for line in effective_yaml(settings).splitlines()]
    assert "depth: 9  # default: 3" in lines
    assert "width: 16" in lines
    assert "epochs: 3  # default: 4" in lines
    assert lines[lines.index("grid:  # default: {}") + 1] == "model.norm: [none, batch]"
    assert lines[lines.index("conf:  # default: {}") + 1] == "spark.x: '1'"
    of_defaults = effective_yaml(Settings(name="x")).splitlines()[1:]
    assert [line.strip() for line in of_defaults if "default:" in line] == [
        "rank_batch_size: 128  # default: null", "batch_size: 256  # default: null",  # each follows from the other
    ]  # fmt: skip
