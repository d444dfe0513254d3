"""What `compare` says at its end about where its runs are seen."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import __main__ as commands
from pipeline import study

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("uri", "found", "line"),
    [
        ("sqlite:///a.db", True, "`mlflow ui --backend-store-uri sqlite:///a.db` shows them in MLflow\n"),
        ("runs/my runs", True, "`mlflow ui --backend-store-uri 'runs/my runs'` shows them in MLflow\n"),
        ("sqlite:///a.db", False, f"`{sys.executable} -m mlflow ui --backend-store-uri sqlite:///a.db` shows them"),
        ("postgresql://me:planted@db/runs", True, "`mlflow ui --backend-store-uri 'postgresql://***@db/runs'` shows"),
        ("https://me:planted@tracking.example", True, "in MLflow at https://***@tracking.example\n"),
    ],
)
def test_a_comparison_says_where_its_runs_are_seen(tmp_path, monkeypatch, capsys, uri, found, line):
    monkeypatch.setattr(commands, "_session", lambda *_: None)
    monkeypatch.setattr(commands, "_table", lambda _: "")
    monkeypatch.setattr(study, "compare", lambda *_: SimpleNamespace(verdict=[], warnings=[]))
    monkeypatch.setattr("pipeline.tracking.client.shutil.which", lambda _: "/bin/mlflow" if found else None)
    overrides = "-o", f"output={tmp_path}", "-o", f"tracking.uri={uri}"
    commands.app(["compare", "-c", str(QUICKSTART), *overrides], standalone_mode=False)
    assert f"runs: {line}" in capsys.readouterr().err
