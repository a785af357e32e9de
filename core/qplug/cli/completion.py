"""``qplug completion``, and the values that a shell completes."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

from qplug.api.gpus import GPUS
from qplug.api.scheme import ALIASES, PRESETS
from qplug.cli.choice import Choice
from qplug.cli.printing import Command, say_text
from qplug.registry.outline import outline
from qplug.registry.registry import Registry

_SHELLS = ("bash", "zsh", "fish")


@click.command(name="completion", cls=Command)
@click.argument("shell", type=Choice(_SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes the words of qplug in SHELL: bash, zsh or fish.

    Bash: eval "$(qplug completion bash)" in ~/.bashrc; zsh: the same with zsh in ~/.zshrc; fish:
    qplug completion fish > ~/.config/fish/completions/qplug.fish.
    """
    script = get_completion_class(shell)
    assert script is not None
    # Of the base class: bash's own starts a bash to ask for its version.
    of_shell = script(ctx.find_root().command, {}, "qplug", "_QPLUG_COMPLETE")
    say_text(ShellComplete.source(of_shell).rstrip("\n"))


def algorithms(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    """Completes the last of the algorithms in ``A+B``."""
    return _last(typed, _offered("algorithm"))


def datasets(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    """Completes the last of the datasets in ``text:96+pileval:32``."""
    return _last(typed, _offered("dataset"))


def backends(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    """Completes the name of a backend."""
    return _last(typed, _offered("exporter"))


def schemes(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    """Completes the name of a scheme, in the case in which it was begun."""
    lower = typed and typed == typed.lower()
    names = [name.lower() if lower else name for name in PRESETS]
    return _last(typed, [(name, "") for name in dict.fromkeys([*names, *ALIASES])])


def gpus(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    """Completes the name of a GPU."""
    return _last(typed.upper(), [(name, gpu.architecture) for name, gpu in GPUS.items()])


def _offered(kind: str) -> Iterable[tuple[str, str]]:
    """The names of components of installed plugins, each with one line; imports no plugin."""
    usable = (plugin for plugin in Registry.installed().plugins if plugin.status == "ok")
    return [(o.name, o.summary) for plugin in usable for o in outline(plugin) if o.kind == kind]


def _last(typed: str, names: Iterable[tuple[str, str]]) -> list[CompletionItem]:
    before, plus, begun = typed.rpartition("+")
    return [
        CompletionItem(f"{before}{plus}{name}", help=summary)
        for name, summary in sorted(names)
        if name.startswith(begun)
    ]
