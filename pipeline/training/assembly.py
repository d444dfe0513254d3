"""The parts of one training, put together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline import storage
from pipeline.config.training import TrainSettings
from pipeline.data import load_manifest
from pipeline.data.loader import TrainLoader
from pipeline.distributed.gradients import GradientExchange
from pipeline.distributed.worker import Worker
from pipeline.training import hooks, predictions
from pipeline.training.arithmetic import arithmetic
from pipeline.training.batch import DeviceBatches
from pipeline.training.checkpointer import Checkpointer
from pipeline.training.class_weights import class_weights
from pipeline.training.clipping import make_clip
from pipeline.training.diagnostics import Diagnostics
from pipeline.training.evaluate import Evaluator
from pipeline.training.event_log import EventLog
from pipeline.training.hooks import CallHook
from pipeline.training.job import Job
from pipeline.training.network import make_ready, mean_for, network_for
from pipeline.training.optimizer import Schedule, make_optimizer
from pipeline.training.out_of_memory import explain_out_of_memory
from pipeline.training.output import explain_output
from pipeline.training.pretrained import prepare
from pipeline.training.progress import TrainingState
from pipeline.training.step import MeanLoss, TrainStep
from pipeline.training.timing import StepTimes
from pipeline.training.weight_average import WeightAverage
from pipeline.training.word import FirstRank


@dataclass(frozen=True)
class Training:
    """The parts of one training on one rank. None of them knows this class, or the loop that uses them.

    train : the job's settings, with the global batch of the whole training
    last_step : optimizer steps done when this call of `fit` ends: all, or those to the end of ``Job.until_cycle``
    predictions_path : where rank 0 publishes the predictions of the network that the training ends with
    hook : see `hooks`
    notes : what was made of pretrained weights, as sentences
    """

    worker: Worker
    train: TrainSettings
    last_step: int
    loader: TrainLoader
    state: TrainingState
    step: TrainStep
    evaluator: Evaluator
    diagnostics: Diagnostics
    checkpoints: Checkpointer
    events: EventLog
    predictions_path: str
    hook: CallHook
    notes: tuple[str, ...]

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    @property
    def at_cycle_end(self) -> bool:
        """Whether a cycle of the schedule has just ended, where the training may stop and go on later."""
        return self.state.progress.step in self.step.schedule.cycle_ends

    @property
    def ended(self) -> bool:
        """Whether no step is left to take now: those to `last_step` are done, or the loss was not finite."""
        return self.state.progress.diverged or self.state.progress.step >= self.last_step

    @property
    def complete(self) -> bool:
        """Whether all steps of the whole schedule are done, and none of them has diverged."""
        return not self.state.progress.diverged and self.state.progress.step >= self.step.schedule.cycle_ends[-1]


@contextlib.contextmanager
def assemble(worker: Worker, job: Job) -> Iterator[Training]:
    """Build the parts of a training on this rank; leaving the block closes them. Nothing is restored or trained yet.

    Raises
    ------
    ValueError
        Settings and dataset do not fit each other; see `check_data`, `prepare` and `make_ready`.
    OutputError
        The job's folder does not take what the block writes.
    OutOfMemoryError
        The device has too little memory for what is built here, or for what the block does with it.
    """
    with contextlib.ExitStack() as at_end:
        train = job.train.for_workers(worker.world_size)
        at_end.enter_context(arithmetic(worker.device, train))
        at_end.enter_context(explain_out_of_memory(worker, train))
        at_end.enter_context(explain_output(job.folder))
        manifest = load_manifest(job.dataset, job.version)
        loader = at_end.enter_context(contextlib.closing(TrainLoader(job.dataset, manifest, train, job.reader, worker)))
        hook = hooks.bind(worker, job, loader.steps_per_epoch)
        network = network_for(job.model, manifest, seed=train.seed)
        prepared = prepare(network, job.model, train, manifest, digest=job.weights_digest)
        model = make_ready(worker, network, job.model, train, lanes=len(loader.lanes), hook=hook)
        average = WeightAverage(model, train.weight_ema) if train.weight_ema else None
        state = TrainingState(model, make_optimizer(model, train, prepared.head), average)
        shape, mean = job.model.input_shape(manifest.image.shape), mean_for(job.model, manifest)
        data = DeviceBatches(worker, loader, manifest, train, shape, mean)
        evaluator = at_end.enter_context(contextlib.closing(Evaluator(state, data, job.dataset, job.reader)))
        exchange = GradientExchange(worker, model, train.gradient_compression)
        events = at_end.enter_context(contextlib.closing(EventLog(worker, job.folder, live=job.live)))
        checkpoints = Checkpointer(worker, job, state, events, hook, manifest)
        loss = MeanLoss(train, worker.device.type, class_weights(train, manifest, worker.device))
        diagnostics = Diagnostics(worker, model, train.diagnostics, loss=loss, emit=events.emit)
        schedule = Schedule(train, loader.steps_per_epoch)
        ends = schedule.cycle_ends
        last_step = ends[-1] if job.until_cycle is None else ends[min(job.until_cycle, len(ends)) - 1]
        times = StepTimes(worker.world_size)
        step = TrainStep(
            worker, train, state, data, exchange, schedule, loss, diagnostics, events,
            FirstRank(worker, job, checkpoints.is_due).word_after, times, hook, make_clip(model, train, prepared.head),
        )  # fmt: skip
        path = storage.join(job.folder, predictions.FILE)
        yield Training(
            worker,
            train,
            last_step,
            loader,
            state,
            step,
            evaluator,
            diagnostics,
            checkpoints,
            events,
            path,
            hook,
            prepared.notes,
        )
