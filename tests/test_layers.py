"""Who may import what: the training half runs on a bare GPU machine, and the driver starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BARE = ["plan", "manifest", "storage", "config", "images", "reader", "worker", "augment", "train", "evaluate"]
BARE += ["checkpoint", "events", "shards", "shard_cache", "feed", "data_settings", "deform", "petastorm_reader"]
BARE += [
    "petastorm_compat",
    "prefetch",
    "heartbeat",
    "checkpoint_writer",
    "rank_state",
    "exchange",
    "optimizer",
    "step_times",
    "job",
    "probe",
]
BARE += ["training_settings", "gpu", "norm_statistics", "weight_average", "compiled"]
BARE += ["export"]
BARE += ["diagnostics", "layer_statistics"]
SPARK_SIDE = ["__main__", "session", "sources", "ingest", "barrier", "trial", "compare", "fashion_mnist", "progress"]
SPARK_SIDE += [
    "java",
    "relay",
    "outage",
    "report",
    "resources",
    "tracking",
    "record_files",
    "folder_source",
    "table_source",
    "shard_writer",
    "versions",
    "gang",
    "watch",
    "record",
    "elastic",
    "preflight",
    "diagnostic_plots",
    "grid",
    "evidence",
    "figures",
    "figure_style",
    "figure_rates",
    "verdict",
    "side_by_side",
    "run_facts",
]


def imports(path: Path, *, anywhere: bool) -> set[str]:
    """Top-level packages that a file imports: at module level, or anywhere in it; not those for type checkers."""
    found = set()
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if anywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += list(ast.iter_child_nodes(node))
    return found


def test_every_file_is_on_one_side():
    files = {path.stem for path in (REPOSITORY / "pipeline").glob("*.py")} - {"__init__"}
    assert files == {*BARE, *SPARK_SIDE, "daemon"}  # which Spark starts on executors, for torch's sake


@pytest.mark.parametrize("name", BARE)
def test_the_training_half_knows_neither_spark_nor_mlflow(name):
    assert not imports(REPOSITORY / "pipeline" / f"{name}.py", anywhere=True) & {"pyspark", "mlflow", "petastorm"}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "models").glob("*.py")), ids=lambda path: path.name)
def test_models_know_neither_spark_nor_mlflow(path):
    assert not imports(path, anywhere=True) & {"pyspark", "mlflow", "petastorm"}


@pytest.mark.parametrize("name", SPARK_SIDE)
def test_spark_files_import_torch_only_inside_functions(name):
    assert not imports(REPOSITORY / "pipeline" / f"{name}.py", anywhere=False) & {"torch", "models"}


def test_the_driver_side_is_imported_without_torch():
    script = "import sys; sys.modules['torch'] = None; sys.modules['models'] = None\n"
    script += "".join(f"import pipeline.{name}\n" for name in SPARK_SIDE)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=REPOSITORY,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_only_tracking_imports_mlflow():
    users = [p.stem for p in (REPOSITORY / "pipeline").glob("*.py") if "mlflow" in imports(p, anywhere=True)]
    assert users == ["tracking"]


def test_only_gang_joins_spark_and_torch():
    users = {
        p.stem for p in (REPOSITORY / "pipeline").glob("*.py") if {"torch", "pyspark"} <= imports(p, anywhere=True)
    }
    assert users <= {"gang", "daemon", "run_facts"}  # run_facts asks both for their versions


BARE_MACHINE = """
import sys
for name in ("pyspark", "mlflow", "petastorm", "pandas", "matplotlib", "jinja2", "typer", "rich"):
    sys.modules[name] = None  # any import of it raises
from pipeline.training_settings import ModelSettings, TrainSettings
from pipeline.train import Job, fit
from pipeline.worker import alone
dataset, folder = sys.argv[1:]
train = TrainSettings(epochs=1, batch_size=32, lanes=4)
print(fit(alone("cpu"), Job(dataset, folder, ModelSettings(width=4), train))["steps"])
"""


def test_training_runs_where_spark_and_mlflow_cannot_be_imported(dataset, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BARE_MACHINE, dataset, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
