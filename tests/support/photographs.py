"""A folder of photographs with splits, as a camera and the web leave them, of real ones that a machine has.

Each class is one photograph, or a family of them: training images are parts of the left of it, and images that are
evaluated parts of the right, in many sizes and all the ways in which pictures come.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

# Of Debian's package of this name; there are 12 photographs among them.
PACKAGE = "mate-backgrounds"
BACKGROUNDS = Path("/usr/share/backgrounds/mate")
_OF_PACKAGE = {
    "dune": "nature/Dune.jpg",
    "flower": "nature/FreshFlower.jpg",
    "garden": "nature/Garden.jpg",
    "meadow": "nature/GreenMeadow.jpg",
    "rain": "nature/RainDrops.jpg",
    "wood": "nature/Wood.jpg",
}
_TURNED = 0x0112  # EXIF's orientation
# How to turn an image so that, shown as its orientation of 1 to 8 says, it stands upright.
_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def photographs(*, of_package: bool) -> dict[str, Image.Image]:
    """Photographs by the name of their class: scikit-learn's two, and six of the package."""
    found = dict(zip(("temple", "dahlia"), map(Image.fromarray, load_sample_images().images), strict=True))
    if of_package:
        for name, path in _OF_PACKAGE.items():
            found[name] = Image.open(BACKGROUNDS / path).convert("RGB")
            found[name].thumbnail((2000, 2000))
    return found


def write_folder(folder: Path, *, of_package: bool, train: int, validation: int, seed: int = 0) -> int:
    """Write ``train/CLASS/*`` and ``val/CLASS/*``, so many of each class, and return the number of files."""
    random, count = np.random.default_rng(seed), 0
    for name, photograph in photographs(of_package=of_package).items():
        for split, number in (("train", train), ("val", validation)):
            target = folder / split / name
            target.mkdir(parents=True)
            for index, part in zip(range(number), _parts(photograph, split == "train", random), strict=False):
                _save(part, target / f"{index:04d}", index)
                count += 1
    return count


def _parts(photograph: Image.Image, left: bool, random: np.random.Generator) -> Iterator[Image.Image]:
    """Parts of the left 65% of a photograph, or of the right 35%, without end: 150 to 700 pixels wide and high."""
    width, height = photograph.size
    first, end = (0, int(0.65 * width)) if left else (int(0.65 * width), width)
    while True:
        wide, high = (int(random.integers(150, min(700, most))) for most in (end - first, height))
        x, y = int(random.integers(first, end - wide + 1)), int(random.integers(0, height - high + 1))
        yield photograph.crop((x, y, x + wide, y + high))


def _save(image: Image.Image, path: Path, number: int) -> None:
    """JPEG, of which some are turned (EXIF), CMYK or grey, every third file another format, also 16 bits or alpha."""
    kind = number % 9
    if kind == 2:
        image.save(path.with_suffix(".webp"), quality=90)
    elif kind == 5:
        image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda value: 128 + value // 2))
        image.save(path.with_suffix(".png"))
    elif kind == 8:
        grey = np.asarray(image.convert("L"), np.uint16) * 257
        Image.fromarray(grey).save(path.with_suffix(".png"))
    elif kind == 3:
        image.convert("CMYK").save(path.with_suffix(".jpg"), quality=90)
    elif kind == 6:
        image.convert("L").save(path.with_suffix(".jpg"), quality=90)
    elif kind in (1, 4, 7):
        turned = 2 + number // 3 % 7
        exif = Image.Exif()
        exif[_TURNED] = turned
        image.transpose(_BACK[turned]).save(path.with_suffix(".jpg"), quality=90, exif=exif)
    else:
        image.save(path.with_suffix(".JPEG"), quality=90)
