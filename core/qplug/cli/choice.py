"""A choice of values on the command line that names the nearest one to a wrong value."""

from __future__ import annotations

import click

from qplug.errors import did_you_mean


class Choice(click.Choice[str]):
    """One of several words; the message about any other word suggests the nearest."""

    def get_invalid_choice_message(self, value: str, ctx: click.Context | None) -> str:
        """Returns the sentence about ``value``, which is none of the choices."""
        sentence = super().get_invalid_choice_message(value, ctx).rstrip(".")
        hint = did_you_mean(str(value), map(str, self.choices))
        return f"{sentence}.{hint}"
