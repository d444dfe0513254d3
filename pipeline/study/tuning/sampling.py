"""Optuna: what is tried next, which trials are pruned, which settings matter. No other module imports it.

All that a search knows is in Optuna's storage. What a sampler draws follows from `tune.seed`, the number of the trial,
the setting and the trials before: a driver that goes on after a kill draws what the killed one would have drawn.
"""

from __future__ import annotations

import hashlib
import math
import random
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from pipeline.config.secrets import mask
from pipeline.config.tune import TuneSettings, ordered
from pipeline.report.names import SettingValue, Values
from pipeline.study.tuning.journal import JournalFiles, Line
from pipeline.study.tuning.space import Space, grid_of, is_active, is_whole, values_of

optuna.logging.set_verbosity(optuna.logging.ERROR)  # what it warns of is a matter of this module
warnings.filterwarnings("ignore", category=UserWarning, module=r"optuna\.")

State = Literal["running", "complete", "pruned", "failed"]
_STATES: Mapping[TrialState, State] = {
    TrialState.RUNNING: "running", TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}  # fmt: skip
_OUTPUT, _FACTS, SECONDS = "output", "facts", "search_seconds"
# PED-ANOVA tells apart the best share of trials; fewer than so many of them are chance.
_BEST_TRIALS, _LEAST_SHARE, _LARGEST_SHARE = 5, 0.1, 0.5
_LEAST_TRIALS = 2 * _BEST_TRIALS


class StorageHeldError(ValueError):
    """The storage has a search of this name that belongs to another output folder."""


@dataclass(frozen=True)
class SearchedTrial:
    """A trial as the storage knows it.

    number : 0 is the first
    values : of the parameters whose conditions hold
    points : objective by the number of the evaluation, 1 is the first
    value : objective at its last evaluation; None unless it is complete
    facts : what was noted with it, JSON values: ``images``, ``run_id``, ...
    """

    number: int
    state: State
    values: Values
    points: Mapping[int, float]
    value: float | None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Journal(BaseJournalBackend):
    """Optuna's history in the output folder."""

    def __init__(self, files: JournalFiles):
        self._files, self._lock = files, threading.Lock()

    def read_logs(self, log_number_from: int) -> Iterable[Line]:
        with self._lock:
            return self._files.lines[log_number_from:]

    def append_logs(self, logs: list[Line]) -> None:
        with self._lock:
            self._files.append(logs)


