"""Plugins are found without being imported, and one that is broken stops no other."""

from __future__ import annotations

import sys
from importlib.metadata import PathDistribution, entry_points
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import click
import pytest

from qplug import Algorithm, PluginError, QplugError, hookimpl
from qplug.registry.plugin import Plugin
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Install(Protocol):
    def __call__(self, name: str, code: str, package: str = ...) -> None: ...


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install plugin NAME, a module ``face_NAME``, as pip would. Others are hidden."""
    hidden = list(entry_points(group="qplug"))
    before = set(sys.modules)
    monkeypatch.setattr(
        "qplug.registry.registry.entry_points",
        lambda group: [entry for entry in entry_points(group=group) if entry not in hidden],
    )
    monkeypatch.delenv("QPLUG_PLUGINS", raising=False)
    monkeypatch.delenv("QPLUG_TRACE", raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, code: str, package: str = "") -> None:
        package, _, version = (package or f"qplug-{name} 1.0").partition(" ")
        module = f"face_{name}_{package}".replace("-", "_")
        (tmp_path / f"{module}.py").write_text(dedent(code))
        info = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        entries = info / "entry_points.txt"
        known = entries.read_text() if entries.exists() else "[qplug]\n"
        entries.write_text(f"{known}{name} = {module}\n")

    yield write
    for name in set(sys.modules) - before:
        if name.startswith(("face_", "qplug_file_")):
            del sys.modules[name]


def offering(*names: str, kind: str = "algorithm") -> str:
    """The code of a plugin that offers algorithms, or datasets."""
    body = {"algorithm": "pass", "dataset": "def documents(self, split): return iter(())"}[kind]
    classes = "\n".join(
        f"class C{i}({kind.title()}):\n    'Text.'\n    name = {name!r}\n    {body}"
        for i, name in enumerate(names)
    )
    offers = ", ".join(f"C{i}" for i in range(len(names)))
    return (
        f"from qplug import Algorithm, Dataset, hookimpl\n{classes}\n"
        f"@hookimpl\ndef qplug_{kind}s():\n    return [{offers}]\n"
    )


def imported(name: str) -> bool:
    return any(module.startswith(f"face_{name}_") for module in sys.modules)


def test_finding_plugins_imports_none(install: Install) -> None:
    install("mine", offering("mine"))
    registry = Registry.installed()
    assert [(p.name, p.source, p.status) for p in registry.plugins] == [
        ("mine", "qplug-mine 1.0", "ok")
    ]
    assert not imported("mine")
    assert registry.algorithms["mine"].name == "mine"
    assert imported("mine")


def test_offers_are_listed_by_kind_in_order_of_name(install: Install) -> None:
    install("two", offering("b", "a"))
    install("text", offering("letters", kind="dataset"))
    registry = Registry.installed()
    assert list(registry.algorithms) == ["a", "b"]
    assert list(registry.datasets) == ["letters"]
    assert list(registry.exporters) == []
    assert "a" in registry.algorithms
    assert "letters" not in registry.algorithms


def test_hooks_are_called_once(install: Install) -> None:
    code = offering("mine").replace("    return", "    calls.append(1)\n    return")
    install("mine", "calls = []\n" + code)
    registry = Registry.installed()
    first = registry.algorithms["mine"]
    assert registry.load().algorithms["mine"] is first
    assert sys.modules["face_mine_qplug_mine"].calls == [1]


def test_a_plugin_is_opened_once_and_its_commands_asked_for_once() -> None:
    calls = []

    class Face:
        def __init__(self) -> None:
            calls.append("open")

        @hookimpl
        def qplug_commands(self) -> None:
            calls.append("commands")

    registry = Registry([Plugin("mine", "a test", __name__, Face)])
    registry.load().load_commands().load_commands()
    assert calls == ["open", "commands"]


def test_an_object_is_a_plugin_too() -> None:
    class Mine(Algorithm[Any]):
        """Text."""

        name = "mine"

    class Face:
        @hookimpl
        def qplug_algorithms(self) -> list[type[Algorithm[Any]]]:
            return [Mine]

    registry = Registry([Plugin("mine", "a test", __name__, Face)])
    assert registry.algorithms["mine"] is Mine
    assert registry.algorithms.owners("mine") == registry.plugins


HOOK = "from qplug import hookimpl\n@hookimpl\ndef "
#: Code that breaks while it is imported or asked, and the error that results.
BREAKING = {
    "missing import": ("import not_there_at_all", "ModuleNotFoundError: No module named"),
    "syntax": ("def", "SyntaxError"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "odd exception": (
        "class Odd(BaseException): pass\nraise Odd('strange')",
        "Odd: strange",
    ),
    "no hook": ("def qplug_algorithms(): return []", "TypeError: .* is @hookimpl missing?"),
    "unknown hook": (
        f"{HOOK}qplug_algoritms(): return []",
        "PluginValidationError: unknown hook 'qplug_algoritms'",
    ),
    "unknown argument": (
        f"{HOOK}qplug_algorithms(model): return []",
        r"PluginValidationError: .*(?s:.)*Argument\(s\) {'model'}",
    ),
    "hook raises": (f"{HOOK}qplug_algorithms(): 1 / 0", "ZeroDivisionError"),
    "forgot return": (
        f"{HOOK}qplug_algorithms(): pass",
        "TypeError: qplug_algorithms must return a list, not None",
    ),
    "one name twice": (
        offering("same", "same"),
        "ValueError: it offers algorithm 'same' twice",
    ),
}
#: What a sound plugin of a kind has, what stands there instead, and the error that results.
SPOILT = {
    "not a list": (
        *("algorithm", "[C0]", "C0"),
        "TypeError: qplug_algorithms must return a list, not <class",
    ),
    "yields, then exits": (
        *("algorithm", "return [C0]", "yield C0; raise SystemExit"),
        "SystemExit",
    ),
    "not a class": (
        *("algorithm", "[C0]", "['broken']"),
        "TypeError: 'broken' is not a subclass of qplug.Algorithm",
    ),
    "an instance": (
        *("algorithm", "[C0]", "[C0(None)]"),
        "TypeError: .* is not a subclass of qplug.Algorithm",
    ),
    "wrong base": (
        *("dataset", "qplug_datasets", "qplug_algorithms"),
        "TypeError: .*C0'> is not a subclass of qplug.Algorithm",
    ),
    "abstract": (
        *("dataset", "documents", "document"),
        "TypeError: C0 does not define: documents",
    ),
    "no name": (
        *("algorithm", "name = ", "label = "),
        "ValueError: C0.name must be lower case, digits and hyphens, not None",
    ),
    "no docstring": ("algorithm", "'Text.'", "", "ValueError: C0 needs a docstring"),
    "blank docstring": (
        *("algorithm", "'Text.'", "'''\n    '''"),
        "ValueError: C0 needs a docstring",
    ),
    "odd option": (
        "algorithm",
        "pass",
        "from dataclasses import make_dataclass as m\n"
        "    Params = m('P', [('x', int, 1)], frozen=True)",
        r"TypeError: P\.x must be Annotated",
    ),
    "params thaw": (
        *("algorithm", "pass", "Params = dict"),
        "TypeError: dict must be a frozen dataclass",
    ),
}


def spoilt(kind: str, part: str, other: str) -> str:
    """Returns the code of a plugin that offers ``broken``, with ``other`` in place of ``part``."""
    sound = offering("broken", kind=kind)
    assert part in sound
    return sound.replace(part, other)


BROKEN = BREAKING | {case: (spoilt(*change), error) for case, (*change, error) in SPOILT.items()}


@pytest.mark.parametrize(("code", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_stops_no_other_and_says_why(
    install: Install, code: str, reason: str
) -> None:
    install("a", offering("a"))
    install("broken", code)
    install("z", offering("z"))
    registry = Registry.installed()
    assert list(registry.algorithms) == ["a", "z"]
    assert list(registry.datasets) == []
    assert [p.status for p in registry.plugins] == ["ok", "failed", "ok"]
    with pytest.raises(PluginError, match=rf"^plugin broken \(qplug-broken 1.0\): {reason}") as no:
        registry.algorithms["broken"]
    assert no.value.__cause__ is registry.plugins[1].error


@pytest.mark.parametrize("name", ["Mine", "my_idea", "1st", "", "a b", "mine\n", "ä", "-a", 7])
def test_names_are_lower_case_digits_and_hyphens(install: Install, name: object) -> None:
    install("broken", offering("fine").replace("'fine'", repr(name)))
    registry = Registry.installed().load()
    assert f"not {name!r}" in str(registry.plugins[0].error)
    assert list(registry.algorithms) == []


@pytest.mark.parametrize("name", ["a", "gptq", "my-idea", "w4a16-2"])
def test_good_names_are_taken(install: Install, name: str) -> None:
    install("mine", offering(name))
    assert list(Registry.installed().algorithms) == [name]


def test_keyboard_interrupt_is_the_users_and_passes(install: Install) -> None:
    install("slow", "raise KeyboardInterrupt")
    registry = Registry.installed()
    with pytest.raises(KeyboardInterrupt):
        registry.load()
    assert registry.plugins[0].error is None


def test_a_hook_of_another_version_may_be_marked_optional(install: Install) -> None:
    code = "\n@hookimpl(optionalhook=True)\ndef qplug_of_the_future(x): return x\n"
    install("mine", offering("mine") + code)
    assert list(Registry.installed().algorithms) == ["mine"]


def test_a_plugin_is_taken_whole_or_not_at_all(install: Install) -> None:
    code = "\n@hookimpl\ndef qplug_exporters(): return [C0]\n"
    install("half", offering("half") + code)
    install("whole", offering("whole"))
    registry = Registry.installed()
    assert list(registry.algorithms) == ["whole"]
    assert registry.plugins[0].offers == {}
    with pytest.raises(PluginError, match=r"C0'> is not a subclass of qplug\.Exporter"):
        registry.algorithms["half"]


def test_two_plugins_with_one_offer_clash_by_that_name_only(install: Install) -> None:
    install("first", offering("gptq", "one"))
    install("second", offering("gptq", "two"))
    registry = Registry.installed()
    sentence = (
        "algorithm 'gptq' comes from first (qplug-first 1.0) and second (qplug-second 1.0);"
        " drop one: -p no:first or -p no:second"
    )
    with pytest.raises(QplugError) as no:
        registry.algorithms["gptq"]
    assert str(no.value) == registry.algorithms.clash("gptq") == sentence
    assert registry.algorithms["one"].name == "one"
    assert registry.algorithms.clash("two") is None
    assert list(registry.algorithms) == ["gptq", "one", "two"]
    dropped = Registry.installed(blocked=["first"])
    assert dropped.algorithms["gptq"].__module__ == "face_second_qplug_second"


def test_one_name_may_be_an_algorithm_and_a_dataset(install: Install) -> None:
    install("mine", offering("mine"))
    install("text", offering("mine", kind="dataset"))
    registry = Registry.installed()
    assert registry.algorithms["mine"].__module__ == "face_mine_qplug_mine"
    assert registry.datasets["mine"].__module__ == "face_text_qplug_text"


def test_a_plugin_cannot_wrap_the_hooks_of_another(install: Install) -> None:
    install("mine", offering("mine"))
    wrapper = "from qplug import hookimpl\n@hookimpl(wrapper=True)\ndef qplug_algorithms():\n"
    install("thief", wrapper + "    yield\n    return []\n")
    assert list(Registry.installed().algorithms) == ["mine"]


def test_of_plugins_with_one_name_qplugs_own_is_taken(install: Install) -> None:
    install("rtn", offering("rtn", "more"), package="aaa-rtn 3.0")
    install("rtn", offering("rtn"), package="qplug 0.1")
    registry = Registry.installed()
    assert registry.algorithms["rtn"].__module__ == "face_rtn_qplug"
    assert [(p.source, p.status) for p in registry.plugins] == [
        ("qplug 0.1", "ok"),
        ("aaa-rtn 3.0", "failed"),
    ]
    assert not imported("rtn_aaa")
    assert str(registry.plugins[1].error) == "the name of this plugin is taken by rtn (qplug 0.1)"


def test_of_strangers_with_one_name_the_order_of_installation_says_nothing(
    install: Install,
) -> None:
    install("x", offering("x"), package="zzz 1.0")
    install("x", offering("x"), package="bbb 1.0")
    assert Registry.installed().algorithms["x"].__module__ == "face_x_bbb"
    blocked = Registry.installed(blocked=["x"])
    assert [(p.status, p.error) for p in blocked.plugins] == [("blocked", None)] * 2


def test_an_unknown_name_is_answered_with_the_known(install: Install) -> None:
    install("two", offering("rtn", "gptq"))
    install("bad", "raise ValueError")
    algorithms = Registry.installed().algorithms
    with pytest.raises(QplugError) as no:
        algorithms["rtnn"]
    assert str(no.value) == (
        "no algorithm 'rtnn'. Did you mean 'rtn'? There are: gptq, rtn."
        " Broken plugins: bad; see qplug plugins check"
    )
    assert algorithms.get("rtnn") is None


def test_an_unknown_name_among_none() -> None:
    with pytest.raises(QplugError, match=r"^no dataset 'x'\. There are: none\.$"):
        Registry([]).datasets["x"]


def test_a_plugin_is_blocked_by_name_and_never_imported(install: Install) -> None:
    install("my_idea", offering("my-idea"))
    install("rtn", offering("rtn"))
    registry = Registry.installed(blocked=["my-idea"])
    assert list(registry.algorithms) == ["rtn"]
    assert not imported("my_idea")
    assert registry.plugins[0].status == "blocked"
    with pytest.raises(QplugError, match="'my-idea' is switched off by -p no:my_idea"):
        registry.algorithms["my-idea"]
    with pytest.raises(QplugError, match=r"^no algorithm 'other'\. There are: rtn\.$"):
        registry.algorithms["other"]


def test_blocking_what_is_not_there_is_an_error(install: Install) -> None:
    install("gptq", offering("gptq"))
    with pytest.raises(QplugError, match=r"^-p no:gptqq: no such plugin\. Did you mean 'gptq'\?$"):
        Registry.installed(blocked=["gptqq"])


@pytest.mark.parametrize(
    ("allowed", "left"),
    [("a", ["a"]), ("b, a", ["a", "b"]), ("", []), ("nothing", []), (None, ["a", "b"])],
)
def test_the_environment_names_the_only_plugins(
    install: Install, monkeypatch: pytest.MonkeyPatch, allowed: str | None, left: list[str]
) -> None:
    install("a", offering("a"))
    install("b", offering("b"))
    if allowed is not None:
        monkeypatch.setenv("QPLUG_PLUGINS", allowed)
    registry = Registry.installed()
    assert list(registry.algorithms) == left
    for plugin in registry.plugins:
        assert imported(plugin.name) == (plugin.name in left)
        assert plugin.blocked == ("" if plugin.name in left else "QPLUG_PLUGINS")


def test_only_what_ships_with_qplug(install: Install) -> None:
    install("own", offering("own"), package="qplug 0.1")
    install("other", offering("other"), package="qplug-extra 0.1")
    registry = Registry.installed(only_shipped=True)
    assert list(registry.algorithms) == ["own"]
    with pytest.raises(QplugError, match="'other' is switched off by --no-plugins"):
        registry.algorithms["other"]


def test_a_package_without_metadata_stops_no_other(install: Install, tmp_path: Path) -> None:
    install("gone", offering("gone"))
    install("mine", offering("mine"))
    (tmp_path / "qplug_gone-1.0.dist-info" / "METADATA").unlink()
    registry = Registry.installed()
    assert "mine" in registry.algorithms
    assert registry.plugins[0].source == "a package without metadata"


def test_a_package_that_cannot_tell_its_name_stops_no_other() -> None:
    class Nameless(PathDistribution):
        @property
        def metadata(self) -> NoReturn:
            raise KeyError("Name")

    (entry,) = (e for e in entry_points(group="console_scripts") if e.name == "pytest")
    vars(entry)["dist"] = Nameless(Path())
    assert Plugin.of_entry(entry).source == "a package without metadata"


def test_a_package_is_asked_for_its_name_once(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each of its plugins: metadata are long to parse."""
    for name in ("one", "two", "three"):
        install(name, offering(name), package="qplug-many 1.0")
    read = PathDistribution.read_text
    asked = []

    def counted(package: PathDistribution, file: str) -> str | None:
        asked.append(file)
        return read(package, file)

    monkeypatch.setattr(PathDistribution, "read_text", counted)
    sources = {plugin.source for plugin in Registry.installed().plugins}
    assert sources == {"qplug-many 1.0"}
    assert asked.count("METADATA") == 2  # for its name, and for its version


