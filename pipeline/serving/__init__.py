"""A trained network elsewhere: `export` writes it as files that serve it without this package.

The module that defines `export` has its name, so it is imported at once; torch is imported when it is called.
"""

from pipeline.serving.export import export, export_folder
from pipeline.serving.result import ExportError, ExportResult

__all__ = ["ExportError", "ExportResult", "export", "export_folder"]
