# Databricks notebook source
# MAGIC %md
# MAGIC # 4. Tune, register, score
# MAGIC The winner of `03_compare` becomes a version of a registered model, and the champion if it passes the gate; then the champion
# MAGIC is asked. Run `01_ingest` and `03_compare` with the same settings first.
# MAGIC
# MAGIC In Unity Catalog, set the model to `catalog.schema.name` and the registry to `databricks-uc`.

# COMMAND ----------

dbutils.widgets.text("config", "../conf/quickstart.yaml", "Settings file")
dbutils.widgets.text("overrides", "", "Overrides: section.key=value section.key=value")
dbutils.widgets.text("model", "quickstart", "Registered model")
dbutils.widgets.text("registry", "", "Model registry; empty: that of the tracking")

# COMMAND ----------

import shlex

from pipeline import storage
from pipeline.config import load_settings
from pipeline.serving import register

own = [f"registry.model={dbutils.widgets.get('model')}"]
if dbutils.widgets.get("registry"):
    own.append(f"registry.uri={dbutils.widgets.get('registry')}")
settings = load_settings(dbutils.widgets.get("config"), [*own, *shlex.split(dbutils.widgets.get("overrides"))])

# COMMAND ----------

# MAGIC %md
# MAGIC ## Register

# COMMAND ----------

registration = register(settings)

# COMMAND ----------

displayHTML(storage.read_bytes(f"{settings.output}/register.html").decode())
