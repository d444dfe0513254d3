"""Whether `compare` chooses and judges rightly on small real data: studies whose whole grid is trained to the end.

Studies of 1,000 to 4,000 images (see `verdict_data`): long tails of Fashion-MNIST, one class with most images, wrong
labels, spoiled images, scikit-learn's digits. For each, every arm is trained with every rate of the grid and three
seeds: the truth. The study's own search and three other seeds then decide; what a search with a single seed would have
chosen is known beside it. Reported are the share of arms whose rate is within one point of the grid's best, and the
share of clear verdicts whose sign is not the truth's. No default was chosen by the studies that are held out.

The truth must be known better than the point that is asked about. On the test split of a study it is not: of 500 images
with one class of 60%, a balanced accuracy has a standard error of some two points. So it is measured on the 10,000
images that Fashion-MNIST's authors set aside, which no study sees, and of digits on the test split, since there are no
others.

Search, seeds and statistics are the study's own; trainings run in processes of one thread here, without Spark, Java and
MLflow. A study is many tasks, so that 16 processes are busy with few studies. What is done is kept in
``runs/bench/verdicts`` (``BENCH_VERDICTS``): the benchmark goes on where it was stopped. Some studies, by patterns of
their names or groups (seen, held out, fresh), on a machine with many cores, for ten minutes::

    BENCH_PROCESSES=16 BENCH_SECONDS=400 python tests/bench/verdicts.py fresh "digits*"
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent))

from verdict_data import STUDIES, Data, unseen, write

ARMS, RATES = ("none", "batch", "group"), (0.02, 0.1, 0.5)
TRUTH_SEEDS = (100, 101, 102)
RATE = "train.learning_rate"
FOLDER = Path(os.environ.get("BENCH_VERDICTS", "runs/bench/verdicts"))
PROCESSES = int(os.environ.get("BENCH_PROCESSES", "2"))
# After so long no task is begun any more; those that run go on to their end.
SECONDS = float(os.environ.get("BENCH_SECONDS", "1e6"))


def run(patterns: Sequence[str] = ()) -> None:
    """Train what is missing of the studies of these names or groups, and say what those that are done have shown.

    patterns : as of file names; none for all studies
    """
    chosen = [d for d in STUDIES if not patterns or any(fnmatch(n, p) for p in patterns for n in (d.name, d.group))]
    if not chosen:
        sys.exit(f"no study of {', '.join(patterns)}: there are {', '.join(data.name for data in STUDIES)}")
    missing = [data for data in chosen if not _is_done(data)]
    last, context = time.monotonic() + SECONDS, multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context, initializer=_initialize) as pool:
        list(pool.map(_prepare, missing))
        # Decisions first, which take as long as several truths.
        tasks = {pool.submit(_decide, data): data for data in missing}
        tasks |= {pool.submit(_truth, data, arm, rate): data for data in missing for arm in ARMS for rate in RATES}
        while tasks:
            done, _ = wait(tasks, return_when=FIRST_COMPLETED, timeout=max(0.0, last - time.monotonic()))
            if not done:
                pool.shutdown(wait=False, cancel_futures=True)
                break
            ended = {tasks.pop(task): task.result() for task in done}
            for data in ended.keys() - set(tasks.values()):
                more = [key for key in _beyond(data) if not _truth_file(data, *key).exists()]
                tasks |= {pool.submit(_truth, data, *key): data for key in more}
                if not more:
                    _finish(data)
            print(f"{len(tasks)} tasks to go", file=sys.stderr, flush=True)
    report([json.loads(_result_of(data).read_text()) for data in chosen if _is_done(data)])


def _initialize() -> None:
    import torch

    torch.set_num_threads(1)


def _finish(data: Data) -> None:
    _result_of(data).write_text(json.dumps(_judged(data), indent=1))
    shutil.rmtree(_folder(data))


def report(found: Sequence[dict[str, Any]]) -> None:
    """A table of what studies have shown, group by group."""
    from results import Result, leave

    results = []
    for group in dict.fromkeys(each["group"] for each in found):
        of_group = [each for each in found if each["group"] == group]
        arms = [arm for each in of_group for arm in each["arms"]]
        clear = [arm for arm in arms if arm.get("grade") == "clear"]
        for each in of_group:
            print(each["name"], [(a["arm"], a["before"], a["chosen"], round(a["lost"], 4)) for a in each["arms"]])
        results += [
            Result(f"{group}: arms within 1 point of the grid's best", "share", [_share(arms, "within")]),
            Result(f"{group}: the same, one seed", "share", [_share(arms, "within_before")]),
            Result(f"{group}: searches undecided", "share", [_share(arms, "undecided")]),
            Result(f"{group}: clear verdicts with the wrong sign", "share", [_share(clear, "wrong_sign")]),
            Result(f"{group}: clear verdicts", "of differences", [len(clear) / max(1, 2 * len(of_group))]),
            Result(f"{group}: cost of the search", "of final trainings", [each["cost"] for each in of_group]),
        ]
    leave("verdicts", results, f"{len(found)} small real studies, {len(ARMS)} arms, rates {RATES}")


def _share(items: Sequence[dict[str, Any]], name: str) -> float:
    return sum(bool(item[name]) for item in items) / max(1, len(items))


def _folder(data: Data) -> Path:
    """Where the parts of a study are until it is done."""
    return (FOLDER / data.file).absolute()


def _result_of(data: Data) -> Path:
    return FOLDER / f"{data.file}.json"


def _is_done(data: Data) -> bool:
    """Whether its result is there, and not one of a version that asked less."""
    return _result_of(data).exists() and "group" in json.loads(_result_of(data).read_text())


def _prepare(data: Data) -> None:
    """Write the dataset, if it is not there as a whole."""
    done = _folder(data) / "prepared"
    if not done.exists():
        shutil.rmtree(_folder(data), ignore_errors=True)
        _folder(data).mkdir(parents=True)
        write(data, str(_folder(data) / "data"))
        done.touch()


def _decide(data: Data) -> None:
    """What the study chooses and says, and what a search with one seed chooses, in its file ``decided.json``."""
    from pipeline.study.arms import arms_of, candidates_of
    from pipeline.study.search import ArmSearch, run_search
    from pipeline.study.seeds import run_seeds
    from pipeline.study.summary import summarize

    done = _folder(data) / "decided.json"
    if done.exists():
        return
    settings, manifest = _opened(data)
    arms, train = arms_of(settings), _Trainer(_folder(data) / "decide")
    searches = [ArmSearch(settings, arm, candidates_of(settings), manifest) for arm in arms]
    run_search(searches, train)
    single = [ArmSearch(settings, arm, candidates_of(settings), manifest, search_seeds=1) for arm in arms]
    run_search(single, _Trainer(_folder(data) / "decide-single"))
    tuned = {search.arm.name: search.tuned for search in searches}
    runs = run_seeds(settings, manifest, arms, tuned, train)
    comparison = summarize(settings, manifest, runs, searches, side_by_side=1, parent_run_id="")
    before = {search.arm.name: search.tuned[RATE] for search in single}
    cost = sum(each.images for each in single) / sum(each.compared_images for each in single)
    arms_said = [
        {
            "arm": arm.arm,
            "chosen": arm.tuned[RATE],
            "before": before[arm.arm],
            "grade": arm.grade,
            "undecided": arm.search_undecided,
            "seeds": arm.search_seeds,
            "difference": arm.difference.mean if arm.difference else None,
        }
        for arm in comparison.arms
    ]
    said = {"metric": comparison.metric, "cost": comparison.search_cost, "cost_before": cost, "arms": arms_said}
    _publish(done, said)
    print(data.name, [(arm["arm"], arm["before"], arm["chosen"], arm["grade"]) for arm in arms_said], flush=True)


def _truth(data: Data, name: str, rate: float) -> None:
    """Both metrics of an arm with a rate, of each of three seeds on unseen images and the test split, in its file."""
    from pipeline.study.arms import arms_of
    from pipeline.study.trials import compared_trials

    done = _truth_file(data, name, rate)
    if done.exists():
        return
    settings, manifest = _opened(data)
    (arm,) = [arm for arm in arms_of(settings) if arm.name == name]
    trials = compared_trials(settings, [arm], {name: {RATE: rate}}, TRUTH_SEEDS)
    ends = _Trainer(_folder(data) / f"truth-{name}-{rate}")(trials)
    on_test = [{"accuracy": run.final_accuracy, "balanced_accuracy": run.final_balanced_accuracy} for run in ends]
    on_unseen = on_test if data.digits else [_on_unseen(run, arm.settings, manifest, data) for run in ends]
    _publish(done, {"truth": on_unseen, "test": on_test})


def _truth_file(data: Data, arm: str, rate: float) -> Path:
    return _folder(data) / f"truth-{arm}-{rate}.json"


def _publish(path: Path, content: Any) -> None:
    """Write a file as a whole: a task that is killed leaves none."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.rename(path)


