"""Scores on disk: the parts that tasks publish, what lists them, and the plan that a job that died leaves.

```
<folder>/scores.json                  published last: without it there are no scores; a copy of the newest version
<folder>/scores-000N.json             every version
<folder>/scores/part-*.parquet        id, class, probabilities, origin, model, score_version
<folder>/quarantine/part-*.parquet    what was set aside: id, origin, reason
<folder>/plan.json                    what the job that runs, or died, is about
```
A part is there whole, under a name that follows from what is scored with which model. It says in its own metadata what
it holds, so that a job that is run again counts it and does not score it anew.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline import storage
from pipeline.config.frozen import FrozenModel
from pipeline.config.settings import digest_of
from pipeline.data.profile import Profile
from pipeline.serving.scoring.errors import ScoreError
from pipeline.storage.lease import numbers

log = logging.getLogger(__name__)

FORMAT = 1
FILE, PLAN, PARTS, QUARANTINE = "scores.json", "plan.json", "scores", "quarantine"
# The key of a part's own record in the metadata of its Parquet file.
RECORD_KEY = b"sparknorm.part"
_VERSION = re.compile(r"scores-(\d{4,})\.json")
_PART_NAME = re.compile(r"part-[0-9a-f]{12}-\d{5,}\.parquet")
_READERS = 8


class ScoredModel(FrozenModel):
    """The model that scored.

    uri : as the settings name it
    name, version : of the registered model, where it is one
    run_id : of the MLflow run that trained it
    digest : of its folder, "sha256:" and 64 hex digits
    dataset_digest : of what it was trained on
    """

    uri: str
    name: str
    version: str
    run_id: str
    digest: str
    dataset_digest: str

    def __str__(self) -> str:
        """As the column ``model`` has it."""
        return f"{self.name}/{self.version}"


class ScoredSource(FrozenModel):
    """A source whose images one version has scored.

    fingerprint, state : as `pipeline.ingest.sources.source.Source` has them
    rows : images that it had
    already_there : how many of them an earlier version has
    shards : of a dataset, those that were read
    """

    kind: str
    path: str
    fingerprint: str
    state: str
    rows: int
    already_there: int = 0
    shards: tuple[str, ...] = ()


class Part(FrozenModel):
    """A file of scores: its path in the folder, and its rows."""

    path: str
    rows: int


class PartRecord(FrozenModel):
    """What the metadata of a part say.

    number : of the part
    path, rows : of its file
    quarantine : path of the file of what was set aside of it; empty without such
    set_aside : images by the reason
    profile : of the images that were scored
    """

    number: int
    path: str
    rows: int
    quarantine: str
    set_aside: dict[str, int]
    profile: Profile


class Plan(FrozenModel):
    """What a job is about, written before it begins.

    digest : of the images, the model, and the version that is added to
    parts : into which the images are cut
    run_mark : tag of its MLflow run, written down before the run is opened
    mlflow_run : id of its run, once that is open
    """

    digest: str
    parts: int
    run_mark: str | None = None
    mlflow_run: str | None = None

    @property
    def prefix(self) -> str:
        """What the names of the parts begin with."""
        return f"part-{self.digest.removeprefix('sha256:')[:12]}"


class Scores(FrozenModel):
    """What ``scores.json`` holds.

    version : counts what was appended; ``previous`` is the digest before it
    digest : of all but itself and the Spark application's id
    models, sources : of each version
    classes : in the order of the probabilities
    input_rows : images of all sources, each counted once: those that were scored, and those set aside
    class_counts : scored images by the class of the largest probability
    """

    format: int = FORMAT
    version: int = 1
    previous: str | None = None
    digest: str = ""
    spark_application: str
    models: tuple[ScoredModel, ...]
    sources: tuple[ScoredSource, ...]
    plans: tuple[str, ...]
    classes: tuple[str, ...]
    input_rows: int
    scored: int
    set_aside: dict[str, int]
    class_counts: tuple[int, ...]
    parts: tuple[Part, ...]
    quarantine: tuple[str, ...]


def sealed(scores: Scores) -> Scores:
    """Check that no image was lost or doubled, and give the scores their digest.

    Raises
    ------
    ScoreError
        Images in are not those scored and those set aside, or parts hold other rows than were scored.
    """
    aside, in_parts = sum(scores.set_aside.values()), sum(part.rows for part in scores.parts)
    if scores.input_rows != scores.scored + aside or not scores.scored == in_parts == sum(scores.class_counts):
        raise ScoreError(
            f"images were lost or doubled: {scores.input_rows} came in, {scores.scored} were scored and {aside} set "
            f"aside; the parts hold {in_parts}: the source has changed while it was read; run this again"
        )
    content = scores.model_dump(mode="json", exclude={"digest": True, "spark_application": True})
    return scores.model_copy(update={"digest": digest_of(content)})


def of_version(
    before: Scores | None,
    records: Sequence[PartRecord],
    *,
    plan: Plan,
    model: ScoredModel,
    source: ScoredSource,
    classes: tuple[str, ...],
    application: str,
) -> Scores:
    """The scores with what the parts of one job add to the version before; checked, with their digest."""
    records = sorted(records, key=lambda record: record.number)
    aside = Counter(before.set_aside if before else {})
    counts = Counter(dict(enumerate(before.class_counts if before else ())))
    for record in records:
        aside.update(record.set_aside)
        counts.update(dict(enumerate(record.profile.classes)))
    parts = tuple(Part(path=record.path, rows=record.rows) for record in records)
    return sealed(
        Scores(
            version=before.version + 1 if before else 1,
            previous=before.digest if before else None,
            spark_application=application,
            models=(*(before.models if before else ()), model),
            sources=(*(before.sources if before else ()), source),
            plans=(*(before.plans if before else ()), plan.digest),
            classes=classes,
            input_rows=(before.input_rows if before else 0) + source.rows - source.already_there,
            scored=(before.scored if before else 0) + sum(record.rows for record in records),
            set_aside=dict(sorted(aside.items())),
            class_counts=tuple(counts[number] for number in range(len(classes))),
            parts=(*(before.parts if before else ()), *parts),
            quarantine=(
                *(before.quarantine if before else ()),
                *(record.quarantine for record in records if record.quarantine),
            ),
        )
    )


def newest(folder: str) -> Scores | None:
    """The newest version of the scores in a folder; None where there is none.

    Raises
    ------
    ScoreError
        What lists them is damaged, or of a later version of sparknorm.
    """
    found = [number for number in numbers(folder, _VERSION) if storage.size(_path(folder, number))]
    return _load(_path(folder, max(found))) if found else None


def load_scores(folder: str) -> Scores:
    """The newest version of the scores in a folder, as `score` has published it.

    Raises
    ------
    ScoreError
        There is none, or what lists them is damaged.
    """
    found = newest(storage.absolute(folder))
    if found is None:
        raise ScoreError(f"{folder}: no scores here ({FILE} is missing); run `score` first")
    return found


def publish(folder: str, scores: Scores) -> None:
    """Make a version of the scores exist.

    Raises
    ------
    ScoreError
        Another job has published this version.
    """
    path, text = _path(folder, scores.version), json.dumps(scores.model_dump(mode="json"), indent=1).encode()
    if not storage.create(path, text):
        if not storage.size(path):  # a job died while it made the file, on a disk without hard links
            storage.publish(path, text)
        elif _load(path).digest != scores.digest:
            raise ScoreError(f"version {scores.version} of {folder} was published by another job meanwhile")
    storage.publish(storage.join(folder, FILE), text)


def mend_copy(folder: str, found: Scores) -> None:
    """Let ``scores.json`` be the newest version, where a job died before it was."""
    path = storage.join(folder, FILE)
    text = json.dumps(found.model_dump(mode="json"), indent=1).encode()
    if not storage.exists(path) or storage.read_bytes(path) != text:
        storage.publish(path, text)


def read_plan(folder: str) -> Plan | None:
    """The plan of the last job that began in a folder; None without one that can be read."""
    try:
        return Plan.model_validate_json(storage.read_bytes(storage.join(folder, PLAN)))
    except (FileNotFoundError, ValidationError):
        return None


def done_parts(folder: str, plan: Plan) -> list[PartRecord]:
    """What the parts say that jobs with this plan have published."""
    names = [name for name in storage.names(storage.join(folder, PARTS)) if name.startswith(f"{plan.prefix}-")]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="sparknorm-parts") as pool:
        return list(pool.map(lambda name: _record_of(storage.join(folder, PARTS, name)), names))


def unlisted(folder: str, found: Scores | None, *, but: Plan | None = None) -> list[str]:
    """Paths, in the folder, of files that `score` has written and no version lists, and that are not of a plan."""
    listed = {*(part.path for part in found.parts), *found.quarantine} if found else set()
    written = (
        f"{place}/{name}"
        for place in (PARTS, QUARANTINE)
        for name in storage.names(storage.join(folder, place))
        if _PART_NAME.fullmatch(name) and not (but and name.startswith(f"{but.prefix}-"))
    )
    return [path for path in written if path not in listed]


def missing_part(folder: str, found: Scores | None) -> str | None:
    """The path, in the folder, of the first part that is listed and not there."""
    names = set(storage.names(storage.join(folder, PARTS))) if found else set()
    parts = found.parts if found else ()
    return next((part.path for part in parts if part.path.rpartition("/")[2] not in names), None)


def check_seen(folder: str, records: Iterable[PartRecord]) -> None:
    """Raise ScoreError where the driver does not see a part that an executor has published."""
    seen = set(storage.names(storage.join(folder, PARTS)))
    for record in records:
        if record.path.rpartition("/")[2] not in seen:
            raise ScoreError(
                f"an executor wrote {storage.join(folder, record.path)}, but the driver does not see it: set "
                "score.output to a place that the driver and all executors share"
            )


def _record_of(path: str) -> PartRecord:
    with storage.open_file(path) as file:
        metadata = pq.read_metadata(file).metadata or {}
    return PartRecord.model_validate_json(metadata[RECORD_KEY])


def _path(folder: str, version: int) -> str:
    return storage.join(folder, f"scores-{version:04d}.json")


def _load(path: str) -> Scores:
    try:
        found = Scores.model_validate_json(storage.read_bytes(path))
    except ValidationError as error:
        raise ScoreError(f"{path} is damaged, or of another version of sparknorm: {error.errors()[0]['msg']}") from None
    if found.format != FORMAT or sealed(found).digest != found.digest:
        raise ScoreError(
            f"{path} is damaged, or of another version of sparknorm: its digest is not that of its content"
        )
    return found
