"""CONTRIBUTING's ways to add a norm and a setting, followed literally in a copy of the repository."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from doc_blocks import REPOSITORY, blocks_of

COPIED = ("models", "pipeline", "conf", "tests", "setup.cfg", "pyproject.toml")


@pytest.fixture
def copy(tmp_path):
    """A copy of what the steps touch and what their tests need."""
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def blocks_under(heading):
    return [block for block in blocks_of(REPOSITORY / "CONTRIBUTING.md") if block.heading == heading]


def follow(heading, folder):
    """Do what each block under a heading says: write a file, apply a patch, call a command."""
    for block in blocks_under(heading):
        if block.language == "python":
            first, _, text = block.text.partition("\n")
            (folder / first.removeprefix("# ")).write_text(text)
        elif block.language == "diff":
            patch = ["git", "apply", "--unidiff-zero", "--recount", "--whitespace=nowarn", "-"]
            call(patch, folder, block.text, f"{block.place} does not fit the code any more")
        for line in block.commands() if block.language == "sh" else ():
            words = [sys.executable if word == ".venv/bin/python" else word for word in shlex.split(line)]
            call([*words, "-q", "-p", "no:cacheprovider"], folder, "", f"{block.place} fails")


def call(words, folder, given, problem):
    done = subprocess.run(
        words, cwd=folder, input=given, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{problem}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(folder, text):
    return call([sys.executable, "-c", text], folder, "", "the copy cannot be used")


def test_add_a_norm(copy):
    follow("Add a norm", copy)
    build = "from models import build_model\nfrom pipeline.config import load_settings\n"
    use = "settings = load_settings('conf/quickstart.yaml', ['model.norm=rms'])\n"
    show = "print(build_model(settings.model, image_shape=(1, 28, 28), num_classes=10))"
    assert "RMSNorm" in python(copy, build + use + show)


def test_add_a_setting(copy):
    follow("Add a setting", copy)
    page = python(copy, "from pipeline.config.reference import reference_page\nprint(reference_page())")
    assert "`model.dropout`" in page


def test_every_way_has_at_most_six_steps_that_name_their_files():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    ways = re.split(r"^## Add ", text, flags=re.MULTILINE)[1:]
    assert len(ways) == 6
    for way in ways:
        name, _, body = way.partition("\n")
        body = re.sub(r"^ *```.*?^ *```$", "", body, flags=re.MULTILINE | re.DOTALL)
        assert 1 <= len(re.findall(r"^\d\. ", body, re.MULTILINE)) <= 6, name
        paths = {path.strip("`") for path in re.findall(r"`(?:pipeline|models|tests|docs)/[\w/.]+`", body)}
        new = {"models/networks/NAME.py"}
        missing = [path for path in paths - new if not (REPOSITORY / path).exists()]
        assert not missing, f"{name}: there is no {missing}"


def test_the_hooks_are_what_make_check_runs():
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    makefile = (REPOSITORY / "Makefile").read_text()
    recipes = re.findall(r"^(?:check|docs):.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    checks = [line.strip().replace("$(BIN)", ".venv/bin") for recipe in recipes for line in recipe.splitlines()]
    assert sorted(hook["entry"] for hook in hooks) == sorted(checks)
    assert all(hook["language"] == "system" for hook in hooks)