def _decided(data: Data) -> dict[str, Any]:
    return json.loads((_folder(data) / "decided.json").read_text())


def _beyond(data: Data) -> Iterable[tuple[str, float]]:
    """Arms and rates beyond the grid that were chosen, of which the truth is asked too."""
    chosen = {(arm["arm"], arm[which]) for arm in _decided(data)["arms"] for which in ("chosen", "before")}
    return sorted((arm, rate) for arm, rate in chosen if rate not in RATES)


def _judged(data: Data) -> dict[str, Any]:
    """The study's choice and verdict of each arm; what its rate loses against the grid's best, in the truth."""
    decided = _decided(data)
    scores = {
        (arm, rate): json.loads(_truth_file(data, arm, rate).read_text())
        for arm, rate in [*((arm, rate) for arm in ARMS for rate in RATES), *_beyond(data)]
    }
    metric = decided["metric"]
    means = {key: float(np.mean([each[metric] for each in found["truth"]])) for key, found in scores.items()}
    baseline = decided["arms"][0]
    arms = [_arm_judged(arm, means, baseline) for arm in decided["arms"]]
    measured = {
        which: {f"{arm} {rate}": [each[metric] for each in found[which]] for (arm, rate), found in scores.items()}
        for which in ("truth", "test")
    }
    return {"name": data.name, "group": data.group, **decided, "arms": arms, **measured}


