"""The network that a training has left in its newest checkpoint."""

import numpy as np
import pyarrow.parquet as pq
import torch

from pipeline import storage
from pipeline.data import load_manifest
from pipeline.training import checkpoint
from pipeline.training.job import Job, identity
from pipeline.training.network import network_for
from pipeline.training.predictions import Predictions


def weights_after(job: Job) -> dict[str, torch.Tensor]:
    """Its weights and statistics, by name."""
    state = checkpoint.load_newest(
        storage.join(job.folder, "checkpoints"), identity=identity(job), device=torch.device("cpu")
    )
    assert state is not None, f"{job.folder} has no checkpoint"
    return state["model"]


def evaluated_directly(job: Job) -> Predictions:
    """It on the whole evaluated split at once, from the dataset's files, by id."""
    manifest = load_manifest(job.dataset)
    network = network_for(job.model, manifest).eval()
    network.load_state_dict(weights_after(job))
    split = manifest.split(job.train.evaluate_on)
    table = pq.read_table([f"{job.dataset}/{shard.path}" for shard in split.shards]).sort_by("id")
    images = np.stack([np.frombuffer(image, np.uint8) for image in table["image"].to_pylist()])
    with torch.inference_mode():
        logits = network(torch.from_numpy(images.reshape(-1, *manifest.image.shape).copy()))
        logs = logits.double().log_softmax(1).numpy()  # of a probability that is 0 in float32, too
    labels = table["label"].to_numpy()
    return Predictions(
        table["id"].to_numpy(), labels, logs.argmax(1), np.exp(logs.max(1)), -logs[np.arange(len(labels)), labels],
    )  # fmt: skip
