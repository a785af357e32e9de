"""Pages and charts are rendered from the templates in this folder; every value is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qplug import __version__
from qplug.report.words import bits


def render(template: str, values: Mapping[str, object]) -> Markup:
    """``template``, a file in ``templates``, filled with ``values``.

    A value that is not ``Markup`` is text, and is escaped, in attributes too. Raises
    ``jinja2.UndefinedError`` if the template reads a value that is not there.
    """
    return Markup(environment().get_template(template).render(values))  # noqa: S704 (it escapes)


@cache
def environment() -> Environment:
    """The templates, with what each of them may use."""
    made = Environment(
        loader=PackageLoader("qplug.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(px=_px, bits=bits)
    made.globals["version"] = __version__
    return made


def _px(value: float) -> str:
    """A coordinate to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
