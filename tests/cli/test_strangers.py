"""Folders of strangers: they send no request, add no option, and write nothing but their names."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file

import qplug
from qplug.checkpoint.locate import find_model
from qplug.output.markdown import code_span, heading

Cli = Callable[..., Result]

#: A title for the terminal, a turned direction, a line, and marks of rich, Markdown and HTML.
EVIL = "a\x1b]0;pwn\x07\u202e\nError: forged`x`[bold][/nothing]</script><b>"


@pytest.fixture(scope="session")
def _quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stranger") / "out"
    qplug.quantize("qplug:demo", out, backend="sglang")
    return out


@pytest.fixture
def folder(_quantized: Path, tmp_path: Path) -> Path:
    """A sound folder without checksums, to be made a stranger's."""
    made = tmp_path / "folder"
    shutil.copytree(_quantized, made)
    edit_json(made / "qplug.json", lambda told: [told.pop(f"checksum{s}") for s in ("", "s")])
    return made


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Records whom a command would have asked; a request fails."""
    asked: list[str] = []
    download = huggingface_hub.snapshot_download

    def snapshot_download(model: str, **options: Any) -> str:
        if not options.get("local_files_only"):
            asked.append(model)
            raise OSError("no network")
        return str(download(model, **options))

    def connect(_: socket.socket, address: object) -> NoReturn:
        asked.append(str(address))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(socket.socket, "connect", connect)
    yield asked
    assert not asked


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def names(folder: Path, model: str) -> None:
    edit_json(folder / "qplug.json", lambda told: told.update(model=model))


# --- requests -------------------------------------------------------------------------------------

COMMANDS = {
    "verify": ["verify"],
    "verify --json": ["verify", "--json"],
    "serve": ["serve", "--dry-run"],
    "report": ["report"],
    "report --perplexity": ["report", "--perplexity", "--windows", "1", "--seq-len", "16"],
    "compare": ["compare", "--out", "page.html"],
    "eval": ["eval", "--windows", "1", "--seq-len", "16"],
    "inspect": ["inspect"],
}
#: The same, those that run the model among the slow tests: they print what the others print.
WITHOUT_MODEL = [
    pytest.param(name, marks=pytest.mark.slow if "--windows" in words else ())
    for name, words in COMMANDS.items()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_asks_the_hub_for_a_recorded_name(
    command: str, cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    names(folder, "stranger/model-of-7b")
    result = cli(*COMMANDS[command], "folder")
    assert result.exit_code == 0, (result.output, result.exception)


@pytest.mark.parametrize("command", ["verify", "serve", "report"])
def test_a_command_says_that_the_float_model_is_not_at_hand(
    command: str, cli: Cli, folder: Path
) -> None:
    names(folder, "stranger/model of 7b")
    result = cli(*COMMANDS[command], folder)
    assert (
        "not compared: the float model stranger/model of 7b is not at hand; "
        "pass --against 'stranger/model of 7b' to download it"
    ) in result.output.splitlines()


def test_json_has_the_name_that_is_not_at_hand(cli: Cli, folder: Path) -> None:
    names(folder, "stranger/model")
    told = json.loads(cli("verify", folder, "--json").stdout)
    assert (told["against"], told["missing"]) == (None, "stranger/model")


def test_only_the_user_has_the_hub_asked(cli: Cli, folder: Path, no_network: list[str]) -> None:
    names(folder, "stranger/model")
    assert cli("verify", folder, "--against", "stranger/model").exit_code == 1
    assert no_network == ["stranger/model"]
    no_network.clear()


def test_the_hubs_cache_is_on_this_machine(
    cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "models--a--demo"
    shutil.copytree(find_model("qplug:demo"), cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    names(folder, "a/demo")
    assert "relative error against a/demo" in cli("verify", folder).stdout


@pytest.mark.parametrize("model", ["/dev/zero", "/proc/self/mem", "..", "a/../b", "~/x", "a\0b"])
def test_a_recorded_path_that_is_no_model_is_not_at_hand(
    model: str, cli: Cli, folder: Path
) -> None:
    names(folder, model)
    result = cli("verify", folder)
    assert result.exit_code == 0, result.output
    assert "is not at hand; pass --against MODEL" in result.stdout


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
@pytest.mark.parametrize("name", ["--trust-remote-code", "-h", "--a=b"])
def test_the_name_of_a_folder_is_no_option_of_the_engine(
    name: str, backend: str, cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename(name)
    result = cli("serve", "--backend", backend, "--no-verify", "--dry-run", f"./{name}")
    words = shlex.split(result.stdout.splitlines()[0])
    assert name not in words
    assert f"./{name}" in words
    assert f"--served-model-name={name}" in words


def test_the_command_of_a_report_has_no_option_of_the_folder(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename("--flag")
    assert cli("report", "--out", "page.html", "--", "--flag").exit_code == 0
    page = Path("page.html").read_text()
    assert f"--model-path {Path('--flag').absolute()}" in page
    assert "--model-path --flag" not in page


# --- names ----------------------------------------------------------------------------------------


def in_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.0.{EVIL}.weight"] = tensors["model.embed_tokens.weight"][:4, :4].clone()
    save_file(tensors, folder / "model.safetensors")


def in_index(folder: Path) -> None:
    index = {"weight_map": {EVIL: "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def in_file(folder: Path) -> None:
    index = {"weight_map": {"x": EVIL}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def in_manifest(folder: Path) -> None:
    def change(told: dict[str, Any]) -> None:
        told["model"] = EVIL
        told["notes"] = [EVIL]
        told["versions"][EVIL] = EVIL
        told["recipe"]["algorithms"] = [EVIL]
        told["schemes"][0]["name"] = EVIL
        told["recipe"]["scheme"]["name"] = EVIL

    edit_json(folder / "qplug.json", change)


def in_layers(folder: Path) -> None:
    edit_json(
        folder / "qplug.json",
        lambda t: t["layers"].update({EVIL: next(iter(t["layers"].values()))}),
    )
    edit_json(
        folder / "config.json", lambda c: c["quantization_config"].update(ignore=[EVIL, "lm_head"])
    )


def in_backend(folder: Path) -> None:
    edit_json(folder / "qplug.json", lambda told: told["recipe"].update(backend=EVIL))


def in_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(architectures=[EVIL]))


def in_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(model_type=EVIL))


def in_method(folder: Path) -> None:
    (folder / "qplug.json").unlink()
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(quant_method=EVIL))


def in_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": EVIL}))
    (folder / "tokenizer.json").write_text("{")


PLACES = [
    *(in_tensor, in_index, in_file, in_manifest, in_layers, in_backend),
    *(in_architecture, in_model_type, in_method, in_tokenizer),
]


def all_show(text: str) -> bool:
    """Whether every character shows and changes no other, and no line of a name's own begins."""
    return text.replace("\n", "").isprintable() and "\nError: forged" not in text


