"""The hooks of qplug. A plugin marks its implementations with ``hookimpl``, from ``qplug``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from qplug.api import Algorithm, Dataset, Exporter, ModelView, Reader
    from qplug.api.events import BlockReport, Result, RunStart
    from qplug.api.suggestion import Suggestion

hookspec = pluggy.HookspecMarker("qplug")
#: Marks a function in a plugin as the implementation of the hook of the same name.
hookimpl = pluggy.HookimplMarker("qplug")


@hookspec
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    """Offer quantization algorithms.

    Called once, when the first component of any kind is asked for. Return classes, not instances.

    Since 0.1. Example::

        @hookimpl
        def qplug_algorithms():
            from qplug_mine.mine import Mine

            return [Mine]
    """
    return ()


@hookspec
def qplug_datasets() -> Iterable[type[Dataset[Any]]]:
    """Offer datasets: text for calibration and evaluation.

    Called once, when the first component of any kind is asked for. Return classes, not instances.

    Since 0.1. Example::

        @hookimpl
        def qplug_datasets():
            from qplug_mine.letters import Letters

            return [Letters]
    """
    return ()


@hookspec
def qplug_exporters() -> Iterable[type[Exporter[Any]]]:
    """Offer exporters, which write the formats that engines load.

    Called once, when the first component of any kind is asked for. Return classes, not instances.
    An exporter names a format and an engine, of its own plugin or of another one.

    Since 0.1. Example::

        @hookimpl
        def qplug_exporters():
            from qplug_mine.engine import MyEngine

            return [MyEngine]
    """
    return ()


@hookspec
def qplug_readers() -> Iterable[Reader]:
    """Offer readers, which read checkpoints that somebody quantized as float checkpoints.

    Called once, when the first component of any kind is asked for. Return objects: a reader is a
    constant and has no options. A reader is asked for each model that is opened.

    Since 0.2. Example::

        @hookimpl
        def qplug_readers():
            from qplug_mine.halves import Halves

            return [Halves()]
    """
    return ()


@hookspec
def qplug_suggestions() -> Iterable[Suggestion]:
    """Say for which schemes algorithms are worth trying, and what they lose there.

    Called when qplug chooses or proposes an algorithm: for a user of ``qplug quantize`` who names
    none, in ``qplug plan``, and in a report. Return data, and import no torch for it. A suggestion
    may name algorithms of other plugins besides your own: ``"mine+gptq"``.

    Since 0.2. Example::

        @hookimpl
        def qplug_suggestions():
            return [Suggestion("mine", "few-bit integers", loss=0.6)]
    """
    return ()


@hookspec
def qplug_commands(group: click.Group) -> None:
    """Add commands to the command line.

    Called once, when the user runs a command that is not qplug's own, or checks plugins.

    Since 0.1. Example::

        @hookimpl
        def qplug_commands(group):
            @group.command()
            def hello():
                click.echo("hello")
    """


@hookspec(firstresult=True)
def qplug_model_view(config: Mapping[str, Any]) -> ModelView | None:
    """Describe an architecture: its decoder blocks and its linears.

    Called for each model that is opened, with the content of config.json, before qplug inspects
    the model itself. Return None for models that are not yours; the answer of the first plugin, in
    order of names, that returns a ``ModelView`` is used. Names in the view are names of tensors on
    disk, without ``.weight``; ``config`` may be ``{}``. qplug checks the view against the
    checkpoint. A model that transformers does not know can then be verified, and be quantized by
    algorithms that need no data.

    A view without blocks and linears describes no model: its ``built_float`` and ``towers`` are
    added to the view that qplug finds itself. So a model that comes with its own code, and sees or
    hears, is rotated: a plugin names its towers.

    Since 0.1. Example::

        @hookimpl
        def qplug_model_view(config):
            if config["model_type"] != "mine":
                return None
            names = [f"layers.{n}" for n in range(config["depth"])]
            shape = (config["width"], config["width"])
            return ModelView(
                config={},
                dtype="bfloat16",
                linears={f"{name}.mix": shape for name in names},
                quantizable=frozenset(f"{name}.mix" for name in names),
                blocks=tuple(names),
                head=None,
            )
    """
    return None


@hookspec
def qplug_run_begun(start: RunStart) -> None:
    """Watch a run: all checks are done, and the first step is about to be computed.

    Called once in a run, in the first process alone; not called in a dry run. Return nothing. If
    the hook raises an error, qplug prints a warning that names the plugin, no longer calls this
    plugin, and continues the run.

    Since 0.2. Example::

        @hookimpl
        def qplug_run_begun(start):
            print(f"{start.out}: {start.count - start.done} steps to do")
    """


@hookspec
def qplug_stage_begun(stage: str) -> None:
    """Watch a run: the run enters a stage.

    The stages are, in this order: "opening", "data" (a calibrated run reads its text), "learning"
    (an algorithm learns on the whole model), "trial pass" (a few tokens go through the model, and
    all tokens through its embedding), "blocks", "writing" (the last files) and, after
    ``qplug_run_done``, "checking" (the result against the float model). Called in the first process
    alone, in a dry run too. Return nothing. If the hook raises an error, qplug prints a
    warning that names the plugin, no longer calls this plugin, and continues the run.

    Since 0.2. Example::

        @hookimpl
        def qplug_stage_begun(stage):
            print(f"{stage} ...")
    """


@hookspec
def qplug_block_done(report: BlockReport) -> None:
    """Watch a run: a decoder block, or a tensor of a data-free run, has been quantized.

    Called after each step, in the order of the model, in the first process alone; not called for
    steps that an earlier run had finished. Return nothing. If the hook raises an error, qplug
    prints a warning that names the plugin, no longer calls this plugin, and continues the run.

    Since 0.1. Example::

        @hookimpl
        def qplug_block_done(report):
            print(f"{report.number} of {report.count}: {report.name}, {report.seconds:.1f} s")
    """


@hookspec
def qplug_run_done(result: Result) -> None:
    """Watch a run: the folder ``result.out`` has been written.

    Called once in a run, when the folder is complete and in its place; not called after a dry run
    or if the run fails. Return nothing. If the hook raises an error, qplug prints a warning that
    names the plugin.

    Since 0.1. Example::

        @hookimpl
        def qplug_run_done(result):
            (result.out / "worst.txt").write_text(max(result.errors, key=result.errors.get))
    """
