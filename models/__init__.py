"""Networks and normalizations by name. Code for a single device: no ranks, no Spark."""

from models.build import NETWORKS, build_model

__all__ = ["NETWORKS", "build_model"]
