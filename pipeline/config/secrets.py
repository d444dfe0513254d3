"""What a secret looks like, in names and in texts: the one place that knows, and that masks it.

All that is logged, written as a result, sent to MLflow or shown passes through `mask` (a text) or `masked` (values by
name). What was masked is for reading alone: `load_settings` refuses it as a value.
"""

from __future__ import annotations

import logging
import re
from typing import Any

# What stands in the place of a secret.
MASK = "***"

# Names of settings, Spark properties, and parameters of URLs and connection strings whose values are secret.
NAMES = (
    r"(?i)secret|passw(?:or)?d|passphrase|token|credential|signature|authorization"
    r"|(?:access|account|api|auth|encryption|master|private|session|shared|storage)[._-]?key"
    r"|(?<![a-z])(?:keys?|pass|pwd?|sas|sig)(?![a-z])"
)
_SECRET_NAME = re.compile(NAMES)
# For sessions that are made here: of which properties Spark hides the values in its own event logs and pages. Its own
# pattern knows neither account keys nor signatures nor passwords in addresses.
SPARK_REDACTION = rf"{NAMES}|://[^\s/@:]*:[^\s@]*@"

# What stands before the host of a URI where it has a password, and what stands there alone on the web, where it may be
# a token. A password may hold slashes (SQLAlchemy takes them) and an @: rather too much is masked than too little.
_USER_INFO = re.compile(
    r"""(://)(?:[^\s/@:"'<>]*:[^\s@"'<>]*@(?:[^\s/?#@"'<>]*@)*|(?:(?<=http://)|(?<=https://))[^\s/@"'<>]+@)""",
    re.IGNORECASE,
)

# ``name=value``, ``"name": "value"`` and ``name: value``, whose name has one of `NAMES` in it.
_ENTRY = re.compile(
    rf"""(?P<name>(?<![\w.-])(?=[\w.-]*?(?:{NAMES.removeprefix("(?i)")}))[\w.-]++)"""
    r"""(?P<between>\s*=\s*|\\?["']\s*[:=]\s*|:\s+)"""
    r"""(?P<value>(?P<quote>\\?["'])(?:[^"'\\]|(?!(?P=quote))["']|(?!(?P=quote))\\.)*(?P=quote)"""
    r"""|["']?(?:(?:basic|bearer)\s+)?[^\s&;"'<>]*[^\s&;"'<>\\,.:)\]}])""",
    re.IGNORECASE,
)
# After other names a colon is a part of the sentence: "unexpected token: x", "NoCredentialsError: none found".
_BEFORE_COLON = re.compile(r".*[._-].*(?<!error)(?<!exception)|password|secret|authorization", re.IGNORECASE)
# In code this is an argument (``sorted(rows, key=len)``), in a URL it may be a secret.
_ARGUMENTS, _BEFORE_PARAMETER = ("key", "keys"), ("?", "&", ";")


def is_secret(name: str) -> bool:
    """Return whether a name, such as that of a Spark property, is that of a secret."""
    return _SECRET_NAME.search(name) is not None


def mask(text: str) -> str:
    """Return a text of any kind, such as a URI or an error, with `MASK` in the place of the secrets in it.

    These are what stands before the host of a URI where it has a password (or is of the web, where it may be a token),
    and the values of names that `is_secret` knows: in the parameters of a URL, in connection strings, options, JSON
    and YAML.
    """
    return _ENTRY.sub(_masked_entry, _USER_INFO.sub(rf"\g<1>{MASK}@", text))


def _masked_entry(entry: re.Match[str]) -> str:
    name, between, value = entry["name"], entry["between"], entry["value"]
    in_sentence = between.startswith(":") and not _BEFORE_COLON.fullmatch(name)
    before = entry.string[max(0, entry.start() - 1) : entry.start()]
    is_argument = between.startswith("=") and name in _ARGUMENTS and before not in _BEFORE_PARAMETER
    if in_sentence or is_argument:
        return f"{name}{between}{_ENTRY.sub(_masked_entry, value)}"
    quote = entry["quote"] or ""
    return f"{name}{between}{quote}{MASK}{quote}"


def masked(value: Any, name: str = "") -> Any:
    """Return JSON-able values with `MASK` in the place of each text whose name is that of a secret; others are masked.

    Numbers, booleans and null stay, whatever their name.

    Parameters
    ----------
    value : a text, or dictionaries and lists of texts at any depth
    name : of the value
    """
    if isinstance(value, str):
        return MASK if value and is_secret(name) else mask(value)
    if isinstance(value, dict):
        return {key: masked(item, name if is_secret(name) else str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [masked(item, name) for item in value]
    if isinstance(value, tuple):
        return tuple(masked(item, name) for item in value)
    return value


class MaskingFormatter(logging.Formatter):
    """Masks what another formatter makes of a record, its traceback included."""

    def __init__(self, inner: logging.Formatter | None):
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return mask(self._inner.format(record))


def mask_logs(*loggers: str) -> None:
    """Mask what the handlers of these loggers write, and what is written where no logger has a handler.

    Parameters
    ----------
    loggers : names; the root logger where none is given
    """
    named = [logging.getLogger(name) for name in loggers or (None,)]
    for handler in [*(handler for logger in named for handler in logger.handlers), logging.lastResort]:
        if handler is not None and not isinstance(handler.formatter, MaskingFormatter):
            handler.setFormatter(MaskingFormatter(handler.formatter))
