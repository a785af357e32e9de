"""``qplug doctor``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import chain

import click

from qplug.cli.health import (
    Finding,
    engine_findings,
    hub_findings,
    machine_findings,
    plugin_findings,
)
from qplug.cli.printing import Command, say, say_json
from qplug.registry.registry import Registry


@click.command(name="doctor", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check this machine: Python, torch, GPUs, engines, memory, disk, the Hub, and plugins.

    Each line is ok, a warning with what to do, or broken. The exit status is 1 if a line is broken.
    """
    findings = []
    for finding in _findings(ctx.obj):
        findings.append(finding)
        if not as_json:
            advice = f"; {finding.advice}" if finding.advice else ""
            say(f"{finding.state:<7}  {finding.name:<9}  {finding.text}{advice}")
    if as_json:
        say_json([dataclasses.asdict(finding) for finding in findings])
    if any(finding.state == "broken" for finding in findings):
        ctx.exit(1)


def _findings(registry: Registry) -> Iterator[Finding]:
    """Yields all findings; what plugins know comes last, since they are slow to import."""
    return chain(
        machine_findings(), hub_findings(), engine_findings(registry), plugin_findings(registry)
    )
