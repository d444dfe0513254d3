"""What a training is asked to do, and what two of them must share to be the same."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config.dataset import ReaderSettings
from pipeline.config.identity import identity_of
from pipeline.config.import_path import is_import_path
from pipeline.config.model import ModelSettings
from pipeline.config.or_auto import AUTO
from pipeline.config.training import CheckpointSettings, TrainSettings
from pipeline.data import Manifest, load_manifest
from pipeline.training.output import AGAIN, OutputError, explain_output

if TYPE_CHECKING:
    from pipeline.training.hooks import Hook

TOKEN = "launch-token"

# Settings and digests that two trainings must share, as nested dicts of JSON values.
Identity = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What to train, on what, and where to. Its global batch stays the same when the number of workers changes.

    dataset : folder of an ingested dataset
    folder : where checkpoints and events go; a training that finds its checkpoints there goes on from the newest
    version : of the dataset; None is the newest
    token : what the driver wrote into the file `TOKEN` of the folder, by which every rank sees that it has the same one
    until_cycle : train to the end of this cycle of the schedule, 1 is the first (see `optimizer.cycle_ends`), with an
        evaluation and a checkpoint there; None is the last. No part of the identity: the same job with a later cycle
        goes on as if it had not stopped
    source : digest of the network's source as the driver has it, where `model.network` is an import path; every rank
        compares its own. Empty where nobody says
    weights_digest : SHA-256 of the file of `model.weights` as the driver has read it; every rank compares its own.
        Empty where there is none, or nobody says
    live : store each evaluation at once, however many there are: somebody decides by them whether it goes on. No part
        of the identity
    hook : called by every rank at the moments that `hooks` documents, for tests of faults; no part of the identity
    """

    dataset: str
    folder: str
    model: ModelSettings
    train: TrainSettings
    reader: ReaderSettings = field(default_factory=ReaderSettings)
    version: int | None = None
    token: str = ""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    until_cycle: int | None = None
    source: str = ""
    weights_digest: str = ""
    live: bool = field(default=False, compare=False)
    hook: Hook | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if undecided := [
            name for name in ("epochs", "batch_size", "warmup_epochs") if getattr(self.train, name) == AUTO
        ]:
            raise ValueError(
                f"train.{undecided[0]} is auto, which stands for a number only with a dataset: call auto.resolve"
            )
        if self.train.batch_size is not None:
            object.__setattr__(self, "train", self.train.model_copy(update={"rank_batch_size": None}))


def identity(job: Job, manifest: Manifest | None = None) -> Identity:
    """What two trainings must share for one to go on from the other's checkpoint.

    That is all that changes a result, but for the number of workers, which may change on the way, and the versions of
    the packages, of which `versions` warns.

    manifest : of the job's dataset, where it is loaded already
    """
    return {
        **source_identity(job.model.network),
        **weights_identity(job.model, digest=job.weights_digest),
        "model": identity_of("model", job.model, exclude={"weights", "weights_sha256"}),
        "train": identity_of("train", job.train, exclude={"on_divergence", "diagnostics", "log_every_steps"}),
        "reader": job.reader.kind,
        "dataset": (manifest or load_manifest(job.dataset, job.version)).digest,
    }


def source_identity(*networks: str) -> dict[str, str]:
    """The part of an identity that tells a network of one's own from what it was before its source was changed.

    Raises
    ------
    ValueError
        A network cannot be imported.
    """
    own = sorted(filter(is_import_path, networks))
    if not own:
        return {}
    from models.imported import source_digest

    return {f"source of model.network {network}": source_digest(network) for network in own}


def weights_identity(model: ModelSettings, *others: str | None, digest: str = "") -> dict[str, str]:
    """The part of an identity that tells weights from what they were before their file was replaced. Where the file
    lies is no part of it.

    Parameters
    ----------
    others : paths of other weights, as those of a study's arms
    digest : of the weights of ``model``, where it is known already

    Raises
    ------
    WeightsError
        There is no such file.
    """
    if model.weights is None and not any(others):
        return {}
    from pipeline.training.weights_file import digest_of

    parts = {"the content of model.weights": digest or digest_of(model)} if model.weights else {}
    arms = {path: model.model_copy(update={"weights": path, "weights_sha256": None}) for path in others if path}
    return parts | {f"the content of model.weights {path}": digest_of(arm) for path, arm in sorted(arms.items())}


def check_host(job: Job) -> None:
    """Check that this host can keep what the training writes; a launcher asks the first rank of each, after `facts`.

    Raises
    ------
    OutputError
        The job's folder cannot be written here, or its disk is full.
    ValueError
        A file in it cannot be replaced.
    """
    if not job.token:
        return
    probe = storage.join(job.folder, f"launch-{socket.gethostname()}-{os.getpid()}")
    with explain_output(job.folder):
        try:
            storage.check_replaces(probe, job.token)
        finally:
            storage.remove_file(probe)
    free = storage.free_bytes(job.folder)
    if free is not None and free < storage.LEAST_FREE_BYTES:
        raise OutputError(
            f"{job.folder} has {free >> 20} MiB left, and checkpoints may not fit: make room, or set `output` to "
            f"another place, {AGAIN}"
        )


def facts(job: Job) -> Identity:
    """What every rank must see alike before step one; a launcher compares the ranks'.

    Raises
    ------
    ValueError
        The job's folder is not the one that the driver sees; the network is imported from other source here than on the
        driver, or cannot be; or the weights to start from are not there.
    """
    if job.token:
        storage.check_seen(storage.join(job.folder, TOKEN), job.token, writer="the driver")
    if job.model.weights is not None:
        from pipeline.training.weights_file import check_there

        check_there(job.model.weights)
    if not is_import_path(job.model.network):
        return identity(job)
    from pipeline.training.own_network import check_source, network_facts

    check_source(job.model.network, job.source)
    manifest = load_manifest(job.dataset, job.version)
    return {**identity(job, manifest), **network_facts(job.model, manifest, seed=job.train.seed)}
