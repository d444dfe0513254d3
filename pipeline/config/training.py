"""Settings of one training: how a network is trained, observed and saved."""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config import weights_text
from pipeline.config.augment import AugmentSettings
from pipeline.config.frozen import FrozenModel
from pipeline.config.optimizer import OptimizerSettings
from pipeline.config.or_auto import AUTO, OrAuto
from pipeline.config.seeds import LAST_SEED

# Which evaluation gives the network that a training ends with; those but the last by a split that does not judge.
FinalNetwork = Literal["last", "lowest_loss", "highest_accuracy", "highest_balanced_accuracy"]

# What happens with a checkpoint or a finished training that other versions of the packages have made.
OtherVersions = Literal["warn", "refuse"]

# Images of one step for each worker where neither rank_batch_size nor batch_size is set.
RANK_BATCH_SIZE = 128


class DiagnosticsSettings(FrozenModel):
    """Diagnostics observe the network while it trains. They change no result, and cost nothing where they are off."""

    every_steps: int | None = Field(None, ge=1, description="optimizer steps between two observations; null: off")
    smoothness: bool = Field(
        False,
        description="also measure the loss along the gradient: five passes forward and back, not one forward",
    )
    evaluation_batches: int = Field(
        1, ge=1, description="batches of an evaluation that norm statistics are compared with, per worker"
    )


