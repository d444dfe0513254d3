"""What `score` leaves: the content of ``score.json``."""

from __future__ import annotations

from pipeline.config.frozen import FrozenModel
from pipeline.report.drift import Drift
from pipeline.serving.scoring.scores import ScoredModel


class ScoreResult(FrozenModel):
    """What ``score.json`` holds.

    scores : folder of the scores
    table : of Spark's catalog that has them too, if any
    written : False where these images had been scored by this model before, or none is new
    version : of the scores
    model : that scored
    classes : in the order of the probabilities
    images : scored by this version
    already_there : images of the source that earlier versions have
    set_aside : images of this version in quarantine, by reason
    class_counts : images of this version by the class of the largest probability
    parts : files of this version, and how many of them a job before this one, which died, had published
    seconds : that the Spark job took
    processes : Python workers that scored
    model_loads : how often one of them loaded the model
    mlflow_run : id of the run
    drift : what has moved from the reference; null where nothing was compared
    notes : what was not compared, and why
    """

    scores: str
    table: str | None
    written: bool
    version: int
    model: ScoredModel
    classes: tuple[str, ...]
    images: int
    already_there: int
    set_aside: dict[str, int]
    class_counts: tuple[int, ...]
    parts: int
    parts_found: int
    seconds: float
    processes: int
    model_loads: int
    mlflow_run: str
    drift: Drift | None
    notes: tuple[str, ...]
