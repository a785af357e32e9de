"""The command line around the commands: options for plugins, errors, and ``qplug plugins``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner, Result

import qplug as qplug_package
from qplug import __version__
from qplug.cli.main import COMMANDS, Deferred, main
from qplug.cli.printing import Command, say_json
from qplug.cli.progress import progress_bar
from qplug.registry.plugin import Plugin
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Starter

ALGORITHM = '''
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from qplug import Algorithm, Param, hookimpl

@dataclass(frozen=True)
class Params:
    seed: Annotated[int, Param("Needed.")]
    bits: Annotated[Literal[4, 8], Param("Bits per weight.", also=("w_bit", "wbits"))] = 4
    file: Annotated[Path | None, Param("A file.")] = None
    text: Annotated[Path, Param("Text.")] = Path("a.txt")

class Mine(Algorithm[Params]):
    """Round to nearest.

    Nothing else.
    """
    name = "my-idea"
    Params = Params

@hookimpl
def qplug_algorithms():
    return [Mine]
'''

COMMAND = """
import click
from qplug import QplugError, hookimpl

@hookimpl
def qplug_commands(group):
    @group.command()
    def {name}():
        "Say hello."
        {body}
"""


@pytest.fixture(autouse=True)
def no_installed_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.setattr("qplug.registry.registry.entry_points", lambda group: [])
    monkeypatch.delenv("QPLUG_PLUGINS", raising=False)
    monkeypatch.delenv("QPLUG_TRACE", raising=False)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("qplug_file_"):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    return WriteFile(tmp_path)


class WriteFile:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, code: str) -> str:
        (self.folder / name).write_text(dedent(code))
        return str(self.folder / name)

    def command(self, body: str, name: str = "hello", file: str = "mine.py") -> str:
        return self(file, COMMAND.format(body=body, name=name))


def qplug(*words: str, obj: Registry | None = None) -> Result:
    return CliRunner().invoke(main, words, prog_name="qplug", obj=obj)


# --- help and versions ---------------------------------------------------------------------------


def test_help_lists_the_commands_in_the_order_of_work(write: WriteFile) -> None:
    result = qplug("--plugin", write("bad.py", "raise ValueError"), "--help")
    assert result.exit_code == 0
    listed = result.output.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [
        [name, summary] for name, (_, summary) in COMMANDS.items()
    ]
    assert result.output.endswith("Plugins may add more commands: qplug plugins list\n")


def test_version() -> None:
    assert qplug("--version").output == f"qplug {__version__}\n"


def test_python_m_qplug() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "qplug", "--version"],
        capture_output=True,
        check=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(qplug_package.__file__).parents[1])},
    )
    assert result.stdout == f"qplug {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_where_the_table_says(name: str) -> None:
    deferred = main.commands[name]
    assert isinstance(deferred, Deferred)
    command = deferred.load()
    assert isinstance(command, click.Command)
    assert command.name == name
    assert command.help


def leaves(command: click.Command) -> Iterator[click.Command]:
    if isinstance(command, click.Group):
        for member in command.commands.values():
            yield from leaves(member)
    else:
        yield command


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_keeps_stdout_for_its_results(name: str) -> None:
    deferred = main.commands[name]
    assert isinstance(deferred, Deferred)
    assert all(isinstance(command, Command) for command in leaves(deferred.load()))


def test_a_command_is_imported_when_it_runs() -> None:
    sys.modules.pop("qplug.cli.plugins", None)
    qplug("--help")
    assert "qplug.cli.plugins" not in sys.modules
    assert "Describe the component or command NAME" in qplug("plugins", "--help").output
    assert "qplug.cli.plugins" in sys.modules


# --- errors --------------------------------------------------------------------------------------


def test_what_the_user_can_mend_is_one_line(write: WriteFile) -> None:
    file = write.command("raise QplugError('no room:\\ndelete something')")
    result = qplug("--plugin", file, "hello")
    assert result.exit_code == 1
    assert result.output == "Error: no room: delete something\n"


def test_a_bug_keeps_its_traceback_and_names_the_plugin(write: WriteFile) -> None:
    file = write.command("1 / 0")
    result = qplug("--plugin", file, "hello")
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.stderr == f"The error below is from plugin mine ({file}).\n"
    assert result.stdout == ""


@pytest.mark.parametrize("ships", [True, False])
def test_a_bug_in_a_strangers_plugin_comes_with_a_way_around(write: WriteFile, ships: bool) -> None:
    plugin = Registry.installed(files=[write.folder / "mine.py"]).plugins[0]
    write.command("1 / 0")
    plugin.is_file, plugin.source, plugin.ships_with_qplug = False, "mine 1.0", ships
    result = qplug("hello", obj=Registry([plugin]))
    assert isinstance(result.exception, ZeroDivisionError)
    hint = "" if ships else " To run without it: qplug --no-plugins, or -p no:mine"
    assert result.stderr == f"The error below is from plugin mine (mine 1.0).{hint}\n"


def test_a_bug_of_qplug_is_blamed_on_no_plugin(
    write: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(main.commands, "plugins", Deferred("plugins", "qplug:none", ""))
    result = qplug("--plugin", write.command("pass"), "plugins")
    assert isinstance(result.exception, AttributeError)
    assert result.output == ""


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("raise click.UsageError('which?')", 2, "Error: which?\n"),
        ("raise click.ClickException('no')", 1, "Error: no\n"),
        ("click.get_current_context().exit(7)", 7, ""),
        ("raise click.Abort", 1, "Aborted!\n"),
        ("raise KeyboardInterrupt", 1, "\nAborted!\n"),
    ],
)
def test_what_click_raises_is_no_bug(write: WriteFile, body: str, code: int, says: str) -> None:
    result = qplug("--plugin", write.command(body), "hello")
    assert result.exit_code == code
    assert result.output.endswith(says)
    assert bool(result.output) == bool(says)
    assert "from plugin" not in result.output


@pytest.mark.parametrize(
    "words",
    [
        ["nothing"],
        ["-p", "gptq", "plugins", "list"],
        ["-p", "no:", "plugins", "list"],
        ["--plugin", "not/there.py", "plugins", "list"],
        ["--nothing"],
        [],
    ],
)
def test_wrong_usage_exits_with_2(words: list[str]) -> None:
    result = qplug(*words)
    assert result.exit_code == 2
    assert result.output.startswith("Usage: qplug")


def test_a_traceback_only_shows(start: Starter, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(COMMAND.format(name="hello", body=r"raise ValueError('\x1b[2J\u202e')"))
    done = start("--plugin", file, "hello").wait()
    assert done.codes == [1]
    assert done.stderr.endswith("\nValueError: \\x1b[2J\\u202e\n")
    assert done.stderr.replace("\n", "").isprintable()


def test_a_name_is_no_markup_of_the_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    with progress_bar("evaluating [bold]x") as bar:
        bar(1, 2, "layer[/nothing]\x1b]0;pwn\x07", 0.5)
    err = capsys.readouterr().err
    assert "[/nothing]" in err
    assert "\x1b]0;" not in err


def test_json_has_no_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    say_json({"a": [1.5, float("nan")], "b": (float("inf"), 2)})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None], "b": [None, 2]}


# --- plugins on the command line -----------------------------------------------------------------


def test_a_plugin_adds_a_command(write: WriteFile) -> None:
    result = qplug("--plugin", write.command("click.echo('hello')"), "hello")
    assert (result.exit_code, result.output) == (0, "hello\n")


def test_qplugs_own_commands_come_first(write: WriteFile) -> None:
    file = write.command("click.echo('mine')", name="plugins")
    assert "Usage: qplug plugins" in qplug("--plugin", file, "plugins", "--help").output
    result = qplug("--plugin", file, "plugins", "check")
    assert result.exit_code == 1
    assert result.output.splitlines()[1] == (
        f"clash  command 'plugins' of mine ({file}) is never run: qplug has a command 'plugins'"
    )


def test_own_commands_ask_no_plugin(write: WriteFile) -> None:
    result = qplug("--plugin", write("bad.py", "raise ValueError"), "plugins", "list")
    assert result.exit_code == 0
    assert "ValueError" not in result.output


def test_a_broken_file_is_told_when_a_command_is_missing(write: WriteFile) -> None:
    file = write("bad.py", "raise ValueError('not yet')")
    result = qplug("--plugin", file, "hello")
    assert result.exit_code == 1
    assert result.output == f"Error: plugin bad ({file}): ValueError: not yet\n"


def test_the_options_reach_the_registry(write: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def installed(**given: object) -> Registry:
        asked.update(given)
        return Registry([])

    monkeypatch.setattr(Registry, "installed", installed)
    one, two = write("one.py", ""), write("two.py", "")
    words = ["-p", "no:a", "-p", "no:b_c", "--plugin", one, "--plugin", two, "--no-plugins"]
    assert qplug(*words, "plugins", "list").exit_code == 0
    files = (write.folder / "one.py", write.folder / "two.py")
    assert asked == {"blocked": ["a", "b_c"], "only_shipped": True, "files": files}


def test_blocking_what_is_not_there_is_one_line() -> None:
    result = qplug("-p", "no:nothing", "plugins", "list")
    assert result.exit_code == 1
    assert result.output == "Error: -p no:nothing: no such plugin.\n"


# --- qplug plugins -------------------------------------------------------------------------------


def stranger(name: str) -> Plugin:
    def cannot() -> object:
        raise ImportError("no module\nof that name")

    return Plugin(name, f"{name} 1.0", f"face_{name}", cannot)


def test_list_imports_nothing() -> None:
    off = stranger("off")
    off.blocked = "-p no:off"
    registry = Registry([stranger("bb"), stranger("a"), off, stranger("a")])
    result = qplug("plugins", "list", obj=registry)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "-  -  a    a 1.0",
        "-  -  a    a 1.0    QplugError: the name of this plugin is taken by a (a 1.0)",
        "-  -  bb   bb 1.0",
        "-  -  off  off 1.0  switched off by -p no:off",
    ]
    assert json.loads(qplug("plugins", "list", "--json", obj=registry).output)[2:] == [
        {"name": "bb", "source": "bb 1.0", "module": "face_bb", "unused": None, "offers": []},
        {
            "name": "off",
            "source": "off 1.0",
            "module": "face_off",
            "unused": "switched off by -p no:off",
            "offers": [],
        },
    ]


def test_list_has_a_line_for_each_offer(write: WriteFile) -> None:
    idea = write("idea.py", "print('imported')\n" + ALGORITHM)
    hello = write.command("pass", name="say_hello")
    result = qplug("--plugin", hello, "--plugin", idea, "plugins", "list")
    assert [line.split(maxsplit=4) for line in result.output.splitlines()] == [
        ["algorithm", "my-idea", "idea", idea, "Round to nearest."],
        ["command", "say-hello", "mine", hello, "Say hello."],
    ]
    offers = json.loads(qplug("--plugin", idea, "plugins", "list", "--json").output)[0]["offers"]
    assert offers == [{"kind": "algorithm", "name": "my-idea", "summary": "Round to nearest."}]


def test_list_of_nothing() -> None:
    assert qplug("plugins", "list").output == ""
    assert json.loads(qplug("plugins", "list", "--json").output) == []


def test_check_says_what_each_offers(write: WriteFile) -> None:
    idea, hello = write("idea.py", ALGORITHM), write.command("pass")
    result = qplug("--plugin", idea, "--plugin", hello, "plugins", "check")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        f"ok  idea  {idea}  algorithm my-idea",
        f"ok  mine  {hello}  command hello",
    ]


def test_check_fails_if_a_plugin_is_broken() -> None:
    off = stranger("off")
    off.blocked = "-p no:off"
    result = qplug("plugins", "check", obj=Registry([off]))
    assert (result.exit_code, result.output) == (
        0,
        "blocked  off  off 1.0  switched off by -p no:off\n",
    )
    result = qplug("plugins", "check", obj=Registry([stranger("bad")]))
    assert (result.exit_code, result.output) == (
        1,
        "failed  bad  bad 1.0  ImportError: no module of that name\n",
    )


def test_check_fails_if_a_plugin_breaks_on_commands_only(write: WriteFile) -> None:
    file = write("mine.py", ALGORITHM + "\n@hookimpl\ndef qplug_commands(group): 1 / 0\n")
    result = qplug("--plugin", file, "plugins", "check")
    assert result.exit_code == 1
    assert result.output == f"failed  mine  {file}  ZeroDivisionError: division by zero\n"


@pytest.mark.parametrize("code", [ALGORITHM, COMMAND.format(name="my_idea", body="pass")])
def test_check_fails_if_two_plugins_clash(write: WriteFile, code: str) -> None:
    one, two = write("one.py", code), write("two.py", code)
    result = qplug("--plugin", one, "--plugin", two, "plugins", "check")
    kind = "algorithm" if code is ALGORITHM else "command"
    assert result.exit_code == 1
    assert result.output.splitlines()[2:] == [
        f"clash  {kind} 'my-idea' comes from one ({one}) and two ({two});"
        " drop one: -p no:one or -p no:two"
    ]


def test_show_describes_every_parameter(write: WriteFile) -> None:
    file = write("idea.py", ALGORITHM)
    result = qplug("--plugin", file, "plugins", "show", "my-idea")
    assert result.exit_code == 0
    expected = f"""\
        algorithm my-idea
        from plugin idea ({file})

        Round to nearest.

        Nothing else.

          seed  int  [required]
              Needed.

          bits  4|8  [default: 4]
              Bits per weight.
              Older names: w_bit, wbits.

          file  path or none  [default: none]
              A file.

          text  path  [default: a.txt]
              Text.
    """
    assert result.output == dedent(expected)


def test_show_as_json(write: WriteFile) -> None:
    file = write("idea.py", ALGORITHM)
    result = qplug("--plugin", file, "plugins", "show", "my-idea", "--json")
    (shown,) = json.loads(result.output)
    parameters = shown.pop("parameters")
    assert shown == {
        "kind": "algorithm",
        "name": "my-idea",
        "plugin": "idea",
        "source": file,
        "description": "Round to nearest.\n\nNothing else.",
    }
    assert [(p["name"], p["required"], p["default"]) for p in parameters] == [
        ("seed", True, None),
        ("bits", False, 4),
        ("file", False, None),
        ("text", False, "a.txt"),
    ]
    assert parameters[1] == {
        "name": "bits",
        "type": "4|8",
        "required": False,
        "default": 4,
        "help": "Bits per weight.",
        "older_names": ["w_bit", "wbits"],
    }


def test_show_has_all_of_one_name_also_when_they_clash(write: WriteFile) -> None:
    one, two = write("one.py", ALGORITHM), write("two.py", ALGORITHM)
    command = write.command("pass", name="my_idea")
    files = [word for file in (one, two, command) for word in ("--plugin", file)]
    result = qplug(*files, "plugins", "show", "my-idea", "--json")
    assert [(s["kind"], s["plugin"]) for s in json.loads(result.output)] == [
        ("algorithm", "one"),
        ("algorithm", "two"),
        ("command", "mine"),
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my-ideas", "nothing is called 'my-ideas'. Did you mean 'my-idea'? There are: my-idea"),
        ("idea", "plugin idea offers: algorithm my-idea"),
        ("off", "plugin off offers nothing: the plugin is switched off by -p no:off"),
        ("bad", "plugin bad (bad 1.0): ImportError: no module of that name"),
    ],
)
def test_show_of_what_is_not_there(write: WriteFile, name: str, says: str) -> None:
    write("idea.py", ALGORITHM)
    off = stranger("off")
    off.blocked = "-p no:off"
    idea = Plugin.of_file(write.folder / "idea.py")
    result = qplug("plugins", "show", name, obj=Registry([off, stranger("bad"), idea]))
    assert (result.exit_code, result.output) == (1, f"Error: {says}\n")
