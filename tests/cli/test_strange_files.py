"""Files that no model has, each found by an attack: one line, in no time, and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qplug.checkpoint.locate import find_model
from qplug.errors import QplugError
from qplug.machine.memory import naming_memory
from qplug.run import written as run
from qplug.run.quantize import quantize

if TYPE_CHECKING:
    from click.testing import Result

Cli = Callable[..., "Result"]
TINY = ("--samples", "2", "--seq-len", "16")
READERS = ("inspect", "verify")


def line(result: Result) -> str:
    """The one line that a refused command prints, after the line that says what it opens."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    before = ("Warning: ", "opening ")
    (only,) = [text for text in result.stderr.splitlines() if not text.startswith(before)]
    return only


def edit(path: Path, change: Callable[[Any], object]) -> None:
    held = json.loads(path.read_text())
    change(held)
    path.unlink()  # it may be a link to the file of another test
    path.write_text(json.dumps(held))


@pytest.fixture(scope="module")
def _demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(find_model("qplug:demo"), tmp_path_factory.mktemp("demo") / "m"))


@pytest.fixture(scope="module")
def _finished(_demo: Path, cli: Cli) -> Path:
    out = _demo.parent / "out"
    assert cli("quantize", "--algo", "rtn", _demo, "--out", out, "--device", "cpu").exit_code == 0
    return out


