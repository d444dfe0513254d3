# Databricks notebook source
# MAGIC %md
# MAGIC # 5. Your network
# MAGIC A network of your own, by its import path: as it is (`keep`), and with other norms in the place of its batch norm.
# MAGIC `files` are its `.py` file, or a zip of its package, which executors get; leave it empty if the module is installed on
# MAGIC the cluster. Before anything is launched, the network is tried on one batch. Run `01_ingest` with the same settings first.

# COMMAND ----------

dbutils.widgets.text("config", "../conf/quickstart.yaml", "Settings file")
dbutils.widgets.text("overrides", "", "Overrides: section.key=value section.key=value")
dbutils.widgets.text("network", "my_network:build", "Your network: module:function")
dbutils.widgets.text("files", "networks/my_network.py", "Its .py file, or a zip of its package")
dbutils.widgets.text("options", "{width: 16}", "What the function gets beside image_shape and num_classes")

# COMMAND ----------

import shlex

from pipeline import storage
from pipeline.config import load_settings
from pipeline.study import compare

own = [f"model.{name}={dbutils.widgets.get(name)}" for name in ("network", "options")]
own += [
    f"spark.py_files=[{dbutils.widgets.get('files')}]",
    "model.norm=[keep, batch, group, none]",
    "name=your_network",
]
settings = load_settings(dbutils.widgets.get("config"), [*own, *shlex.split(dbutils.widgets.get("overrides"))])

# COMMAND ----------

comparison = compare(spark, settings)

# COMMAND ----------

displayHTML(storage.read_bytes(f"{settings.output}/report.html").decode())
