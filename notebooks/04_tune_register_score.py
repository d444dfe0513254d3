# Databricks notebook source
# MAGIC %md
# MAGIC # 4. Tune, register, score
# MAGIC A search for good values of settings, the training that they give, its version in a registered model, and that model at work:
# MAGIC it becomes the champion if it passes the gate, and the champion scores the test split. Run `01_ingest` with the same settings
# MAGIC first. To register the winner of `03_compare` instead, call `register` with its settings and `registry.take=comparison`.
# MAGIC
# MAGIC The scores of one champion are not replaced by those of another: to run this again, give `score.output` a new folder in the overrides.
# MAGIC
# MAGIC In Unity Catalog, set the model to `catalog.schema.name` and the registry to `databricks-uc`.

# COMMAND ----------

dbutils.widgets.text("config", "../conf/tune.yaml", "Settings file")
dbutils.widgets.text("overrides", "", "Overrides: section.key=value section.key=value")
dbutils.widgets.text("model", "tuned", "Registered model")
dbutils.widgets.text("registry", "", "Model registry; empty: that of the tracking")

# COMMAND ----------

import shlex

from pipeline import storage
from pipeline.config import load_settings
from pipeline.driver import train
from pipeline.serving import register, score
from pipeline.study import tune

own = [f"registry.model={dbutils.widgets.get('model')}"]
if dbutils.widgets.get("registry"):
    own.append(f"registry.uri={dbutils.widgets.get('registry')}")
settings = load_settings(dbutils.widgets.get("config"), [*own, *shlex.split(dbutils.widgets.get("overrides"))])

# COMMAND ----------

tuning = tune(spark, settings)
displayHTML(storage.read_bytes(f"{settings.output}/tune.html").decode())

# COMMAND ----------

settings = load_settings(f"{settings.output}/best.yaml", [*own, "registry.take=train", "score.source.split=test"])
result = train(spark, settings)

# COMMAND ----------

registration = register(settings)
displayHTML(storage.read_bytes(f"{settings.output}/register.html").decode())

# COMMAND ----------

scores = score(spark, settings)
display(spark.createDataFrame(list(zip(scores.classes, scores.class_counts, strict=True)), "class string, images long"))
