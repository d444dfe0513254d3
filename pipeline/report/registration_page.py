"""A registration -> one self-contained HTML page: the decision, both models on the same images, each class."""

from __future__ import annotations

from importlib import resources

import jinja2

from pipeline.report.formats import UNKNOWN
from pipeline.report.registration import Registration

_WORDS = {
    "promoted": "passed the gate and is the champion",
    "first": "is the first champion",
    "rejected": "did not pass the gate",
    "forced": "is the champion without passing the gate",
    "unchanged": "stays as it was",
    "rolled back": "is no longer the champion",
}


def render_registration(registration: Registration) -> str:
    """The page of a registration, as HTML."""
    loader = jinja2.FunctionLoader(lambda name: resources.files("pipeline.report").joinpath(name).read_text("utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"percent": lambda share: "–" if share is None else f"{100 * share:.2f}%"}
    environment.filters |= {
        "p": lambda value: "–" if value is None else f"{value:.2g}" if value >= 0.001 else "< 0.001"
    }
    template = environment.get_template("registration.html.j2")
    return template.render(it=registration, words=headline(registration))


def headline(registration: Registration) -> str:
    """The decision in a sentence."""
    return f"Version {registration.version} of {registration.model} {_WORDS[registration.decision]}."


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.2f}%"


def _p_value(p_value: float | None) -> str:
    return UNKNOWN if p_value is None else f"{p_value:.2g}" if p_value >= 0.001 else "< 0.001"