class Search:
    """The trials of one search, from any thread: one is asked for, reported on while it trains, and told at its end.

    Parameters
    ----------
    name : of the search in its storage
    output : folder of the search, which no other search of this name may share a storage with
    evaluations : of a trial that is not pruned
    journal : folder of the history, where ``options.storage`` is null
    check : called before the history is written; raises where another process has the search

    Raises
    ------
    StorageHeldError
        The storage has a search of this name of another folder.
    ValueError
        The storage cannot be used, or its history is damaged.
    """

    def __init__(
        self,
        name: str,
        options: TuneSettings,
        *,
        output: str,
        evaluations: int,
        journal: str,
        check: Callable[[], None] = lambda: None,
    ):
        self._options, self._space, self._check = options, options.space, check
        self._lock = threading.RLock()
        self._trials: dict[int, optuna.Trial] = {}
        storage = (
            _database(options.storage) if options.storage else JournalStorage(Journal(JournalFiles(journal, check)))
        )
        self._study = optuna.create_study(
            study_name=name,
            storage=storage,
            direction="minimize" if options.metric == "cross_entropy" else "maximize",
            pruner=_pruner(options, evaluations),
            load_if_exists=True,
        )
        self._take(name, output)
        self._grid = _shuffled_grid(self._space, options.seed) if options.sampler == "grid" else None

    def _take(self, name: str, output: str) -> None:
        holder = self._study.user_attrs.get(_OUTPUT)
        if holder is None:
            self._study.set_user_attr(_OUTPUT, output)
        elif holder != output:
            raise StorageHeldError(
                f"tune.storage {mask(self._options.storage or '')} has a search {name!r} of {holder}, which holds it: "
                "set another `name`, or another database"
            )

    @property
    def seconds(self) -> float:
        """For which the search had run, over all drivers, when a trial was told last (the fact `SECONDS`)."""
        return max((float(trial.facts.get(SECONDS, 0.0)) for trial in self.trials()), default=0.0)

    def trials(self) -> list[SearchedTrial]:
        """All trials so far, in the order in which they were asked for."""
        with self._lock:
            trials = self._study.get_trials(deepcopy=False)
            return [_searched(each) for each in trials if each.state != TrialState.WAITING]

    def ask(self) -> SearchedTrial | None:
        """The next trial with its values, which is running from now on; None where every combination was tried."""
        with self._lock:
            self._check()
            if self._grid is not None and not self._enqueue_next():
                return None
            self._study.sampler = self._sampler("")
            trial = self._study.ask()
            self._suggest(trial)
            self._trials[trial.number] = trial
            return _searched(self._frozen(trial.number))

    def take_up(self, number: int) -> SearchedTrial:
        """A trial that was running when an earlier driver ended, with all its values, also those not drawn yet."""
        with self._lock:
            self._study.sampler = self._sampler("")
            trial = optuna.Trial(self._study, self._frozen(number)._trial_id)
            self._suggest(trial)
            self._trials[number] = trial
            return _searched(self._frozen(number))

    def report(self, number: int, evaluation: int, value: float) -> bool:
        """Write down what an evaluation has shown, and return whether the trial is to be pruned by it."""
        with self._lock:
            self._check()
            trial = self._trials[number]
            if evaluation not in self._frozen(number).intermediate_values:
                trial.report(value, evaluation)
            return trial.should_prune()

    def should_prune(self, number: int) -> bool:
        """Whether a trial is to be pruned by what was reported of it already."""
        with self._lock:
            return bool(self._frozen(number).intermediate_values) and self._trials[number].should_prune()

    def tell(self, number: int, state: State, value: float | None = None, **facts: Any) -> None:
        """End a trial as complete, with its value, as pruned, or as failed.

        Parameters
        ----------
        facts : JSON values to be noted with it
        """
        states = {name: kind for kind, name in _STATES.items()}
        with self._lock:
            self._check()
            trial = self._trials[number]
            trial.set_user_attr(_FACTS, facts)
            self._study.tell(number, value, state=states[state])

    def importance(self) -> dict[str, float]:
        """How much each parameter decides whether a trial is among the best of those that are complete, in sum 1.

        By PED-ANOVA (Watanabe et al. 2023) for conditional spaces; empty where there are too few complete trials.
        """
        # Imported here, since it imports scikit-learn where that is installed.
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        with self._lock:
            complete = [t for t in self._study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
            share = min(_LARGEST_SHARE, max(_LEAST_SHARE, _BEST_TRIALS / max(1, len(complete))))
            if len(complete) < _LEAST_TRIALS or len({trial.value for trial in complete}) < 2:
                return {}
            found = get_param_importances(self._study, evaluator=PedAnovaImportanceEvaluator(target_quantile=share))
        return {name: float(value) for name, value in found.items() if math.isfinite(value)}

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _suggest(self, trial: optuna.Trial) -> None:
        """Draw the values of a trial in the order of conditions, each with a generator of its own."""
        trial.relative_params  # noqa: B018 - drawn by the sampler of the whole trial, and kept
        values: Values = {}
        for name in ordered(self._space):
            parameter = self._space[name]
            if not is_active(parameter, values):
                continue
            self._study.sampler = self._sampler(f"{trial.number} {name}")
            whole = is_whole(name, parameter)
            if parameter.choices is not None:
                values[name] = trial.suggest_categorical(name, parameter.choices)
            elif parameter.low is None or parameter.high is None:  # settings are checked: this is for the types
                raise AssertionError(name)
            elif whole:
                last = int(values_of(name, parameter)[-1] or 0) if parameter.step else int(parameter.high)
                step = int(parameter.step or 1)
                values[name] = trial.suggest_int(name, int(parameter.low), last, step=step, log=parameter.log)
            else:
                last_float = float(values_of(name, parameter)[-1] or 0)
                step_float = None if parameter.step is None else float(parameter.step)
                low = float(parameter.low)
                values[name] = trial.suggest_float(name, low, last_float, step=step_float, log=parameter.log)

    def _sampler(self, what: str) -> optuna.samplers.BaseSampler:
        seed = int.from_bytes(hashlib.sha256(f"{self._options.seed} {what}".encode()).digest()[:4], "big")
        options = self._options
        if options.sampler == "cmaes" and not what:
            # Draws the numbers that every trial has, all at once; what is left is drawn by the one below.
            return optuna.samplers.CmaEsSampler(
                seed=seed, n_startup_trials=options.random_trials, warn_independent_sampling=False,
                consider_pruned_trials=options.pruner == "hyperband",
            )  # fmt: skip
        if options.sampler in ("tpe", "cmaes"):
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=options.random_trials, multivariate=False, constant_liar=True
            )
        return optuna.samplers.RandomSampler(seed=seed)

    def _enqueue_next(self) -> bool:
        """Have the next combination of the grid tried; False where all were."""
        assert self._grid is not None
        trials = self._study.get_trials(deepcopy=False)
        if any(trial.state == TrialState.WAITING for trial in trials):
            return True
        tried = [trial.system_attrs.get("fixed_params", trial.params) for trial in trials]
        for values in self._grid:
            if values not in tried:
                self._study.enqueue_trial(values)
                return True
        return False


