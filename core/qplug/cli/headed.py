"""Options under headings in ``--help``."""

from __future__ import annotations

from typing import Any

import click

from qplug.cli.printing import Command

#: The heading of options that have no other.
LAST = "Run"


class HeadedOption(click.Option):
    """An option that stands under ``heading`` in the help of a ``HeadedCommand``."""

    def __init__(self, *args: Any, heading: str = LAST, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class HeadedCommand(Command):
    """A command whose help has its options under headings, in the order of their first options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a section for each heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                heading = param.heading if isinstance(param, HeadedOption) else LAST
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)
