"""Networks and normalizations by name. The code here runs on a single device and knows no ranks and no Spark."""

from models.build import NETWORKS, build_model
from models.fold import fold
from models.norms.registry import NORMS

__all__ = ["NETWORKS", "NORMS", "build_model", "fold"]
