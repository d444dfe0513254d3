"""Settings of a network: which one it is, what it takes, and how it is normalized."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.frozen import FiniteModel
from pipeline.config.import_path import NetworkName, Options


class ModelSettings(FiniteModel):
    """The network is built from these settings, its normalization included."""

    network: NetworkName = Field("cnn", description="name in `models.NETWORKS`, or package.module:function of your own")
    options: Options = Field(default_factory=dict, description="what a function of your own gets, by keyword")
    input_size: int | None = Field(
        None,
        ge=1,
        description="height and width of the square images that it takes: the centre of larger stored ones is cut out, "
        "by the network itself, also where it is served; null: as they are stored",
    )
    centre_crop: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of a stored image's shorter side that this centre has, resized to input_size: 0.875 is the "
        "usual one; null: input_size pixels, without resizing",
    )
    norm: str = Field("batch", description="name in `models.NORMS`; keep: a network of your own stays as it is")
    depth: int = Field(3, ge=1, description="layers; each network of models/networks/ says which numbers it takes")
    width: int = Field(16, ge=1, description="channels of the first stage, or features of a vector")
    widen: int = Field(1, ge=1, description="wide_resnet: factor k on the channels of the three stages")
    block: Literal["basic", "bottleneck"] = Field("basic", description="resnet: two 3x3 convolutions, or 1x1 3x3 1x1")
    cell: Literal["lstm", "gru"] = Field("lstm", description="recurrent: what reads an image row by row")
    patch: int = Field(4, ge=1, description="vit: side of the square patches, in pixels")
    heads: int = Field(4, ge=1, description="vit: attention heads; they divide the width")
    norm_place: Literal["pre", "post"] = Field("pre", description="vit: norm before each branch, or after each sum")
    activation: Literal["relu", "relu6", "sigmoid", "tanh", "gelu", "silu"] | None = Field(
        None,
        description="null: that of the paper: gelu in vit and convnext_tiny, relu6 in mobilenet_v2, relu in others",
    )
    init_scale: float = Field(1.0, gt=0, description="factor on the initial weights of convolutions and linear layers")
    zero_init: bool = Field(True, description="the last norm scale of each residual branch starts at 0, if learned")
    norm_statistics: Literal["rank", "lane", "world"] = Field(
        "rank",
        description="rows over which `batch` takes its statistics: those of a worker; of each lane (ghost batch norm, "
        "the same for any number of workers); or of all workers (synchronized)",
    )
    norm_groups: int = Field(8, ge=1, description="groups of the `group` and `weight_standardized_group` norms")
    norm_eps: float = Field(1e-5, gt=0, description="added to a variance before its square root is taken")
    norm_momentum: float = Field(
        0.1, gt=0, le=1, description="weight of the new batch in the running statistics (torch's sense)"
    )
    norm_scale: Literal["learned", "fixed", "off"] = Field(
        "learned", description="factor on each normalized channel; fixed: at norm_scale_init; off: none"
    )
    norm_shift: Literal["learned", "fixed", "off"] = Field(
        "learned", description="what is added to each normalized channel; fixed: at 0; off: nothing"
    )
    norm_scale_init: float = Field(1.0, description="initial value of the norms' scale")
    norm_r_max: float = Field(3.0, ge=1, description="batch_renorm: bound on r once training is under way")
    norm_d_max: float = Field(5.0, ge=0, description="batch_renorm: bound on d once training is under way")
    norm_warmup_steps: int | None = Field(
        None, ge=0, description="steps in which batch_renorm and power use the batch alone; null: 5000 and 4000"
    )
    weights: str | None = Field(
        None,
        min_length=1,
        description="file or fsspec URL of weights to start from: safetensors, a state dict that torch has saved, or "
        "a checkpoint of sparknorm; null: weights are drawn",
    )
    weights_sha256: str | None = Field(None, description="what the file must have as its SHA-256, 64 hex digits")
    freeze: tuple[str, ...] = Field(
        (),
        description="names of modules or parameters, with all in them, that are not trained: [conv1, layer1]; or none",
    )
    mean: Literal["imagenet"] | tuple[float, ...] | None = Field(
        None,
        description="what is subtracted from each channel, as a share of white; imagenet: what published weights "
        "expect; null: the mean of the training split",
    )
    std: Literal["imagenet"] | tuple[float, ...] | None = Field(
        None, description="what each channel is then divided by; null: the standard deviation of the training split"
    )

    @field_validator("weights_sha256")
    @classmethod
    def _is_a_digest(cls, text: str | None) -> str | None:
        digits = text and text.lower().removeprefix("sha256:")
        if digits is not None and not re.fullmatch("[0-9a-f]{64}", digits):
            raise ValueError(f"{text!r} is no SHA-256, which has 64 hex digits")
        return digits

    @field_validator("freeze", mode="before")
    @classmethod
    def _names_as_one_text(cls, value: Any) -> Any:
        """An arm of a comparison has its names as one text: ``conv1, layer1``, or ``none``."""
        if not isinstance(value, str):
            return value
        return () if value == "none" else tuple(part.strip() for part in value.split(","))

    @field_validator("freeze")
    @classmethod
    def _names_are_not_empty(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not all(names):
            raise ValueError("a name is empty: write those of the network's modules, such as layer1")
        return names

    @field_validator("std")
    @classmethod
    def _divisors_are_positive(cls, value: Any) -> Any:
        if isinstance(value, tuple) and not all(number > 0 for number in value):
            raise ValueError(f"{list(value)} divide the channels of images, and must be above 0")
        return value

    @model_validator(mode="after")
    def _centre_has_a_size(self) -> ModelSettings:
        if self.centre_crop is not None and self.input_size is None:
            raise ValueError(f"centre_crop {self.centre_crop:g} is resized to input_size, which is not set: set it too")
        return self

    def input_shape(self, stored: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape (C, H, W) of what the network takes, where a dataset stores images of the shape ``stored``.

        Raises
        ------
        ValueError
            Stored images are smaller than the centre that is cut out of them, or of the size that they are resized to.
        """
        if self.input_size is None:
            return stored
        if self.centre_crop is None and self.input_size > min(stored[1:]):
            raise ValueError(
                f"model.input_size {self.input_size} is larger than stored images, {stored[1]} x {stored[2]}: "
                "ingest them with a larger dataset.image.shape, set a smaller size, or model.centre_crop, with which "
                "they are resized"
            )
        if self.centre_crop is not None and stored[1:] == (self.input_size, self.input_size):
            raise ValueError(
                f"model.centre_crop {self.centre_crop:g} cuts out of images that are larger than model.input_size "
                f"{self.input_size}, and stored ones have that size: set it to null, or ingest larger images "
                "(dataset.image.shape)"
            )
        return stored[0], self.input_size, self.input_size
