"""What a machine must have to import which half. Who may import whom is import-linter's business (setup.cfg)."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# What a bare GPU machine has none of, and what executors have none of.
NOT_FOR_TRAINING = (
    "pyspark",
    "mlflow",
    "petastorm",
    "pandas",
    "matplotlib",
    "jinja2",
    "scipy",
    "typer",
    "rich",
    "tenacity",
    "psutil",
)
# Triton comes with torch's builds for CUDA; `models.norms.segments` does without it.
NEEDS_TRITON = "models.norms.segment_kernels"
NOT_ON_EXECUTORS = ("mlflow", "matplotlib", "jinja2", "scipy", "typer", "rich", "tenacity", "psutil")


def modules(*folders: str) -> list[str]:
    """The dotted names of all modules below these folders of the repository."""
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names if name != NEEDS_TRITON]


def run_without(blocked: tuple[str, ...], script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process in which any import of these packages raises."""
    block = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", block + script, *arguments],
        capture_output=True, text=True, timeout=120, cwd=REPOSITORY, check=False,
    )  # fmt: skip


def test_the_training_half_needs_neither_spark_nor_mlflow_nor_a_screen():
    half = ("models", *(f"pipeline/{name}" for name in ("config", "telemetry", "distributed", "data", "training")))
    names = [name for name in modules(*half) if name != "pipeline.data.petastorm_compat"]
    done = run_without(NOT_FOR_TRAINING, "\n".join(f"import {name}" for name in names))
    assert done.returncode == 0, done.stderr


def test_executors_import_what_they_run_without_what_only_a_driver_has():
    names = ["pipeline.daemon", "pipeline.cluster.task", "pipeline.ingest.tasks", *modules("pipeline/ingest/sources")]
    # The doctor's function for ranks, and what scores.
    names += ["pipeline.training.probe", "pipeline.serving.predictor", "pipeline.serving.scoring.task"]
    done = run_without(NOT_ON_EXECUTORS, "\n".join(f"import {name}" for name in names))
    assert done.returncode == 0, done.stderr


def test_the_driver_starts_without_torch():
    driver = (f"pipeline/{name}" for name in ("cluster", "ingest", "tracking", "driver", "study", "report"))
    names = ["pipeline.__main__", *modules(*driver)]
    done = run_without(("torch", "models"), "\n".join(f"import {name}" for name in names))
    assert done.returncode == 0, done.stderr


BARE_TRAINING = """
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.training.loop import Job, fit
from pipeline.distributed.worker import alone
dataset, folder = sys.argv[1:]
train = TrainSettings(epochs=1, batch_size=32, lanes=4)
print(fit(alone("cpu"), Job(dataset, folder, ModelSettings(width=4), train)).steps)
"""


def test_training_runs_where_spark_and_mlflow_cannot_be_imported(dataset, tmp_path):
    done = run_without(NOT_FOR_TRAINING, BARE_TRAINING, dataset, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