def _arm_judged(arm: dict[str, Any], truth: dict[tuple[str, float], float], baseline: dict[str, Any]) -> dict[str, Any]:
    name, best = arm["arm"], max(truth[arm["arm"], rate] for rate in RATES)
    lost, lost_before = (best - truth[name, arm[which]] for which in ("chosen", "before"))
    judged = {**arm, "lost": lost, "within": lost <= 0.01, "lost_before": lost_before,
              "within_before": lost_before <= 0.01}  # fmt: skip
    if arm["difference"] is not None:
        true_difference = truth[name, arm["chosen"]] - truth[baseline["arm"], baseline["chosen"]]
        judged |= {"true_difference": true_difference, "wrong_sign": arm["difference"] * true_difference < 0}
    return judged


def _on_unseen(run: Any, settings: Any, manifest: Any, data: Data) -> dict[str, float]:
    """Both metrics of a trained network on images that no study sees, of which every class has a thousand."""
    import torch

    from pipeline.training.network import network_for

    network = network_for(settings.model, manifest)
    network.load_state_dict(torch.load(run.checkpoint, weights_only=True)["model"])
    pixels, labels = _unseen(data)
    with torch.inference_mode():
        found = [network.eval()(part).argmax(1).numpy() for part in torch.from_numpy(pixels).split(500)]
    right = np.concatenate(found) == labels
    recall = np.bincount(labels, right) / np.bincount(labels)
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(recall.mean())}


_unseen = cache(unseen)


class _Trainer:
    """Trains trials here, as workers do; a rung's predictions are kept, since the next one replaces them."""

    def __init__(self, folder: Path):
        shutil.rmtree(folder, ignore_errors=True)  # of a task that was killed
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


def _opened(data: Data) -> tuple[Any, Any]:
    """Settings of the study, without ``auto``, and the manifest of its dataset."""
    from pipeline.config.settings import Settings
    from pipeline.driver.checks import open_dataset

    settings = {
        "name": "verdicts",
        "output": str(_folder(data)),
        "dataset": {"path": str(_folder(data) / "data")},
        "model": {"depth": 3, "width": 8, "norm_groups": 4},
        "train": {"epochs": "auto", "warmup_epochs": "auto", "batch_size": "auto", "lanes": 8},
        "workers": {"count": 1},
        "compare": {"grid": {"model.norm": ARMS, RATE: RATES}},
    }
    return open_dataset(Settings.model_validate(settings))


if __name__ == "__main__":
    run(sys.argv[1:])
