"""Renders pages and charts from the templates of this package; every value is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qplug import __version__
from qplug.errors import shown
from qplug.report.words import bits


def render(template: str, values: Mapping[str, object]) -> Markup:
    """Returns ``template``, a file in ``templates``, filled with ``values``.

    A value that is not ``Markup`` is text; it is escaped, also in attributes. Raises
    ``jinja2.UndefinedError`` if the template reads a value that is missing.
    """
    return Markup(environment().get_template(template).render(values))  # noqa: S704 (it escapes)


@cache
def environment() -> Environment:
    """Returns the environment of the templates, with the filters and globals that they use."""
    templates = Environment(
        loader=PackageLoader("qplug.report"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters.update(px=_px, bits=bits)
    templates.globals["version"] = __version__
    templates.globals["script_hash"] = _hash(templates.get_template("page.js").render())
    return templates


def _hash(script: str) -> str:
    """Returns the word of a page's policy that lets a browser run ``script`` and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _visible(value: object) -> object:
    """Returns text whose characters all show: none turns the direction of the text after it."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return "\n".join(map(shown, value.split("\n")))
    return value


def _px(value: float) -> str:
    """Formats a coordinate to a hundredth of a pixel, or of a percent."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