def harmless(page: Path) -> bool:
    """Whether the names in a page have no element of their own; a line break there is a space."""
    text = page.read_text()
    own = text.count("</script>") == 1  # the page's
    return own and text.replace("\n", "").isprintable() and "<b>" not in text


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("command", WITHOUT_MODEL)
def test_names_only_show(
    command: str,
    place: Callable[[Path], None],
    cli: Cli,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder.parent)
    place(folder)
    result = cli(*COMMANDS[command], "folder")
    assert result.exit_code in (0, 1), (result.output, result.exception)
    assert all_show(result.output), result.output
    if "--json" in command and result.exit_code == 0:
        json.loads(result.stdout)
    for page in folder.parent.glob("*.html"):
        assert harmless(page)


@pytest.mark.parametrize("command", WITHOUT_MODEL)
def test_the_name_of_the_folder_only_shows(
    command: str, cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    name = EVIL.replace("/", "")
    folder.rename(name)
    result = cli(*COMMANDS[command], name)
    assert result.exit_code == 0, (result.output, result.exception)
    assert all_show(result.output)
    for page in Path().glob("*.html"):
        assert harmless(page)
    assert all_show(cli(*COMMANDS[command], "gone" + name).output)


@pytest.mark.parametrize(
    "words", [["\x1b[2J"], ["quantize", "--\x1b[2J"], ["inspect"], ["--\u202e"]]
)
def test_wrong_words_only_show(words: list[str], cli: Cli) -> None:
    result = cli(*words)
    assert result.exit_code == 2
    assert all_show(result.output)


def test_a_model_card_contains_names_and_nothing_of_their_own(
    cli: Cli, llama: Path, tmp_path: Path
) -> None:
    source = llama.rename(tmp_path / EVIL.replace("/", ""))
    out = tmp_path / "out"
    assert cli("quantize", "--algo", "rtn", source, "--group-size", 32, "--out", out).exit_code == 0
    card = (out / "README.md").read_text()
    assert all_show(card)
    fence = "``"
    assert (
        f"# {fence}a\\x1b]0;pwn\\x07\\u202e\\nError: forged`x`[bold][nothing]<script><b>{fence}, "
        in card
    )
    assert all(line.count(fence) == 2 for line in card.splitlines() if "forged" in line)
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")


@pytest.mark.parametrize(
    ("text", "span", "title"),
    [
        ("Llama-3.2_1B", "`Llama-3.2_1B`", "Llama-3.2_1B"),
        ("a`b", "``a`b``", "``a`b``"),
        ("``a`", "``` ``a` ```", "``` ``a` ```"),
        ("- x: y\n---", "`- x: y\\n---`", "`- x: y\\n---`"),
        ("<b>", "`<b>`", "`<b>`"),
    ],
)
def test_names_in_markdown(text: str, span: str, title: str) -> None:
    assert (code_span(text), heading(text)) == (span, title)
