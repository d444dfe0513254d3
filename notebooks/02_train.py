# Databricks notebook source
# MAGIC %md
# MAGIC # 2. Train
# MAGIC One network, trained by all workers of one barrier stage and logged as one MLflow run.
# MAGIC Run `01_ingest` with the same settings first.

# COMMAND ----------

dbutils.widgets.text("config", "../conf/quickstart.yaml", "Settings file")
dbutils.widgets.text("overrides", "", "Overrides: section.key=value section.key=value")

# COMMAND ----------

import shlex

from pipeline.config import load_settings
from pipeline.driver import train

settings = load_settings(dbutils.widgets.get("config"), shlex.split(dbutils.widgets.get("overrides")))

# COMMAND ----------

result = train(spark, settings)

# COMMAND ----------

display(spark.createDataFrame([(point.step, point.accuracy) for point in result.curve], "step long, accuracy double"))
