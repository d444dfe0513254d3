"""The one training loop. No Spark, no MLflow: `fit` needs a `Worker` and a `Job`, nothing else.

By hand, in a world of one::

    fit(alone(), Job(dataset="runs/datasets/fashion_mnist", folder="runs/by-hand",
                     model=ModelSettings(), train=TrainSettings()))
"""

from __future__ import annotations

from pipeline import storage
from pipeline.distributed.worker import Worker
from pipeline.training.assembly import Training, assemble
from pipeline.training.job import Job
from pipeline.training.predictions import Predictions, write
from pipeline.training.result import EvaluationPoint, TrainResult


def fit(worker: Worker, job: Job) -> TrainResult:
    """Train to the end, evaluating and checkpointing on the way. Every rank calls it and gets the same result.

    A job that finds checkpoints of its own in its folder goes on from the newest.

    Raises
    ------
    ValueError
        Settings and dataset do not fit each other, or the checkpoints in the folder belong to another run.
    DivergedError
        The loss was not finite and ``train.on_divergence`` is ``fail``.
    OSError
        The last checkpoint, or the predictions, could not be written.
    """
    with assemble(worker, job) as training:
        training.step.warm_up()
        training.checkpoints.restore()
        progress = training.state.progress
        _emit_start(training)
        _restore_predictions(training)
        with training.loader.batches(progress.step) as batches:
            while not training.ended:
                save = training.step.take(batches)
                if progress.diverged or training.evaluator.is_due(progress.step):
                    _evaluate(training)
                if progress.diverged or save or progress.step % training.steps_per_epoch == 0:
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
        total_steps=training.total_steps,
        epochs=training.train.epochs,
        force=True,
    )


def _evaluate(training: Training) -> None:
    """Add an evaluation to the progress, and emit it with what each rank spent its time on since the one before."""
    worker, state, progress = training.worker, training.state, training.state.progress
    worker.status.enter("evaluation")
    with training.diagnostics.evaluation(progress.step):
        evaluation, state.evaluated_state, predictions = training.evaluator.run(collect=training.ended)
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
        force=True,
    )
    if training.hook:
        training.hook("after_evaluation", step=progress.step)
    _publish(training, predictions)


def _publish(training: Training, predictions: Predictions | None) -> None:
    """Before the last checkpoint: a training that has one has its predictions too."""
    if predictions is not None:
        write(training.predictions_path, predictions)


def _restore_predictions(training: Training) -> None:
    """A training that had ended, and whose predictions are gone, evaluates its last state again."""
    if training.ended and not training.worker.gather(storage.exists(training.predictions_path))[0]:
        training.worker.status.enter("evaluation")
        _publish(training, training.evaluator.run(collect=True).predictions)


def _result(training: Training) -> TrainResult:
    worker, progress = training.worker, training.state.progress
    last = progress.curve[-1]
    return TrainResult(
        best_accuracy=max(point.accuracy for point in progress.curve),
        final_accuracy=last.accuracy,
        final_balanced_accuracy=last.balanced_accuracy,
        final_macro_f1=last.macro_f1,
        final_loss=last.loss,
        final_calibration_error=last.calibration_error,
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
        ranks=tuple(training.step.times.totals()),
    )
