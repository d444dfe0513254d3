# Databricks notebook source
# MAGIC %md
# MAGIC # 3. Compare
# MAGIC Every combination of `compare.grid` (norms, batch sizes, depths, ...) with its own best learning rate and every seed: one
# MAGIC MLflow parent run with a child for each trial, and one report. Run `01_ingest` with the same settings first.

# COMMAND ----------

dbutils.widgets.text("config", "../conf/quickstart.yaml", "Settings file")
dbutils.widgets.text("overrides", "", "Overrides: section.key=value section.key=value")

# COMMAND ----------

import shlex

from pipeline import storage
from pipeline.config import load_settings
from pipeline.study import compare

settings = load_settings(dbutils.widgets.get("config"), shlex.split(dbutils.widgets.get("overrides")))

# COMMAND ----------

comparison = compare(spark, settings)

# COMMAND ----------

displayHTML(storage.read_bytes(f"{settings.output}/report.html").decode())
