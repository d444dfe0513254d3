"""The types of ``comparison.json``."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from pipeline.report.comparison import Comparison, LayerGradient, TrialResult
from pipeline.training.result import TrainResult

RESULT = {
    "best_accuracy": 0.9, "final_accuracy": 0.8, "final_balanced_accuracy": 0.7, "final_macro_f1": 0.6,
    "final_loss": None, "final_calibration_error": 0.1, "recall": [0.9, None], "predictions": "predictions.parquet",
    "steps": 20, "images_per_second": 1000.5, "data_wait_share": None,
    "diverged": False, "curve": [{"step": 20, "epoch": 1.0, "accuracy": 0.8, "loss": None,
    "balanced_accuracy": 0.7, "macro_f1": 0.6, "calibration_error": 0.1}], "train_loss": [None],
    "train_seconds": [1.5], "checkpoint": "step-00000020.pt", "world_size": 2, "attempts": 1,
    "ranks": [{"rank": 0, "steps": 20, "data_wait_seconds": 0.5, "compute_seconds": 0.75, "all_reduce_seconds": 0.25}],
    "run_id": "5fd1",
}  # fmt: skip


@pytest.mark.parametrize(
    "more", [{}, {"gradient_norms": []}, {"gradient_norms": [{"layer": "0", "first": 1.0, "median": 0.5}]}], ids=str
)
def test_a_result_keeps_exactly_the_keys_that_were_set(more):
    tree = RESULT | more
    assert TrialResult.model_validate(tree).model_dump(mode="json", exclude_unset=True) == tree


def test_an_unknown_key_is_refused():
    with pytest.raises(ValidationError, match="extra"):
        LayerGradient.model_validate({"layer": "0", "first": 1.0, "median": 1.0, "last": 1.0})


def test_the_schema_of_the_file_says_what_everything_is():
    schema = Comparison.model_json_schema()
    models = {"Comparison": schema, **schema["$defs"]}
    assert {
        "ComparedRun",
        "ArmSummary",
        "Difference",
        "SearchTrial",
        "LayerGradient",
        "VerdictSentence",
    } <= models.keys()
    assert all(model["description"] for model in models.values())
    for name in models.keys() - {"EvaluationPoint", "RankSeconds"}:  # the description of the whole says it
        fields = models[name]["properties"]
        untold = {key for key, field in fields.items() if not {"description", "$ref"} & field.keys()}
        assert untold <= TrainResult.model_fields.keys(), name


def test_types_can_be_imported_where_nothing_draws():
    blocked = "matplotlib", "jinja2", "scipy", "pandas", "mlflow", "pyspark", "torch"
    code = f"""
import sys
sys.modules |= dict.fromkeys({blocked})
import pipeline.report.comparison, pipeline.report.names
from pipeline.report import Comparison
"""
    subprocess.run([sys.executable, "-c", code], check=True)
