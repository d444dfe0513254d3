"""Settings of the optimizer: which one takes the steps, how large they are, and what holds gradients within bounds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.frozen import FiniteModel

Optimizer = Literal["sgd", "adamw", "lars", "lamb"]


class OptimizerSettings(FiniteModel):
    """Gradients become steps in this way. The settings belong to `TrainSettings`, and are named ``train.optimizer``."""

    optimizer: Optimizer = Field(
        "sgd",
        description="sgd: with Nesterov momentum; adamw: Adam with decoupled weight decay; lars and lamb: momentum and "
        "Adam whose steps are as long as each layer's weights allow, for large batches",
    )
    learning_rate: float = Field(
        0.1,
        gt=0,
        description="peak learning rate of the schedule; each optimizer wants another: about 0.1 for sgd, 0.001 for "
        "adamw, several for lars, 0.002 for lamb",
    )
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak learning rate of the head, the last layer, with the same schedule and scaling; null: that "
        "of the others",
    )
    base_batch_size: int | None = Field(
        None,
        ge=1,
        description="the global batch that learning_rate is for: at another it is scaled in proportion, and warm-up "
        "begins at the unscaled rate; null: not scaled",
    )
    schedule: Literal["cosine", "linear", "constant", "one_cycle"] = Field(
        "cosine", description="after warm-up; one_cycle has a rise of its own, and cycles momentum the other way"
    )
    momentum: float = Field(
        0.9, ge=0, lt=1, description="Nesterov momentum of sgd, momentum of lars, beta1 of adamw and lamb"
    )
    beta2: float = Field(
        0.999, ge=0, lt=1, description="adamw, lamb: decay of the mean of squared gradients, the old value's weight"
    )
    optimizer_eps: float | None = Field(
        None, gt=0, description="adamw, lamb: added to the root of that mean; null: 1e-8 and 1e-6, as in their papers"
    )
    trust_coefficient: float = Field(
        0.001, gt=0, description="lars: length of a layer's step at rate 1, as a share of the length of its weights"
    )
    weight_decay: float = Field(5e-4, ge=0, description="weight decay, not applied to norm parameters and biases")
    clip_norm: float | None = Field(
        None, gt=0, description="gradients are scaled down where all together are longer than this; null: never"
    )
    clip_adaptive: float | None = Field(
        None,
        gt=0,
        description="the gradient of each unit is at most this share of the length of its weights, but for the head's "
        "(adaptive gradient clipping, 0.01 in the paper); null: never",
    )

    @model_validator(mode="after")
    def _gradients_are_clipped_once(self) -> OptimizerSettings:
        if self.clip_norm is not None and self.clip_adaptive is not None:
            raise ValueError(
                f"clip_norm {self.clip_norm:g} and clip_adaptive {self.clip_adaptive:g} each bound the gradients: set "
                "one of the two"
            )
        return self