def test_an_entry_that_names_no_module_fails_alone(install: Install, tmp_path: Path) -> None:
    install("bad", offering("bad"))
    install("mine", offering("mine"))
    entries = tmp_path / "qplug_bad-1.0.dist-info" / "entry_points.txt"
    entries.write_text("[qplug]\nbad = face_bad_qplug_bad:nothing\n")
    registry = Registry.installed()
    assert list(registry.algorithms) == ["mine"]
    with pytest.raises(PluginError, match="has no attribute 'nothing'"):
        registry.algorithms["bad"]


# --- files ---------------------------------------------------------------------------------------

WITH_PARAMS = """
from __future__ import annotations
from dataclasses import dataclass
from typing import Annotated
from qplug import Algorithm, Param, hookimpl

@dataclass(frozen=True)
class Params:
    bits: Annotated[int, Param("Bits.")] = 4

class Mine(Algorithm[Params]):
    "Text."
    name = "my-idea"
    Params = Params

@hookimpl
def qplug_algorithms():
    return [Mine]
"""


@pytest.fixture
def write_file(install: Install, tmp_path: Path) -> Callable[..., Path]:
    """Writes a plugin that is a file; no other is there but those that ``install`` installs."""

    def write(code: str, name: str = "idea.py") -> Path:
        (tmp_path / name).write_text(code)
        return tmp_path / name

    return write


