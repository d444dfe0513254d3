"""Settings: one YAML file plus overrides, typed and checked before anything is launched."""

from pipeline.config.load import load_settings
from pipeline.config.settings import Settings, SettingsError

__all__ = ["Settings", "SettingsError", "load_settings"]
