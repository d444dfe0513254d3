"""Networks and normalizations by name. The code here runs on a single device and knows no ranks and no Spark."""

from models.build import NETWORKS, build_model
from models.fold import fold
from models.norms.registry import NORMS
from models.swap import Swapped, with_norm

__all__ = ["NETWORKS", "NORMS", "Swapped", "build_model", "fold", "with_norm"]