def test_a_file_is_a_plugin(write_file: Callable[..., Path]) -> None:
    file = write_file(WITH_PARAMS)
    registry = Registry.installed(files=[file])
    assert str(registry.plugins[0]) == f"idea ({file})"
    assert "qplug_file_idea" not in sys.modules
    mine = registry.algorithms["my-idea"]
    assert mine.Params().bits == 4


def test_a_file_hides_no_module_of_its_name(write_file: Callable[..., Path]) -> None:
    file = write_file(offering("mine"), "json.py")
    before = sys.modules["json"]
    assert list(Registry.installed(files=[file]).algorithms) == ["mine"]
    assert sys.modules["json"] is before


def test_a_file_was_asked_for_so_if_it_is_broken_a_miss_says_so(
    write_file: Callable[..., Path],
) -> None:
    file = write_file("raise ValueError('not yet')")
    registry = Registry.installed(files=[file])
    with pytest.raises(PluginError, match=r"^plugin idea \(.*idea.py\): ValueError: not yet$"):
        registry.algorithms["something"]
    assert "qplug_file_idea" not in sys.modules


def test_a_file_that_is_not_there_fails_alone(install: Install, tmp_path: Path) -> None:
    install("mine", offering("mine"))
    registry = Registry.installed(files=[tmp_path / "none.py", tmp_path / "text.txt"])
    assert list(registry.algorithms) == ["mine"]
    assert [type(p.error) for p in registry.plugins] == [
        type(None),
        FileNotFoundError,
        ImportError,
    ]


