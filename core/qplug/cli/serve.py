"""``qplug serve``."""

from __future__ import annotations

import os
import shlex

import click

from qplug.cli.completion import backends
from qplug.cli.printing import Command, give_back_stdout, note, say, warn
from qplug.cli.progress import progress_bar
from qplug.registry.registry import Registry

_SHOWN = 20


@click.command(name="serve", cls=Command)
@click.argument("folder")
@click.argument("arguments", metavar="[-- ENGINE ARGS]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--backend",
    shell_complete=backends,
    help="The engine, vllm or sglang; default: the one FOLDER is for, of several one installed.",
)
@click.option("--python", metavar="PATH", help="The Python that has the engine.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--no-verify", is_flag=True, help="Start the engine without verifying FOLDER.")
@click.option("--dry-run", is_flag=True, help="Verify FOLDER, print the command, and end.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model's folder.")
@click.pass_obj
def command(
    registry: Registry,
    folder: str,
    arguments: tuple[str, ...],
    backend: str | None,
    python: str | None,
    host: str,
    port: int,
    no_verify: bool,
    dry_run: bool,
    trust_remote_code: bool,
) -> None:
    """Verify FOLDER, then serve it with SGLang or vLLM and the options that it needs.

    Arguments after -- are passed to the engine. The engine must be installed for the Python that
    --python names, or QPLUG_VLLM_PYTHON or QPLUG_SGLANG_PYTHON, or else for the Python that runs
    qplug. The exit status is 1 if FOLDER has a problem, or if the engine is not installed.
    """
    from qplug.machine.session import Session
    from qplug.reading.server import find_serving
    from qplug.reading.verify import not_at_hand, verify

    serving = find_serving(
        folder,
        Session(registry, trust_remote_code=trust_remote_code),
        backend=backend,
        python=python,
        host=host,
        port=port,
        arguments=arguments,
    )
    if serving.choice is not None:
        note(f"{folder}: {serving.choice}")
    if not dry_run:
        serving.require_engine()
    if not no_verify:
        with progress_bar("verifying") as bar:
            result = verify(
                folder,
                backend=serving.rules,
                python=serving.python,
                trust_remote_code=trust_remote_code,
                registry=registry,
                watch=lambda done, total: bar(done, total, "", None),
            )
        for problem in result.problems[:_SHOWN]:
            note(problem)
        if result.missing is not None:
            note(f"not compared: {not_at_hand(result.missing)}")
        if not result.ok:
            raise click.ClickException(
                f"{folder}: not served: {len(result.problems)} problems for {serving.backend}"
            )
    for warning in serving.warnings:
        warn(warning)
    say(shlex.join(serving.command))
    say(f"when the server is ready: {serving.curl}")
    if not dry_run:
        give_back_stdout()
        os.execvp(serving.command[0], serving.command)  # noqa: S606 - signals reach the engine
