"""Which seeds a study trains its arms with."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import SettingsError, load_settings
from pipeline.data.manifest import Image, Manifest, Split
from pipeline.report.comparison import StudyRun
from pipeline.study.arms import arms_of
from pipeline.study.seeds import run_seeds
from pipeline.study.summary import summarize
from pipeline.training import predictions
from pipeline.training.result import EvaluationPoint

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"
IMAGES = 2_000


def load(*overrides):
    return load_settings(QUICKSTART, ("train.learning_rate=0.1", "model.norm=[none, batch, group]", *overrides))


def manifest():
    counts = (IMAGES // 2, IMAGES // 2)
    split = Split(rows=IMAGES, label_counts=counts, pixel_sums=((0,), (0,)), mean=(0.0,), std=(1.0,), shards=())
    return Manifest(
        name="pets", settings_digest="", spark_application="", classes=("cat", "dog"), input_rows=IMAGES, set_aside={},
        sources=(), splits={"test": split}, image=Image(encoding="raw", shape=(1, 8, 8)),
    )  # fmt: skip


class Trainings:
    """Gives every trial the accuracy of its arm, a little higher or lower with each seed, and keeps what was asked."""

    def __init__(self, folder, deviations=0.002, **accuracies):
        self.folder, self.deviations, self.accuracies = folder, deviations, accuracies
        self.asked = []

    def __call__(self, trials):
        return [self.run(trial) for trial in trials]

    def run(self, trial):
        seed, arm = trial.settings.train.seed, trial.arm.name
        self.asked.append((arm, seed))
        random = np.random.default_rng([seed, *arm.encode()])
        labels = np.arange(IMAGES, dtype=np.int32) % 2
        right = random.permutation(IMAGES) < (self.accuracies[arm] + self.deviations * random.normal()) * IMAGES
        path = str(self.folder / f"{arm}-{seed}.parquet")
        predictions.write(
            path,
            predictions.Predictions(
                id=np.arange(IMAGES), label=labels, prediction=np.where(right, labels, 1 - labels).astype(np.int32),
                confidence=np.ones(IMAGES, np.float32), loss=np.zeros(IMAGES, np.float32),
            ),
        )  # fmt: skip
        scores = {"balanced_accuracy": right.mean(), "macro_f1": right.mean(), "loss": 0.5, "calibration_error": 0.0}
        final = {f"final_{name}": value for name, value in scores.items()}
        point = EvaluationPoint(step=100, epoch=1.0, accuracy=right.mean(), **scores)
        return StudyRun(
            arm=arm, values=trial.arm.values, tuned=trial.tuned, learning_rate=0.1, global_batch=256, seed=seed,
            best_accuracy=point.accuracy, final_accuracy=point.accuracy, steps=100, images_per_second=1.0,
            data_wait_share=0.0, diverged=False, world_size=1, attempts=1, curve=(point,), train_loss=(0.5,),
            train_seconds=(1.0,), checkpoint="", ranks=(), predictions=path, run_id=path,
            recall=tuple(right[labels == label].mean() for label in (0, 1)), **final,
        )  # fmt: skip


def study(settings, train):
    arms = arms_of(settings)
    runs = run_seeds(settings, manifest(), arms, {arm.name: {} for arm in arms}, train)
    return summarize(settings, manifest(), runs, [], side_by_side=1, parent_run_id="p")


def test_given_seeds_are_all_trained(tmp_path):
    train = Trainings(tmp_path, none=0.8, batch=0.9, group=0.8)
    result = study(load("compare.seeds=[4, 5, 6, 7]"), train)
    assert train.asked == [(arm, seed) for seed in (4, 5, 6, 7) for arm in ("none", "batch", "group")]
    assert result.trials_saved is None


def test_seeds_are_added_for_what_is_not_certain_alone(tmp_path):
    """Batch norm is far above, group norm so near to the baseline that no number of seeds up to ten tells; but it is
    clearly below the best, so that it stops as well."""
    train = Trainings(tmp_path, none=0.8, batch=0.9, group=0.802)
    result = study(load("compare.seeds=auto"), train)
    assert train.asked == [(arm, seed) for seed in range(3) for arm in ("none", "batch", "group")]
    assert result.trials_saved == 3 * 10 - 9
    assert [arm.grade for arm in result.arms[1:]] == ["clear", "cannot be told"]


def test_seeds_are_added_up_to_the_maximum(tmp_path):
    train = Trainings(tmp_path, deviations=0.02, none=0.8, batch=0.805, group=0.6)
    result = study(load("compare.seeds=auto", "compare.max_seeds=5"), train)
    assert train.asked[9:] == [(arm, seed) for seed in (3, 4) for arm in ("none", "batch")]
    assert (result.trials_saved, [arm.n for arm in result.arms]) == (2, [5, 5, 3])
    batch, group = result.arms[1:]
    assert (batch.grade, group.grade) == ("cannot be told", "likely")  # the latter stopped since it cannot win
    assert group.difference.mean < -0.15
    assert batch.difference.low < 0 < batch.difference.high


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("compare.seeds=many", "seeds"),
        ("compare.seeds=[]", "seeds lists no value"),
        ("compare.max_seeds=2", "max_seeds"),
    ],
)
def test_what_is_no_number_of_seeds_is_refused(override, words):
    with pytest.raises(SettingsError, match=words):
        load(override)
