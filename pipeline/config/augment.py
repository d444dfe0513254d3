"""Settings of augmentation: how training images are changed at random."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline.config.frozen import FiniteModel


class AugmentSettings(FiniteModel):
    """Training images are changed at random, on the device, in the same way for any number of workers."""

    crop_scale: float | None = Field(
        None,
        gt=0,
        le=1,
        description="random resized crop: smallest share of an image's area, of shares up to 1, that is cut out and "
        "resized to what the network takes, such as 0.08 (Szegedy et al. 2015); null: none",
    )
    crop_ratio: float = Field(
        4 / 3, ge=1, le=100, description="largest ratio of a crop's sides: of width to height, and of height to width"
    )
    flip: bool | Literal["alternating"] = Field(
        False,
        description="mirror left-right: true, or random: with probability one half; alternating: every second epoch, "
        "half of the images in even ones and the others in odd ones (Jordan 2024)",
    )
    shift: int = Field(0, ge=0, description="shift by up to this many pixels each way, zeros moving in")
    brightness: float = Field(
        0.0, ge=0, le=1, description="factor on the pixel values, from 1 - brightness to 1 + brightness"
    )
    contrast: float = Field(
        0.0, ge=0, le=1, description="factor on the distance from an image's mean grey, from 1 - contrast to 1 + it"
    )
    saturation: float = Field(
        0.0, ge=0, le=1, description="factor on the distance of colours from their grey, from 1 - saturation to 1 + it"
    )
    cutout: int = Field(0, ge=0, description="side of a square at a random place that gets the mean colour; 0: none")
    mixup: float = Field(
        0.0,
        ge=0,
        description="alpha of Beta(alpha, alpha), of which the weights of two blended images and of their labels are "
        "drawn (Zhang et al. 2018); 0: none",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        description="alpha of the same for the area of a rectangle that another image fills (Yun et al. 2019); "
        "0: none; with mixup, too, each image gets one of the two",
    )
    mix_probability: float = Field(1.0, ge=0, le=1, description="of an image to be mixed by mixup or cutmix")

    @field_validator("flip", mode="before")
    @classmethod
    def _random_is_true(cls, value: Any) -> Any:
        """What versions before `alternating` called true has two names and one value."""
        return True if value == "random" else value

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others, so that labels are shares of classes."""
        return bool((self.mixup or self.cutmix) and self.mix_probability)

    def check(self, *, image_shape: tuple[int, ...], lane_rows: int, reader: str) -> None:
        """Check that these changes can be made to the images of a training.

        Parameters
        ----------
        image_shape : (C, H, W) of the dataset's images
        lane_rows : rows of each lane in a global batch
        reader : `reader.kind`

        Raises
        ------
        ValueError
            They cannot; the message names the setting.
        """
        channels, shorter = image_shape[0], min(image_shape[1:])
        if self.shift >= shorter:
            raise ValueError(
                f"train.augment.shift {self.shift} can move images of {image_shape[1]} x {image_shape[2]} wholly out "
                f"of sight: use at most {shorter - 1}, and rather a few pixels"
            )
        if self.saturation and channels != 3:
            raise ValueError(
                f"train.augment.saturation {self.saturation:g} is for images in colour, and the dataset's have "
                f"{channels} channel: set it to 0"
            )
        if self.mixes and lane_rows < 2:
            name = "mixup" if self.mixup else "cutmix"
            raise ValueError(
                f"train.augment.{name} mixes images of one lane, so that they are the same for any number of workers, "
                "and a lane has one image of each batch: use fewer train.lanes, or a larger batch"
            )
        if self.flip == "alternating" and reader == "petastorm":
            raise ValueError(
                "train.augment.flip alternating needs reader.kind arrow, which gives each image with its id: "
                "Petastorm's batches have none here; or set it to true"
            )