def _searched(trial: FrozenTrial) -> SearchedTrial:
    value = trial.value if trial.state == TrialState.COMPLETE else None
    points = dict(sorted(trial.intermediate_values.items()))
    return SearchedTrial(
        trial.number, _STATES[trial.state], _plain(trial), points, value, trial.user_attrs.get(_FACTS, {})
    )  # fmt: skip


def _plain(trial: FrozenTrial) -> Values:
    """The values of a trial; a list's are those of the list, of the same type."""
    values: Values = {}
    for name, value in trial.params.items():
        distribution = trial.distributions[name]
        known: Iterable[SettingValue] = (
            distribution.choices if isinstance(distribution, CategoricalDistribution) else ()
        )
        values[name] = next((each for each in known if each == value and type(each) is type(value)), value)
    return values


def _shuffled_grid(space: Space, seed: int) -> list[Values]:
    """All combinations in an order of chance: a search that a limit ends has seen all parts of the space alike."""
    grid = grid_of(space)
    random.Random(seed).shuffle(grid)
    return grid


def _pruner(options: TuneSettings, evaluations: int) -> optuna.pruners.BasePruner:
    if options.pruner == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=options.pruner_trials, n_warmup_steps=options.pruner_evaluations
        )
    if options.pruner == "successive_halving":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=options.pruner_evaluations, reduction_factor=options.reduction_factor
        )
    if options.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=options.pruner_evaluations,
            max_resource=max(evaluations, options.pruner_evaluations),
            reduction_factor=options.reduction_factor,
        )
    return optuna.pruners.NopPruner()


def _database(url: str) -> BaseStorage:
    """Optuna's tables in a database, made where they are absent; before that, another program's tables are refused."""
    try:
        tables = set(sqlalchemy.inspect(sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)).get_table_names())
        if "alembic_version" in tables and "trials" not in tables:
            raise ValueError("it has the tables of another program")
        return RDBStorage(url)
    except Exception as error:  # each driver raises kinds of its own, or is not installed
        reason = " ".join(mask(str(error)).split())[:300] or type(error).__name__
        raise ValueError(
            f"tune.storage {mask(url)} cannot be used: {reason}. It is the SQLAlchemy URL of a database, not the one "
            "of MLflow: both keep the version of their tables in `alembic_version`"
        ) from error
