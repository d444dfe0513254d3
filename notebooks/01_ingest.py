# Databricks notebook source
# MAGIC %md
# MAGIC # 1. Ingest
# MAGIC A Spark job checks, splits, shuffles and shards the images of a source into a dataset of plain Parquet files.
# MAGIC Running it again with the same input and settings changes nothing.
# MAGIC
# MAGIC On a cluster, set `dataset.path` and `output` in the overrides to folders that all nodes see, such as a Volume.

# COMMAND ----------

dbutils.widgets.text("config", "../conf/quickstart.yaml", "Settings file")
dbutils.widgets.text("overrides", "", "Overrides: section.key=value section.key=value")

# COMMAND ----------

import shlex

from pipeline.config import load_settings
from pipeline.ingest import ingest

settings = load_settings(dbutils.widgets.get("config"), shlex.split(dbutils.widgets.get("overrides")))

# COMMAND ----------

result = ingest(spark, settings)

# COMMAND ----------

display(spark.createDataFrame(list(result.rows.items()), "split string, rows long"))
