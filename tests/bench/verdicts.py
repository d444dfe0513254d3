"""Whether `compare` chooses and judges rightly on small real data: studies whose whole grid is trained to the end.

Sixteen studies of 1,000 to 4,000 images: long tails of Fashion-MNIST, one class of 60%, wrong labels, scikit-learn's
digits. For each, every arm is trained with every rate of the grid and three seeds: the truth. The study's own search
and three other seeds then decide. Reported are the share of arms whose rate is within one point of the grid's best, and
the share of clear verdicts whose sign is not the truth's. Half of the studies are held out: no default was chosen by
them.

The truth must be known better than the point that is asked about. On the test split of a study it is not: of 500 images
with one class of 60%, a balanced accuracy has a standard error of some two points. So it is measured on the 10,000
images that Fashion-MNIST's authors set aside, which no study sees, and of digits on the test split, since there are no
others.

Search, seeds and statistics are the study's own; trainings run in this process, without Spark and MLflow. A study that
is done is kept in ``runs/bench/verdicts``, so that the benchmark goes on where it was stopped.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "support"))

ARMS, RATES = ("none", "batch", "group"), (0.02, 0.1, 0.5)
TRUTH_SEEDS = (100, 101, 102)
FOLDER = Path("runs/bench/verdicts")
PROCESSES = int(os.environ.get("BENCH_PROCESSES", "2"))


@dataclass(frozen=True)
class Data:
    """What a study is of.

    rows : training images
    tail : the largest class has this many times the images of the smallest
    major : share of one class; 0: none stands out
    noise : share of training and validation labels that are drawn at random
    held_out : whether it was looked at only when everything was decided
    """

    name: str
    rows: int = 2000
    tail: float = 1.0
    major: float = 0.0
    noise: float = 0.0
    digits: bool = False
    seed: int = 0
    held_out: bool = False


STUDIES = [
    Data("even"),
    Data("even, held out", rows=3000, seed=10, held_out=True),
    Data("tail of 10", tail=10),
    Data("tail of 20, held out", tail=20, seed=11, held_out=True),
    Data("one class of 60%", major=0.6),
    Data("one class of 60%, held out", major=0.6, rows=1500, seed=12, held_out=True),
    Data("digits", digits=True),
    Data("digits, held out", digits=True, seed=13, held_out=True),
    Data("wrong labels, 20%", noise=0.2),
    Data("wrong labels, 30%, held out", noise=0.3, seed=14, held_out=True),
    Data("tail of 50", tail=50),
    Data("tail of 100, held out", tail=100, rows=3000, seed=15, held_out=True),
    Data("tail of 10, small", tail=10, rows=1000),
    Data("even, small, held out", rows=1000, seed=16, held_out=True),
    Data("wrong labels, 40%", noise=0.4),
    Data("tail of 10, larger, held out", tail=10, rows=4000, seed=17, held_out=True),
]


def run() -> None:
    from results import Result, leave

    from pipeline.ingest.sources import fashion_mnist

    source = str(fashion_mnist.locate(None, "runs/cache"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(PROCESSES, maxtasksperchild=1) as pool:
        found = pool.starmap(study, [(data, source) for data in STUDIES], chunksize=1)
    results = []
    for held_out, words in ((False, "seen"), (True, "held out")):
        half = [each for each in found if each["held_out"] == held_out]
        arms = [arm for each in half for arm in each["arms"]]
        clear = [arm for arm in arms if arm.get("grade") == "clear"]
        results += [
            Result(f"{words}: arms within 1 point of the grid's best", "share", [_share(arms, "within")]),
            Result(f"{words}: clear verdicts with the wrong sign", "share", [_share(clear, "wrong_sign")]),
            Result(f"{words}: clear verdicts", "of differences", [len(clear) / max(1, 2 * len(half))]),
            Result(f"{words}: cost of the search", "of final trainings", [each["cost"] for each in half]),
        ]
    leave("verdicts", results, f"{len(found)} small real studies, {len(ARMS)} arms, rates {RATES}")


def _share(items: Sequence[dict[str, Any]], name: str) -> float:
    return sum(bool(item[name]) for item in items) / max(1, len(items))


def study(data: Data, fashion_mnist: str) -> dict[str, Any]:
    """What the study chose and said, beside the truth; see `_judged`."""
    done = FOLDER / f"{data.name.replace(' ', '-').replace(',', '').replace('%', '')}.json"
    if done.exists():
        return json.loads(done.read_text())
    import torch

    torch.set_num_threads(1)
    started, work = time.monotonic(), FOLDER / done.stem
    shutil.rmtree(work, ignore_errors=True)
    write(data, str(work / "data"), Path(fashion_mnist))
    unseen = None if data.digits else Path(fashion_mnist)
    result = {"name": data.name, "held_out": data.held_out, **_judged(str((work / "data").absolute()), work, unseen)}
    result["seconds"] = time.monotonic() - started
    shutil.rmtree(work)
    done.write_text(json.dumps(result, indent=1))
    print(data.name, [(arm["arm"], arm["chosen"], arm["lost"], arm.get("grade")) for arm in result["arms"]], flush=True)
    return result


def _judged(dataset: str, work: Path, unseen: Path | None) -> dict[str, Any]:
    """The study's choice and verdict of each arm; what its rate loses against the grid's best, in the truth."""
    from pipeline.driver.checks import open_dataset
    from pipeline.report.learned import score_of
    from pipeline.study.arms import arms_of, candidates_of
    from pipeline.study.search import ArmSearch, run_search
    from pipeline.study.seeds import run_seeds
    from pipeline.study.summary import summarize
    from pipeline.study.trials import compared_trials

    settings, manifest = open_dataset(_settings(dataset, work))
    arms, train = arms_of(settings), _Trainer(work)
    searches = [ArmSearch(settings, arm, candidates_of(settings), manifest) for arm in arms]
    run_search(searches, train)
    tuned = {search.arm.name: search.tuned for search in searches}
    runs = run_seeds(settings, manifest, arms, tuned, train)
    comparison = summarize(settings, manifest, runs, searches, side_by_side=1, parent_run_id="")
    truth, on_test = {}, {}
    for arm in arms:
        rates = dict.fromkeys((*RATES, tuned[arm.name]["train.learning_rate"]))
        for rate in rates:
            trials = compared_trials(settings, [arm], {arm.name: {"train.learning_rate": rate}}, TRUTH_SEEDS)
            ends = train(trials)
            on_test[arm.name, rate] = [score_of(each, comparison.metric) for each in ends]
            truth[arm.name, rate] = on_test[arm.name, rate]
            if unseen is not None:
                scores = [_on_unseen(each, arm.settings, manifest, unseen) for each in ends]
                truth[arm.name, rate] = [score[comparison.metric] for score in scores]
    means = {key: float(np.mean(scores)) for key, scores in truth.items()}
    found = [_arm_judged(arm, means, comparison.baseline_arm) for arm in comparison.arms]
    return {"metric": comparison.metric, "cost": comparison.search_cost, "arms": found,
            **{name: {f"{arm} {rate}": scores for (arm, rate), scores in values.items()}
               for name, values in (("truth", truth), ("test", on_test))}}  # fmt: skip


def _on_unseen(run: Any, settings: Any, manifest: Any, fashion_mnist: Path) -> dict[str, float]:
    """Both metrics of a trained network on the published test images, of which every class has a thousand."""
    import torch

    from pipeline.training.network import network_for

    network = network_for(settings.model, manifest)
    network.load_state_dict(torch.load(run.checkpoint, weights_only=True)["model"])
    pixels, labels = _fashion(fashion_mnist, "t10k")
    with torch.inference_mode():
        found = [network.eval()(part).argmax(1).numpy() for part in torch.from_numpy(pixels).split(500)]
    right = np.concatenate(found) == labels
    recall = np.bincount(labels, right) / np.bincount(labels)
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(recall.mean())}


def _arm_judged(arm: Any, truth: dict[tuple[str, float], float], baseline: Any) -> dict[str, Any]:
    rate, base_rate = (each.tuned["train.learning_rate"] for each in (arm, baseline))
    lost = max(truth[arm.arm, each] for each in RATES) - truth[arm.arm, rate]
    judged = {"arm": arm.arm, "chosen": rate, "lost": lost, "within": lost <= 0.01, "undecided": arm.search_undecided}
    if arm.difference:
        true_difference = truth[arm.arm, rate] - truth[baseline.arm, base_rate]
        judged |= {"grade": arm.grade, "difference": arm.difference.mean, "true_difference": true_difference,
                   "wrong_sign": arm.difference.mean * true_difference < 0}  # fmt: skip
    return judged


class _Trainer:
    """Trains trials here, as workers do; a rung's predictions are kept, since the next one replaces them."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, trials: Sequence[Any]) -> list[Any]:
        return [self._train(trial) for trial in trials]

    def _train(self, trial: Any) -> Any:
        from pipeline.distributed.worker import alone
        from pipeline.report.comparison import StudyRun
        from pipeline.training import fit
        from pipeline.training.job import Job

        train, rate = trial.settings.train, trial.settings.train.learning_rate
        place = self._folder / f"{trial.kind}-{trial.arm.name}-{rate}-{train.seed}"
        job = Job(trial.settings.dataset.path, str(place.absolute()), trial.settings.model, train)
        result = fit(alone("cpu"), replace(job, until_cycle=trial.cycle))
        kept = f"{result.predictions}.{trial.cycle}"
        shutil.copy(str(result.predictions), kept)
        return StudyRun(
            arm=trial.arm.name, values=trial.arm.values, tuned=trial.tuned, learning_rate=rate, run_id="",
            global_batch=train.global_batch, seed=train.seed, **{**result.model_dump(), "predictions": kept},
        )  # fmt: skip


