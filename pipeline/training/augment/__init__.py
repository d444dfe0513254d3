"""Random changes to a batch of training images, on the device.

The draws depend on (seed, step) and on a row's place in the global batch alone, and what follows from them is computed
exactly: any number of workers sees the same images, and a resumed run goes on with the same ones. Images are uint8
before and after each change, rounded to the nearest value.
"""

from pipeline.training.augment.images import augment
from pipeline.training.augment.mixing import mix

__all__ = ["augment", "mix"]