def test_a_file_takes_the_place_of_a_plugin_of_its_name(
    install: Install, write_file: Callable[..., Path]
) -> None:
    install("rtn", offering("rtn"), package="qplug 0.1")
    file = write_file(offering("rtn"), "rtn.py")
    registry = Registry.installed(files=[file])
    assert registry.algorithms["rtn"].__module__ == "qplug_file_rtn"


def test_a_file_is_left_in_unless_blocked_by_name(
    write_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_file(offering("idea"))
    monkeypatch.setenv("QPLUG_PLUGINS", "")
    assert list(Registry.installed(only_shipped=True, files=[file]).algorithms) == ["idea"]
    assert list(Registry.installed(blocked=["idea"], files=[file]).algorithms) == []


# --- commands ------------------------------------------------------------------------------------


def commanding(*names: str) -> str:
    added = "".join(f"    group.add_command(click.Command({name!r}))\n" for name in names)
    return (
        f"import click\nfrom qplug import hookimpl\n@hookimpl\ndef qplug_commands(group):\n{added}"
    )


def test_commands_are_asked_for_apart_from_components(install: Install) -> None:
    components = "\n@hookimpl\ndef qplug_algorithms(): 1 / 0\n"
    install("mine", commanding("hello", "bye") + components)
    registry = Registry.installed()
    assert list(registry.commands) == ["bye", "hello"]
    assert isinstance(registry.commands["hello"], click.Command)
    assert registry.plugins[0].status == "ok"
    registry.load()
    assert list(registry.commands) == []
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        registry.commands["mine"]


def test_commands_are_not_asked_for_with_components(install: Install) -> None:
    install("mine", offering("mine") + "\n@hookimpl\ndef qplug_commands(group): 1 / 0\n")
    registry = Registry.installed()
    assert list(registry.algorithms) == ["mine"]
    registry.load_commands()
    assert list(registry.algorithms) == []
    assert registry.algorithms.owners("mine") == []


def test_a_plugin_that_breaks_while_it_adds_commands_adds_none(install: Install) -> None:
    install("bad", commanding("one") + "    raise SystemExit\n")
    install("mine", commanding("two"))
    registry = Registry.installed()
    assert list(registry.commands) == ["two"]
    assert [p.status for p in registry.plugins] == ["failed", "ok"]


def test_commands_of_one_name_clash(install: Install) -> None:
    install("a", commanding("hello", "other"))
    install("b", commanding("hello"))
    commands = Registry.installed().commands
    with pytest.raises(QplugError, match=r"^command 'hello' comes from a \(.*\) and b \("):
        commands.get("hello")
    assert commands["other"].name == "other"


# --- watching and blaming ------------------------------------------------------------------------


def test_tracing_prints_who_answered_what(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("mine", offering("mine") + "\n@hookimpl\ndef qplug_commands(group): 1 / 0\n")
    monkeypatch.setenv("QPLUG_TRACE", "1")
    Registry.installed().load().load_commands()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "qplug_algorithms(): mine (qplug-mine 1.0): [[<class 'face_mine_qplug_mine.C0'>]]",
        "qplug_commands(group=<Group qplug>): mine (qplug-mine 1.0):"
        " raised ZeroDivisionError('division by zero')",
    ]


@pytest.mark.parametrize("value", ["", "0", None])
def test_no_tracing_unless_asked_for(
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: str | None,
) -> None:
    install("mine", offering("mine"))
    if value is not None:
        monkeypatch.setenv("QPLUG_TRACE", value)
    assert list(Registry.installed().algorithms) == ["mine"]
    assert capsys.readouterr().err == ""


def test_an_error_is_blamed_on_the_plugin_that_it_passed_through(install: Install) -> None:
    fails = "\n    def quantize(self, block):\n        return block()\n"
    install("mine", offering("mine").replace("    pass", fails))
    install("other", offering("other"))

    class Face:
        @hookimpl
        def qplug_datasets(self) -> list[Any]:
            return []

    entries = Registry.installed().plugins
    registry = Registry([*entries, Plugin("core", "a test", "qplug.api", Face)])
    algorithm = registry.algorithms["mine"](None)
    for block in (object(), Path("not there").read_text):
        with pytest.raises((TypeError, FileNotFoundError)) as bug:
            algorithm.quantize(block)  # type: ignore[arg-type]
        assert registry.blame(bug.value) is registry.plugins[1]
    with pytest.raises(NotImplementedError) as ours:
        registry.algorithms["other"](None).quantize(object())  # type: ignore[arg-type]
    assert registry.blame(ours.value) is None
