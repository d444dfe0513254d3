"""One training as the Spark driver sees it: `doctor` looks whether a training can run here.

It is imported at once, since the module that defines it has the same name; what is heavy, that module imports late.
"""

from pipeline.driver.doctor import DoctorResult, Finding, doctor

__all__ = ["DoctorResult", "Finding", "doctor"]
