"""What a training returns: `fit` on every rank, the driver's `train` with the MLflow run added, ``train.json``."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.frozen import FrozenModel


class EvaluationPoint(FrozenModel):
    """One evaluation in the middle or at the end of a training.

    step : optimizer steps done before it
    epoch : the same in epochs, a fraction within one
    accuracy : share of the split's rows whose largest logit is their label's
    loss : mean cross-entropy over the split, in nats; None where it is not finite
    balanced_accuracy : mean recall of the classes that the split has
    macro_f1 : mean F1 score of the classes that the split has or that were predicted
    calibration_error : expected difference between confidence and accuracy, over 15 bins of the confidence; None where
        a confidence is not finite
    """

    step: int
    epoch: float
    accuracy: float
    loss: float | None
    balanced_accuracy: float
    macro_f1: float
    calibration_error: float | None


class RankSeconds(FrozenModel):
    """What one rank spent the time of its optimizer steps on, in seconds.

    rank : 0 to world size - 1
    steps : optimizer steps that the seconds are of
    data_wait_seconds : waiting for the next batch
    compute_seconds : forward, backward and optimizer, without what the others are waited for
    all_reduce_seconds : from this rank's last gradient to the sum over all ranks
    """

    rank: int
    steps: int
    data_wait_seconds: float
    compute_seconds: float
    all_reduce_seconds: float


class TrainSummary(FrozenModel):
    """What a training has reached in single numbers, over all its attempts except where it says otherwise.

    best_accuracy : largest of the evaluations
    final_accuracy, final_balanced_accuracy, final_macro_f1, final_loss, final_calibration_error : of the network that
        the training ended with, as an `EvaluationPoint` has them: of the last evaluation, unless `selected_step` is set
    selected_step : optimizer steps before the evaluation whose network the training ended with, where
        ``train.final_network`` chose another than the last
    steps : optimizer steps done
    images_per_second : of the whole training, in a steady state; None before there was one
    data_wait_share : part of that time in which rank 0 waited for data, from 0 to 1; None as above
    diverged : whether it ended because the loss of a global batch was not finite
    world_size : ranks of the last attempt
    attempts : gangs that were started for this job
    """

    best_accuracy: float
    final_accuracy: float
    final_balanced_accuracy: float
    final_macro_f1: float
    final_loss: float | None
    final_calibration_error: float | None
    steps: int
    images_per_second: float | None
    data_wait_share: float | None
    diverged: bool
    world_size: int
    attempts: int
    selected_step: int | None = None


class TrainResult(TrainSummary):
    """What a training has reached, and how it came there. The same on every rank.

    curve : one point for each evaluation
    recall : of each class, by the network that the training ended with, in the order of the dataset's classes: the
        share of its images that were recognized; None of a class that the split does not have
    train_loss : mean loss of the steps since the evaluation before, one for each, with class weights where there are
        some; None where there were no steps
    train_seconds : seconds of all optimizer steps up to each evaluation
    checkpoint : path of the last one
    predictions : path of the file that holds, for each image, what the network that the training ended with has found
        (see `pipeline.training.predictions`); None where none was kept
    ranks : what each rank of the last attempt spent its time on
    versions : of sparknorm and torch in the last attempt, by package; empty of what 0.7.0 or earlier has trained
    notes : what of pretrained weights was left out or made anew, as sentences
    """

    curve: tuple[EvaluationPoint, ...]
    recall: tuple[float | None, ...]
    train_loss: tuple[float | None, ...]
    train_seconds: tuple[float, ...]
    checkpoint: str
    predictions: str | None = None
    ranks: tuple[RankSeconds, ...]
    versions: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


def describe(result: TrainResult) -> list[str]:
    """A line for each rank of a training: where the time of its steps went."""
    since = " since the last restart" if result.attempts > 1 else ""
    lines = []
    for rank in result.ranks:
        seconds = rank.data_wait_seconds + rank.compute_seconds + rank.all_reduce_seconds
        if not seconds:
            continue
        compute, data_wait = rank.compute_seconds / seconds, rank.data_wait_seconds / seconds
        parts = f"{compute:.0%} computing, {data_wait:.0%} waiting for data"
        if len(result.ranks) > 1:
            parts += f", {rank.all_reduce_seconds / seconds:.0%} for the other ranks"
        lines.append(f"rank {rank.rank}: {rank.steps:,} steps{since} in {seconds:.1f} s, {parts}")
    return lines
