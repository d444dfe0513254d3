"""The one training loop. No Spark, no MLflow: `fit` needs a `Worker` and a `Job`, nothing else.

By hand, in a world of one::

    fit(alone(), Job(dataset="runs/datasets/fashion_mnist", folder="runs/by-hand",
                     model=ModelSettings(), train=TrainSettings()))
"""

from __future__ import annotations

import math

from pipeline import storage
from pipeline.distributed.worker import Worker
from pipeline.training.assembly import Training, assemble
from pipeline.training.job import Job
from pipeline.training.predictions import Predictions, write
from pipeline.training.result import EvaluationPoint, TrainResult
from pipeline.training.versions import current_versions
from pipeline.training.word import EndedError, Word


def fit(worker: Worker, job: Job) -> TrainResult:
    """Train to the end, evaluating and checkpointing on the way. Every rank calls it and gets the same result.

    A job that finds checkpoints of its own in its folder goes on from the newest. One with ``until_cycle`` stops at the
    end of that cycle of its schedule, evaluated and saved; the same job with a later one goes on bit by bit.

    Raises
    ------
    ValueError
        Settings and dataset do not fit each other, or the checkpoints in the folder belong to another run.
    DivergedError
        The loss was not finite and ``train.on_divergence`` is ``fail``.
    EndedError
        The driver has ended this launch (`word.end_launch`).
    OSError
        The last checkpoint, or the predictions, could not be written; an OutputError where the disk is full, or may not
        be written.
    """
    with assemble(worker, job) as training:
        training.step.warm_up()
        training.checkpoints.restore()
        progress = training.state.progress
        _emit_start(training)
        _restore_predictions(training)
        with training.loader.batches(progress.step) as read:
            batches = training.step.data.ahead(read)
            while not training.ended:
                word = training.step.take(batches)
                if word is Word.END:
                    raise EndedError(f"the driver has ended this launch after step {progress.step}")
                if progress.diverged or training.at_cycle_end or training.evaluator.is_due(progress.step):
                    _evaluate(training)
                at_epoch_end = progress.step % training.steps_per_epoch == 0
                if progress.diverged or word is Word.SAVE or at_epoch_end or training.at_cycle_end:
                    training.checkpoints.save()
        training.checkpoints.finish()
        worker.wait_for_all()
        worker.status.enter("end")
        training.events.flush()
        return _result(training)


def _emit_start(training: Training) -> None:
    worker, step = training.worker, training.state.progress.step
    training.events.emit(
        "start",
        step=step,
        restored_from=step,
        attempt=worker.attempt,
        world_size=worker.world_size,
        total_steps=training.last_step,
        epochs=math.ceil(training.last_step / training.steps_per_epoch),
        force=True,
    )


def _evaluate(training: Training) -> None:
    """Add an evaluation to the progress, and emit it with what each rank spent its time on since the one before."""
    worker, state, progress = training.worker, training.state, training.state.progress
    worker.status.enter("evaluation")
    with training.diagnostics.evaluation(progress.step):
        network = training.evaluator.run(collect=training.ended)
    evaluation, state.evaluated_state = network.evaluation, network.state
    point = EvaluationPoint(
        step=progress.step,
        epoch=progress.step / training.steps_per_epoch,
        accuracy=evaluation.accuracy,
        loss=evaluation.loss,
        balanced_accuracy=evaluation.balanced_accuracy,
        macro_f1=evaluation.macro_f1,
        calibration_error=evaluation.calibration_error,
    )
    train_loss = progress.add_evaluation(point, evaluation.recall)
    ranks = training.step.times.gather(worker)
    training.events.emit(
        "evaluation",
        **point.model_dump(),
        train_loss=train_loss,
        split=training.train.evaluate_on,
        statistics="precise" if training.evaluator.precise else "ema",
        images_per_second=progress.images_per_second,
        ranks=[rank.model_dump() for rank in ranks],
        select_on=training.train.select_on,
        selection=network.selection,
        force=True,
    )
    if training.hook:
        training.hook("after_evaluation", step=progress.step)
    _publish(training, _end_with_selected(training) or network.predictions)


def _end_with_selected(training: Training) -> Predictions | None:
    """Once no step is left at all, take the network that was selected, if it is not the last one.

    Returns
    -------
    Its predictions, on rank 0; None on others, and where the training ends with its last network
    """
    state, selected = training.state, training.state.selected
    if not training.complete or selected is None or selected.step == state.progress.step:
        return None
    found = training.evaluator.run_selected(selected)
    state.evaluated_state = found.state
    state.progress.selected_step, state.progress.recall = selected.step, list(found.evaluation.recall)
    return found.predictions


def _publish(training: Training, predictions: Predictions | None) -> None:
    """Before the last checkpoint: a training that has one has its predictions too."""
    if predictions is not None:
        write(training.predictions_path, predictions)


def _restore_predictions(training: Training) -> None:
    """A training that had ended, and whose predictions are gone, evaluates the network that it ended with again."""
    if training.ended and not training.worker.gather(storage.exists(training.predictions_path))[0]:
        training.worker.status.enter("evaluation")
        if training.state.progress.selected_step is None:
            _publish(training, training.evaluator.run(collect=True).predictions)
        else:
            _publish(training, _end_with_selected(training))


def _result(training: Training) -> TrainResult:
    worker, progress = training.worker, training.state.progress
    final = progress.final_point
    return TrainResult(
        best_accuracy=max(point.accuracy for point in progress.curve),
        final_accuracy=final.accuracy,
        final_balanced_accuracy=final.balanced_accuracy,
        final_macro_f1=final.macro_f1,
        final_loss=final.loss,
        final_calibration_error=final.calibration_error,
        steps=progress.step,
        images_per_second=progress.images_per_second,
        data_wait_share=progress.data_wait_share,
        diverged=progress.diverged,
        curve=tuple(progress.curve),
        recall=tuple(progress.recall),
        train_loss=tuple(progress.train_loss),
        train_seconds=tuple(progress.train_seconds),
        checkpoint=worker.gather(training.checkpoints.path)[0],
        predictions=training.predictions_path,
        world_size=worker.world_size,
        attempts=worker.attempt,
        selected_step=progress.selected_step,
        ranks=tuple(training.step.times.totals()),
        versions=current_versions(),
        notes=training.notes,
    )
