"""One training as the Spark driver sees it: `train` trains one network, `doctor` says whether a training can run here.

The modules that define the two have the same names, so they are imported at once; what is heavy is imported later.
"""

from pipeline.driver.doctor import DoctorResult, Finding, doctor
from pipeline.driver.train import train, training_name

__all__ = ["DoctorResult", "Finding", "doctor", "train", "training_name"]