class TrainSettings(OptimizerSettings):
    """The network is trained in this way."""

    seed: int = Field(
        0, ge=0, le=LAST_SEED, description="seed of the initial weights, the order of rows and augmentation"
    )
    epochs: OrAuto[Annotated[int, Field(ge=1)]] = Field(
        4, description="passes over the training split; auto: 20, or up to 60 where that takes 1,500 steps"
    )
    rank_batch_size: int | None = Field(
        None, ge=1, description="images of one step for each worker, held when workers.count changes; 128 by default"
    )
    batch_size: OrAuto[Annotated[int | None, Field(ge=1)]] = Field(
        None,
        description="images of one step over all workers, the global batch, instead of rank_batch_size; auto: the "
        "largest of 256, 128, 64, 32 that leaves 50 steps an epoch",
    )
    lanes: int = Field(16, ge=1, description="fixed parts of every epoch; the number of workers divides it")
    shuffle_row_groups: int = Field(4, ge=1, description="rows are shuffled over windows of this many row groups")
    warmup_epochs: OrAuto[Annotated[float, Field(ge=0)]] = Field(
        0.5, description="epochs of linear warm-up (not of one_cycle); auto: a twentieth of the epochs"
    )
    first_cycle_epochs: float | None = Field(
        None,
        gt=0,
        description="warm restarts: epochs of the schedule's first cycle; each next one is twice as long, the last "
        "ends with the training, and warm-up is at most half of a cycle; null: one schedule over all epochs",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of a label that is spread evenly over all classes (Szegedy et al. 2016)"
    )
    class_weights: Literal["none", "balanced"] | dict[str, float] = Field(
        "none",
        description="weights of the classes in the training loss; balanced: one over a class's share of the training "
        "split; or weights by name ({shirt: 2}, also in a list for `compare`), 1 for other classes; all scaled to a "
        "mean of 1 over the images trained on",
    )
    sampling: Literal["shuffled", "balanced"] = Field(
        "shuffled",
        description="shuffled: every image once an epoch, but for a rest of less than a batch; balanced: as many of "
        "each class, those of small classes several times and of large ones in turns",
    )
    weight_ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, which is evaluated and kept; null: none"
    )
    evaluation_statistics: Literal["ema", "precise"] = Field(
        "ema",
        description="of batch norm and its kin; ema: the running statistics of all workers together; precise: computed "
        "anew over precise_batches (always so for weight_ema)",
    )
    precise_batches: int = Field(50, ge=1, description="training batches that precise statistics are computed over")
    augment: AugmentSettings = AugmentSettings()
    diagnostics: DiagnosticsSettings = DiagnosticsSettings()
    evaluate_on: str = Field("test", description="split that is evaluated during and after training")
    evaluations_per_epoch: int = Field(1, ge=1, description="evaluations in an epoch, the last at its end")
    final_network: FinalNetwork = Field(
        "last",
        description="the network that a training ends with, is judged by and keeps: last, or that of the evaluation "
        "with the lowest_loss, the highest_accuracy or the highest_balanced_accuracy on select_on, the first of equals",
    )
    select_on: str = Field(
        "validation", description="split that chooses it, evaluated as often; never the one that is evaluated_on"
    )
    evaluation_batch_size: int = Field(500, ge=1, description="images in a forward pass of evaluation, per worker")
    bf16: bool = Field(False, description="autocast the forward pass to bfloat16")
    tf32: bool = Field(
        True, description="GPUs round the factors of float32 products to TensorFloat-32, several times as fast"
    )
    deterministic: bool = Field(
        False, description="GPUs compute with kernels that give the same bits every time, slower; CPUs always do"
    )
    channels_last: bool = Field(True, description="NHWC memory layout")
    compile: bool = Field(False, description="torch.compile; workers need a compiler: of C++ on CPU, of C on a GPU")
    cuda_graphs: bool = Field(
        False,
        description="record forward and backward pass and update as CUDA graphs, for small batches, whose kernels take "
        "less time than launching them; for one worker; does nothing on CPU",
    )
    accumulate: int = Field(
        1, ge=1, description="parts of a worker's batch that are computed one after the other, to save memory"
    )
    gradient_checkpointing: bool = Field(
        False,
        description="blocks of the network keep their inputs alone and are computed again in the backward pass, to "
        "save memory (Chen et al. 2016); the result is the same",
    )
    gradient_compression: Literal["none", "bf16"] = Field(
        "none", description="bf16: workers exchange gradients in half the bytes, rounded to bfloat16"
    )
    log_every_steps: int = Field(1, ge=1, description="steps of which one is logged: loss and learning rate")
    on_divergence: Literal["mark", "fail"] = Field(
        "mark", description="a loss that is not finite ends the run; mark: as diverged, and a comparison goes on; fail"
    )

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weights_are_known(cls, value: Any) -> Any:
        """Class names may look like numbers in YAML; a weight is a finite number of at least 0.

        An arm of a comparison has its weights as one text.
        """
        shown, value = value, (weights_text.read(value) or value) if isinstance(value, str) else value
        if isinstance(value, dict) and value:
            twice = [name for name, count in Counter(map(str, value)).items() if count > 1]
            if twice:
                raise ValueError(f"{shown!r} names the class {twice[0]} twice: give it one weight")
            numbers = [
                weight
                for weight in value.values()
                if isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 <= weight < math.inf
            ]
            if len(numbers) == len(value) and any(numbers):
                return {str(name): float(weight) for name, weight in value.items()}
        elif value in ("none", "balanced"):
            return value
        raise ValueError(
            f"{shown!r} is neither none, balanced, nor a mapping of class names to weights of at least 0, such as "
            "{shirt: 2, coat: 1.5}"
        )

    @model_validator(mode="after")
    def _no_split_chooses_and_judges(self) -> TrainSettings:
        if self.final_network != "last" and self.select_on == self.evaluate_on:
            raise ValueError(
                f"select_on and evaluate_on are both {self.select_on!r}: a network that is chosen on the split that "
                "judges it seems better than it is; use two splits, or final_network last"
            )
        return self

    @model_validator(mode="after")
    def _classes_are_balanced_once(self) -> TrainSettings:
        if self.sampling == self.class_weights == "balanced":
            raise ValueError(
                "class_weights balanced and sampling balanced each balance the classes alone: set one of the two"
            )
        return self

    @model_validator(mode="after")
    def _batch_is_cut_into_lanes(self) -> TrainSettings:
        if self.batch_size == AUTO:
            if self.rank_batch_size is not None:
                raise ValueError(
                    f"batch_size auto and rank_batch_size {self.rank_batch_size} both say how large a batch is: set one"
                )
        elif self.batch_size is not None and self.batch_size % self.lanes:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of lanes {self.lanes}: "
                f"use {max(1, round(self.batch_size / self.lanes)) * self.lanes}, or other lanes"
            )
        return self

    @model_validator(mode="after")
    def _recorded_passes_are_whole(self) -> TrainSettings:
        if self.cuda_graphs and self.accumulate > 1:
            raise ValueError(
                f"cuda_graphs is for batches that are computed at once, and accumulate is {self.accumulate}: set it to "
                "1, or cuda_graphs to false"
            )
        return self

    @model_validator(mode="after")
    def _recomputed_passes_are_plain(self) -> TrainSettings:
        for name in ("cuda_graphs", "compile"):
            if self.gradient_checkpointing and getattr(self, name):
                why = (
                    "is for small batches, which need no memory saved"
                    if name == "cuda_graphs"
                    else "chooses itself what is computed again"
                )
                raise ValueError(f"gradient_checkpointing and {name}, which {why}: set one of the two to false")
        return self

    @model_validator(mode="after")
    def _first_cycle_fits(self) -> TrainSettings:
        if self.first_cycle_epochs is None or self.epochs == AUTO:
            return self
        if self.first_cycle_epochs > self.epochs:
            raise ValueError(
                f"first_cycle_epochs {self.first_cycle_epochs:g} is more than epochs {self.epochs}: "
                "use fewer, or null for one schedule over all epochs"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainSettings:
        is_ignored = self.schedule == "one_cycle" or self.first_cycle_epochs is not None
        if is_ignored or AUTO in (self.epochs, self.warmup_epochs):
            return self
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} is more than epochs {self.epochs}: learning_rate would never be "
                "reached; use fewer, such as auto"
            )
        return self

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """The numbers of workers that can train with these lanes are the divisors of ``lanes``, ascending."""
        return divisors(self.lanes)

    def allows(self, count: int, norm_statistics: str) -> bool:
        """Return whether so many workers can train with these lanes, in the parts that ``accumulate`` asks for.

        Parameters
        ----------
        norm_statistics : the setting of the model
        """
        if count not in self.world_sizes:
            return False
        return norm_statistics != "lane" or self.lanes // count % self.accumulate == 0

    @property
    def global_batch(self) -> int:
        """The number of images of one step over all workers; it is known once `for_workers` was called."""
        if self.batch_size is None:
            raise ValueError("the number of workers is not known yet: call for_workers")
        if self.batch_size == AUTO:
            raise ValueError("train.batch_size is auto, and the dataset is not known yet: call auto.resolve")
        return self.batch_size

    def for_workers(self, count: int) -> TrainSettings:
        """Return these settings with their batch size, whichever way it was given, for so many workers.

        Parameters
        ----------
        count : number of workers

        Raises
        ------
        ValueError
            The two ways disagree, the batch cannot be cut into lanes, or the settings are for one worker.
        """
        if self.cuda_graphs and count > 1:
            raise ValueError(
                f"train.cuda_graphs is for one worker, whose passes wait for no other, and there are {count}: set it "
                "to false"
            )
        if self.rank_batch_size is None and self.batch_size is not None:
            return self
        rows = self.rank_batch_size or RANK_BATCH_SIZE
        if self.batch_size not in (None, rows * count):
            raise ValueError(
                f"batch_size {self.batch_size} is not rank_batch_size {rows} x {count} workers: set one of the two"
            )
        if rows * count % self.lanes:
            unit = self.lanes // math.gcd(self.lanes, count)
            raise ValueError(
                f"rank_batch_size {rows} x {count} workers is not a multiple of lanes {self.lanes}: use "
                f"{max(1, round(rows / unit)) * unit}, or other lanes"
            )
        return self.model_copy(update={"rank_batch_size": rows, "batch_size": rows * count})


def divisors(number: int) -> tuple[int, ...]:
    """Return the numbers that divide a number of at least 1, ascending."""
    return tuple(size for size in range(1, number + 1) if number % size == 0)


class CheckpointSettings(FrozenModel):
    """The state of a training is saved this often, and at the end of every epoch, while the training goes on."""

    every_steps: int | None = Field(None, ge=1, description="optimizer steps between two checkpoints; null: by time")
    every_seconds: float = Field(60, gt=0, description="seconds between two checkpoints, where every_steps is null")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")
    other_versions: OtherVersions = Field(
        "warn",
        description="where another version of sparknorm or torch has made the checkpoint that a training goes on from, "
        "or the finished trial that a study takes; refuse: an error",
    )
