"""SECURITY.md, held to account: what the code must not do, and what it must refuse."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qplug import QplugError
from qplug.checkpoint.open import INDEX, open_checkpoint
from qplug.cli.main import Deferred, main

ROOT = Path(__file__).parents[1]
MODULES = [*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
#: Values that the processes of one run tell each other.
PICKLES = {"core/qplug/machine/messages.py"}

_MODULES_THAT_RUN_DATA = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
_CALLS_THAT_RUN_DATA = {
    *("eval", "exec", "compile", "__import__", "torch.load", "numpy.load", "np.load"),
    *("os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
}


def faults(source: str) -> Iterator[str]:
    """What a module does that none of qplug may, by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
            yield from names & _MODULES_THAT_RUN_DATA
        elif isinstance(node, ast.ImportFrom):
            yield from {(node.module or "").partition(".")[0]} & _MODULES_THAT_RUN_DATA
        elif isinstance(node, ast.Call):
            yield from {ast.unparse(node.func)} & _CALLS_THAT_RUN_DATA
            for keyword in node.keywords:
                said = f"{keyword.arg}={ast.unparse(keyword.value)}"
                if said in ("shell=True", "trust_remote_code=True", "weights_only=False"):
                    yield said
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from _trusting(node)


def _trusting(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    """A ``trust_remote_code`` whose default is anything but False."""
    defaults: list[tuple[str, ast.expr | None]] = []
    if isinstance(node, ast.FunctionDef):
        plain = [*node.args.posonlyargs, *node.args.args]
        late = plain[len(plain) - len(node.args.defaults) :]
        defaults += [(arg.arg, value) for arg, value in zip(late, node.args.defaults, strict=True)]
        defaults += [
            (arg.arg, value)
            for arg, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        ]
    else:
        defaults += [
            (part.target.id, part.value)
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        ]
    for name, value in defaults:
        if name == "trust_remote_code" and value is not None and ast.unparse(value) != "False":
            yield f"{name}: {ast.unparse(value)}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_data_is_run(module: Path) -> None:
    found = set(faults(module.read_text(encoding="utf-8")))
    if module.relative_to(ROOT).as_posix() in PICKLES:
        found -= {"pickle"}
    assert not found


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("eval('1')", "eval"),
        ("exec(text)", "exec"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load"),
        ("run(words, shell=True)", "shell=True"),
        ("load(name, trust_remote_code=True)", "trust_remote_code=True"),
        ("def f(trust_remote_code=True): pass", "trust_remote_code: True"),
        ("def f(*, trust_remote_code: bool = ASKED): pass", "trust_remote_code: ASKED"),
        ("class A:\n    trust_remote_code: bool = True", "trust_remote_code: True"),
    ],
)
def test_what_is_forbidden_would_be_found(source: str, fault: str) -> None:
    assert list(faults(source)) == [fault]
    assert not list(faults("model.eval()\nre.compile('x')\ndef f(*, trust_remote_code): pass"))


def test_code_of_models_is_off_on_the_command_line() -> None:
    having = {}
    for name, command in main.commands.items():
        assert isinstance(command, Deferred)
        context = command.load().make_context(name, [], resilient_parsing=True)
        having[name] = context.params.get("trust_remote_code")
    assert {name for name, value in having.items() if value is False} >= {
        "quantize",
        "eval",
        "verify",
    }
    assert True not in having.values()


# --- paths ---------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with one shard and an index, and a shard like it elsewhere."""
    folder = tmp_path / "model"
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for place in (folder, tmp_path / "elsewhere"):
        save_file({"w": torch.zeros(2, 2)}, place / "shard.safetensors")
    _index(folder, "shard.safetensors")
    return folder


def _index(folder: Path, file: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": file}}))


@pytest.mark.parametrize(
    "file",
    [
        "../elsewhere/shard.safetensors",
        "{tmp}/elsewhere/shard.safetensors",
        "sub/../../x",
        "..",
        "",
    ],
)
def test_an_index_names_files_of_its_folder(model: Path, file: str) -> None:
    assert list(open_checkpoint(model).tensors) == ["w"]
    _index(model, file.format(tmp=model.parent))
    with pytest.raises(QplugError, match=r"is not a file of this folder|is not there"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    "name", ["shard.safetensors", "tokenizer.json", "config.json", "notes.txt"]
)
def test_links_out_of_the_folder_are_refused(model: Path, name: str) -> None:
    target = model.parent / "elsewhere" / name
    if name != "shard.safetensors":
        target.write_text('{"model_type": "llama"}')
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    with pytest.raises(QplugError, match=f"{name}: is a link out of its folder"):
        open_checkpoint(model)


def test_links_within_the_folder_and_to_it_are_followed(model: Path) -> None:
    (model / "shard.safetensors").rename(model / "first.safetensors")
    (model / "shard.safetensors").symlink_to("first.safetensors")
    (model.parent / "link").symlink_to(model)
    assert list(open_checkpoint(model.parent / "link").tensors) == ["w"]


def test_the_hubs_cache_may_link_to_its_blobs_alone(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    shutil.copytree(model, snapshot)
    (snapshot / "shard.safetensors").rename(blobs / "0123")
    (snapshot / "shard.safetensors").symlink_to("../../blobs/0123")
    assert list(open_checkpoint(snapshot).tensors) == ["w"]
    (tmp_path / "secret").write_text("secret")
    (blobs / "4567").symlink_to(tmp_path / "secret")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/4567")
    with pytest.raises(QplugError, match=r"tokenizer\.json: is a link out"):
        open_checkpoint(snapshot)
