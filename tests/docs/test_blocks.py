"""Every command and Python block of README and docs runs, or a comment before it says why not.

``<!-- not run: WHY -->`` leaves a block alone; of ``<!-- settings only: WHY -->`` the settings are loaded. All others
run, page by page, in a folder with a copy of ``conf/`` in which each study has a small dataset and a short training
(`SHORT`) in the place of its own; what a block overrides counts. ``/data/photos`` is a folder of 96 small pictures.
Commands run in this process, on the session of the tests. Of ``make`` lines only make's knowing the target is shown,
since CI runs them itself.
"""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from doc_blocks import REPOSITORY, blocks_of, pages
from image_files import write_folder
from small_data import CLASSES
from typer.testing import CliRunner

from pipeline.config import load_settings

SHOWN = {"text", "json", "diff"}  # what a person sees, not what one types
SHORT = {
    "model": {"width": 8},
    "train": {"epochs": 1, "batch_size": 16, "lanes": 4, "learning_rate": 0.1, "warmup_epochs": 0},
    "compare": {"seeds": [0], "grid": {"train.learning_rate": [0.1]}},
    "export": {"formats": ["pt2"]},
    "tracking": {"system_metrics": False},
}
PAGES = {str(path.relative_to(REPOSITORY)): path for path in pages()}


def runs(block):
    return block.language in ("sh", "python") and block.mark != "not run"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_says_why_not(page):
    for block in blocks_of(PAGES[page]):
        known = block.language in {"sh", "python", "yaml", *SHOWN} or block.language.startswith("{")
        assert known, f"{block.place}: a block of {block.language or 'no language'}"
        assert not block.mark or len(block.reason) > 20, f"{block.place}: say why it is not run"


def merged(tree, changes):
    """The tree with what the changes have in its place."""
    for key, value in changes.items():
        tree[key] = merged(tree.get(key) or {}, value) if isinstance(value, dict) and key != "grid" else value
    return tree


@pytest.fixture(scope="module")
def workspace(spark, idx_folder, tmp_path_factory):
    """The folder in which blocks run, after the first command of `make run`."""
    folder = tmp_path_factory.mktemp("documentation")
    shutil.copytree(REPOSITORY / "conf", folder / "conf")
    photos = write_folder(folder / "photos", 96)
    for path in folder.glob("conf/**/*.yaml"):
        tree = yaml.safe_load(path.read_text())
        if "name" not in tree:  # a base of studies
            continue
        kind = load_settings(path).dataset.source.kind
        source = {"kind": "idx", "path": str(idx_folder), "classes": list(CLASSES)}
        # Of 96 pictures, 38 judge: a comparison needs 30.
        pictures = {"source": {"path": str(photos)}, "test_share": 0.4}
        dataset = pictures if kind == "folder" else {"source": source, "row_group_rows": 30}
        grid = {**(tree.get("compare") or {}).get("grid", {}), **SHORT["compare"]["grid"]}
        tree = merged(tree, {**SHORT, "dataset": dataset, "compare": {**SHORT["compare"], "grid": grid}})
        path.write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command(["ingest", "-c", "conf/quickstart.yaml"])  # most pages go on from what `make run` leaves
    return folder


@pytest.mark.parametrize("page", [page for page, path in PAGES.items() if any(map(runs, blocks_of(path)))])
def test_commands_and_python_run(page, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    names = {}  # one page's blocks follow each other
    for block in filter(runs, blocks_of(PAGES[page])):
        if block.language == "python":
            exec(compile(block.text, block.place, "exec"), names)
        for line in block.commands() if block.language == "sh" else ():
            shell(line, settings_only=block.mark == "settings only")


def shell(line, *, settings_only):
    """Run one line of a shell block, as the head of this file says."""
    program, *words = shlex.split(line)
    if program == "make":
        done = subprocess.run(["make", "-n", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif program == ".venv/bin/sparknorm" and settings_only:
        config, overrides = words[words.index("-c") + 1], [o for at, o in enumerate(words) if words[at - 1] == "-o"]
        load_settings(REPOSITORY / config, overrides)
    elif program == ".venv/bin/sparknorm":
        command([word.replace("/data/photos", str(Path.cwd() / "photos")) for word in words])
    else:
        pytest.fail(f"{line}: no test can run this; mark its block")


def command(words):
    """A command of sparknorm ends well, and the last thing it prints is the path of its JSON result."""
    from pipeline.__main__ import app

    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    json.loads(Path(result.stdout.splitlines()[-1]).read_text())


@pytest.mark.parametrize("page", PAGES)
def test_yaml_blocks_are_settings(page, tmp_path):
    for block in blocks_of(PAGES[page]):
        if block.language == "yaml":
            (tmp_path / "block.yaml").write_text("name: block\n" + block.text)
            load_settings(tmp_path / "block.yaml")