def _settings(dataset: str, work: Path) -> Any:
    from pipeline.config.settings import Settings

    return Settings.model_validate(
        {
            "name": "verdicts",
            "output": str(work),
            "dataset": {"path": dataset},
            "model": {"depth": 3, "width": 8, "norm_groups": 4},
            "train": {"epochs": "auto", "warmup_epochs": "auto", "batch_size": "auto", "lanes": 8},
            "workers": {"count": 1},
            "compare": {"grid": {"model.norm": ARMS, "train.learning_rate": RATES}},
        }
    )


def write(data: Data, path: str, fashion_mnist: Path) -> None:
    """The dataset of a study: training images, a quarter as many to choose by, and half as many to judge by."""
    from small_splits import write_splits

    random = np.random.default_rng(data.seed)
    pixels, labels = _digits() if data.digits else _fashion(fashion_mnist)
    order = random.permutation(len(labels))
    pixels, labels = pixels[order], labels[order]
    sizes = {"train": data.rows, "validation": data.rows // 4, "test": data.rows // 2}
    if data.digits:
        sizes = {"train": 1000, "validation": 297, "test": 500}
    classes, taken, splits = int(labels.max()) + 1, np.zeros(len(labels), bool), {}
    for name, rows in sizes.items():
        chosen = _choose(labels, taken, _counts(data, rows, classes))
        taken[chosen] = True
        known = labels[chosen].copy()
        if data.noise and name != "test":
            wrong = random.random(len(known)) < data.noise
            known[wrong] = random.integers(0, classes, wrong.sum())
        splits[name] = (pixels[chosen], known)
    write_splits(path, splits, classes=classes, row_group_rows=max(8, data.rows // 40))


def _counts(data: Data, rows: int, classes: int) -> np.ndarray:
    """Images of each class, at least three."""
    shares = data.tail ** (-np.arange(classes) / (classes - 1))
    if data.major:
        shares = np.where(np.arange(classes) == 0, data.major, (1 - data.major) / (classes - 1))
    return np.maximum(3, np.round(rows * shares / shares.sum())).astype(int)


def _choose(labels: np.ndarray, taken: np.ndarray, counts: np.ndarray) -> np.ndarray:
    free = [np.flatnonzero((labels == label) & ~taken)[:count] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(free))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images * 15.9).astype(np.uint8)[:, None], found.target.astype(np.int64)


def _fashion(folder: Path, part: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """The published images, of training or of the test (``t10k``), at half their size."""
    images, labels = (next(folder.glob(f"{part}-{kind}*")) for kind in ("images", "labels"))
    pixels = np.frombuffer(_bytes(images), np.uint8, offset=16).reshape(-1, 14, 2, 14, 2).mean((2, 4))
    return pixels.astype(np.uint8)[:, None], np.frombuffer(_bytes(labels), np.uint8, offset=8).astype(np.int64)


def _bytes(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


if __name__ == "__main__":
    run()