@pytest.fixture
def model(_demo: Path, tmp_path: Path) -> Path:
    """A float model whose files can be changed."""
    return Path(shutil.copytree(_demo, tmp_path / "model", copy_function=os.link))


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A quantized folder whose files can be changed."""
    return Path(shutil.copytree(_finished, tmp_path / "finished", copy_function=os.link))


# --- what is no regular file ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "qplug.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (os.mkfifo, "cannot be read: it is a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "is a link out of its folder"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
        (Path.mkdir, "cannot be read: it is a folder"),
    ],
    ids=["a pipe", "a device", "a loop", "a folder"],
)
def test_what_is_no_file(
    name: str, make: Callable[[Path], object], complaint: str, finished: Path, cli: Cli
) -> None:
    (finished / name).unlink()
    make(finished / name)
    for command in READERS:
        message = line(cli(command, finished))
        assert message.startswith(f"Error: {finished / name}: ")
        assert complaint in message


def test_an_index_that_is_a_pipe(model: Path, cli: Cli) -> None:
    os.mkfifo(model / "model.safetensors.index.json")
    assert line(cli("inspect", model)).endswith("it is a named pipe")


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the weights are 38"),
        ({"hidden_size": 2**31}, "hidden_size is 2147483648, but the widest tensor here has 4096"),
        ({"text_config": {"num_experts": 10**9}}, "text_config.num_experts is 1000000000"),
        ({"architectures": 5}, "architectures: must be a list, not 5"),
        ({"architectures": [None]}, "architectures[0]: must be a string, not None"),
        ({"torch_dtype": ["x"]}, "torch_dtype: must be a string"),
        ({"quantization_config": 1}, "quantization_config: must be a mapping, not 1"),
        ({"quantization_config": {"quant_method": []}}, "quant_method: must be a string"),
        ({"rope_parameters": "x"}, "config.json: "),
        ({"hidden_size": 1e308}, "hidden_size is 1e+308"),
        ({"num_key_value_heads": 3}, "config.json makes it"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_configuration_of_no_model(
    changes: dict[str, Any], complaint: str, model: Path, cli: Cli
) -> None:
    edit(model / "config.json", lambda config: config.update(changes))
    message = line(
        cli("quantize", "--algo", "rtn", model, "--out", model.parent / "out", "--device", "cpu")
    )
    assert complaint in message
    assert str(model) in message
    assert sorted(path.name for path in model.parent.iterdir()) == ["model"]


def test_a_model_that_does_not_run(model: Path, cli: Cli) -> None:
    """transformers takes this configuration, and stumbles over it in the first block."""
    edit(model / "config.json", lambda config: config.update(attention_dropout="x"))
    words = ("quantize", model, "--algo", "awq", *TINY, "--device", "cpu")
    result = cli(*words, "--out", model.parent / "out")
    if result.exit_code:
        assert str(model / "config.json") in line(result)
        assert sorted(path.name for path in model.parent.iterdir()) == ["model"]


@pytest.mark.parametrize(
    "changes",
    [
        {"ignore": 1e308},
        {"ignore": [1]},
        {"ignore": ["re:("]},
        {"config_groups": []},
        {"config_groups": {"group_0": None}},
    ],
    ids=str,
)
def test_a_quantization_that_is_none(changes: dict[str, Any], finished: Path, cli: Cli) -> None:
    edit(finished / "config.json", lambda config: config["quantization_config"].update(changes))
    for command in READERS:
        assert line(cli(command, finished)).startswith("Error: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [("symmetric", [[]]), ("strategy", {}), ("num_bits", "x"), ("group_size", "x")],
)
def test_a_scheme_that_is_none(key: str, value: object, finished: Path, cli: Cli) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value

    edit(finished / "config.json", change)
    for command in READERS:
        assert line(cli(command, finished)).startswith("Error: ")


# --- qplug.json -----------------------------------------------------------------------------------


def _first(record: dict[str, Any]) -> dict[str, Any]:
    return record["layers"][next(iter(record["layers"]))]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r.update(model=1), "model: must be a string, not 1"),
        (lambda r: _first(r).update(error=None), "error: must be a number, not None"),
        (lambda r: _first(r).update(loss="x"), "loss: must be a number, not 'x'"),
        (lambda r: _first(r).update(scheme=7), "scheme: must be a whole number from 0 to 0, not 7"),
        (lambda r: _first(r).update(inputs={"before": [1]}), "before: must be three numbers"),
        (lambda r: r.update(versions=[1]), "versions: must be a mapping, not [1]"),
        (lambda r: r.update(online="x"), "online: must be a list, not 'x'"),
        (lambda r: r["schemes"][0].update(weights=None), "a scheme needs a name and weights"),
        (lambda r: r["schemes"][0]["weights"].update(strategy=[]), "strategy: [] is wrong"),
        (lambda r: r["recipe"].update(backend=None), "recipe: is damaged: None is wrong"),
        (lambda r: r["recipe"].update(seed="x"), "recipe: is damaged: 'x' is wrong"),
        (lambda r: r.update(version=[]), "has format [], but this qplug reads 1"),
        (lambda r: r.pop("layers"), "lacks 'layers'"),
    ],
)
def test_a_record_that_is_none(
    change: Callable[[Any], object], complaint: str, finished: Path, cli: Cli
) -> None:
    edit(finished / "qplug.json", change)
    for command in READERS:
        message = line(cli(command, finished))
        assert message.startswith(f"Error: {finished / 'qplug.json'}: ")
        assert complaint in message


# --- the tokenizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "{", "[" * 10_000, "{}", '{"model": 1}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_none(name: str, text: str, model: Path, cli: Cli) -> None:
    (model / name).unlink()
    (model / name).write_text(text)
    words = ("quantize", model, "--algo", "awq", *TINY, "--dry-run", "--device", "cpu")
    result = cli(*words, "--out", model.parent / "out")
    if name == "tokenizer_config.json" and text in ("{}", '{"model": 1}'):
        return  # it need not say anything
    assert str(model) in line(result)


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.uint16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn],
    ids=str,
)
@pytest.mark.parametrize("algo", ["rtn", "awq"])
def test_weights_that_are_no_floats(algo: str, dtype: torch.dtype, model: Path, cli: Cli) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].float().to(dtype)
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    words = ("quantize", model, "--algo", algo, *TINY, "--device", "cpu")
    message = line(cli(*words, "--out", model.parent / "out"))
    kind = str(dtype).removeprefix("torch.")
    told = "qplug quantizes models in bfloat16, float16, float32"
    assert message == f"Error: {model}: {name} is {kind}; {told}"
    assert sorted(path.name for path in model.parent.iterdir()) == ["model"]


# --- the machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate"),
    ],
    ids=["Python", "CUDA", "CPU"],
)
@pytest.mark.parametrize("algo", ["rtn", "awq"])
def test_memory_that_runs_out(
    algo: str, error: Exception, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run, "streamed" if algo == "rtn" else "start_walk", run_out)
    with pytest.raises(QplugError, match=r"^out of memory: model\.") as caught:
        quantize(str(model), model.parent / "out", algo=algo, samples=2, seq_len=16, device="cpu")
    assert "on cpu" in str(caught.value)
    assert "another --device" in str(caught.value)
    assert ("2 samples of 16 tokens" in str(caught.value)) == (algo == "awq")
    assert sorted(path.name for path in model.parent.iterdir()) == ["model"]


def test_a_bug_is_not_taken_for_little_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), naming_memory(lambda: ""):
        raise RuntimeError("shapes cannot be multiplied")


def test_more_samples_than_memory(model: Path, cli: Cli) -> None:
    words = ("--algo", "awq", "--samples", 10**9, "--dry-run", "--device", "cpu")
    message = line(cli("quantize", "--algo", "rtn", model, "--out", model.parent / "out", *words))
    assert "--samples 1000000000 x --seq-len 512: more than 268435456 tokens" in message
