"""sparknorm: train batch-normalized CNNs inside the Spark cluster that already holds the data."""

__version__ = "0.7.0"
