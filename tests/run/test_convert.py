"""A quantized folder in another format: the same codes and scales, to the bit, or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import foreign_folders as foreign
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

import qplug
from qplug import Checkpoint, CodedTensor, QplugError, Registry, open_checkpoint
from qplug.numerics import dequantize

Cli = Callable[..., Result]
slow = partial(pytest.param, marks=pytest.mark.slow)

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def compressed(**changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**INT4, **changes}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


#: What other tools write, by name: ``quantization_config``, and how a weight is stored.
FOLDERS: dict[str, tuple[dict[str, Any], foreign.Store]] = {
    "AutoAWQ": (AWQ, foreign.awq),
    "AutoAWQ, zero points in the middle": (AWQ, partial(foreign.awq, sym=True)),
    "GPTQModel": (GPTQ, partial(foreign.gptq, sym=True)),
    "GPTQModel, asymmetric": ({**GPTQ, "sym": False}, partial(foreign.gptq, sym=False)),
    "GPTQModel, version 2": (
        {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
        partial(foreign.gptq, sym=False, v2=True),
    ),
    "llm-compressor": (compressed(), partial(foreign.compressed, sym=True)),
    "llm-compressor, asymmetric": (
        compressed(symmetric=False),
        partial(foreign.compressed, sym=False),
    ),
    "ModelOpt, fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, foreign.modelopt_fp8),
    "blocks of fp8": (
        {"quant_method": "fp8", "weight_block_size": [64, 128], "activation_scheme": "dynamic"},
        foreign.block_fp8,
    ),
}
SYM, ASYM = ("compressed-tensors", "gptq", "awq", "vllm"), ("compressed-tensors", "awq", "vllm")
#: The backends that have a place for the codes of a folder.
PLACES = {
    "AutoAWQ": ASYM,
    "AutoAWQ, zero points in the middle": (*ASYM, "gptq"),
    "GPTQModel": SYM,
    "GPTQModel, asymmetric": ASYM,
    "GPTQModel, version 2": ASYM,
    "llm-compressor": SYM,
    "llm-compressor, asymmetric": ASYM,
    "ModelOpt, fp8": ("compressed-tensors", "vllm", "sglang"),
    "blocks of fp8": ("compressed-tensors",),
}
#: Cases that the default suite runs too.
FAST = {
    ("AutoAWQ", "compressed-tensors"),
    ("GPTQModel, asymmetric", "awq"),
    ("ModelOpt, fp8", "vllm"),
}


@pytest.fixture(scope="module")
def folder(
    write_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """``folder("AutoAWQ")``: a folder as that tool writes it; to read, not to change."""
    made: dict[str, Path] = {}
    source = write_llama(tmp_path_factory.mktemp("float") / "llama", shards=2, vocab_size=4096)

    def make(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("foreign") / "model"
            made[name] = foreign.foreign(source, out, *FOLDERS[name])
        return made[name]

    return make


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(folder, readers=Registry.installed().sources)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of codes by name, as bits, and all other tensors as they are."""
    return {
        name: dequantize(tensor.codes()).contiguous().view(torch.int32)
        if isinstance(tensor, CodedTensor)
        else tensor.read()
        for name, tensor in opened(folder).tensors.items()
    }


def same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=[] if (name, backend) in FAST else pytest.mark.slow)
        for name, backends in PLACES.items()
        for backend in backends
    ],
)
def test_weights_are_the_same_to_the_bit(
    name: str, backend: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    result = qplug.convert(str(folder(name)), tmp_path / "out", backend=backend)
    assert len(result.errors) == 14
    assert result.source_format
    same(folder(name), tmp_path / "out")
    verified = qplug.verify(str(tmp_path / "out"))
    assert verified.ok, verified.problems
    assert verified.against == str(folder(name))
    recorded = json.loads((tmp_path / "out" / "qplug.json").read_text())
    assert recorded["model"] == folder(name).name
    assert recorded["recipe"]["algorithms"] == ["convert"]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("GPTQModel", ("awq", "compressed-tensors", "gptq")),
        slow("AutoAWQ", ("compressed-tensors", "awq")),
        slow("AutoAWQ, zero points in the middle", ("gptq", "awq")),
        slow("GPTQModel", ("compressed-tensors", "gptq")),
        slow("llm-compressor", ("gptq", "compressed-tensors")),
        slow("llm-compressor, asymmetric", ("awq", "compressed-tensors")),
    ],
)
def test_a_round_trip_gives_the_tensors_that_the_other_tool_wrote(
    name: str, way: tuple[str, ...], folder: Callable[[str], Path], tmp_path: Path
) -> None:
    here = folder(name)
    for number, backend in enumerate(way):
        out = tmp_path / f"{number}-{backend}"
        qplug.convert(str(here), out, backend=backend)
        here = out
    first, last = (load_file(path / "model.safetensors") for path in (folder(name), here))
    assert first.keys() == last.keys()
    for tensor, value in first.items():
        assert value.dtype == last[tensor].dtype
        assert torch.equal(value, last[tensor]), tensor


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backend", "says"),
    [
        ("AutoAWQ", "gptq", "stores no zero points"),
        ("GPTQModel, asymmetric", "gptq", "stores no zero points"),
        ("ModelOpt, fp8", "awq", "awq: the format stores int4 with zero points"),
        ("GPTQModel", "hf", "hf: stores float weights"),
    ],
)
def test_codes_that_have_no_place_are_refused(
    name: str, backend: str, says: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(QplugError) as caught:
        qplug.convert(str(folder(name)), tmp_path / "out", backend=backend)
    message = str(caught.value)
    assert says in message
    assert message.endswith(f"qplug quantize {folder(name)} --backend {backend}")
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_reordered_columns_are_refused(pristine_llama: Path, tmp_path: Path) -> None:
    store = partial(foreign.gptq, sym=True, reorder=True)
    source = foreign.foreign(pristine_llama, tmp_path / "in", {**GPTQ, "desc_act": True}, store)
    with pytest.raises(QplugError, match=r"its columns are reordered \(desc_act\)"):
        qplug.convert(str(source), tmp_path / "out", backend="compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_nvfp4_whose_global_scale_has_no_exact_inverse_is_refused(
    tmp_path: Path, pristine_llama: Path
) -> None:
    def store(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        out, width = weight.shape
        return {
            "weight": torch.randint(0, 256, (out, width // 2), dtype=torch.uint8),
            "weight_scale": torch.full((out, width // 16), 3.5).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(0.00123),
            "input_scale": torch.tensor(0.5),
        }

    told = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    source = foreign.foreign(pristine_llama, tmp_path / "in", told, store)
    with pytest.raises(QplugError, match="stores its scales otherwise"):
        qplug.convert(str(source), tmp_path / "out", backend="compressed-tensors")


def test_scales_of_a_cache_are_dropped_with_a_note(
    folder: Callable[[str], Path], tmp_path: Path, cli: Cli
) -> None:
    source = tmp_path / "in"
    shutil.copytree(folder("ModelOpt, fp8"), source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["kv_cache_quant_algo"] = "FP8"
    (source / "config.json").write_text(json.dumps(config))
    done = cli("convert", source, tmp_path / "out", "--backend", "vllm")
    assert "note: the scales of the KV cache are not kept" in done.output


def test_a_float_model_is_refused(pristine_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="is not quantized; quantize it: qplug quantize"):
        qplug.convert(str(pristine_llama), tmp_path / "out", backend="vllm")


# --- qplug's own folders, and the command --------------------------------------------------------


@pytest.mark.slow
def test_nvfp4_of_qplug_between_both_formats(tmp_path: Path) -> None:
    first = tmp_path / "vllm"
    qplug.quantize(
        "qplug:demo", first, scheme="NVFP4", backend="vllm", device="cpu", samples=2, seq_len=32
    )
    for number, backend in enumerate(("sglang", "vllm")):
        source = first if not number else tmp_path / "sglang"
        qplug.convert(str(source), tmp_path / (backend if not number else "back"), backend=backend)
    names = ("vllm", "sglang", "back")
    assert "weight_scale_2" in " ".join(load_file(tmp_path / "sglang" / "model.safetensors"))
    for name in names:
        assert qplug.verify(str(tmp_path / name)).ok
    same(tmp_path / "vllm", tmp_path / "sglang")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("vllm", "back")]
    assert files[0] == files[1]


def test_the_command(folder: Callable[[str], Path], tmp_path: Path, cli: Cli) -> None:
    words = ("convert", folder("AutoAWQ"), tmp_path / "out", "--backend", "compressed-tensors")
    tried = cli(*words, "--dry-run")
    assert "would be written" in tried.output
    assert not list(tmp_path.iterdir())
    done = cli(*words)
    assert done.exit_code == 0, done.output
    assert "14 layers keep their codes, from awq of 4 bits in groups of 32" in done.output
    assert cli("verify", tmp_path / "out").exit_code == 0
    assert cli(*words).exit_code == 1
    inspected = json.loads(cli("inspect", tmp_path / "out", "--json").stdout)
    assert inspected["source"] == folder("AutoAWQ").name


@pytest.mark.parametrize("name", ["AutoAWQ", slow("GPTQModel, asymmetric"), slow("blocks of fp8")])
def test_a_quantized_source_is_quantized_and_compared(
    name: str, folder: Callable[[str], Path], tmp_path: Path, cli: Cli
) -> None:
    words = ("--scheme", "FP8_DYNAMIC", "--backend", "vllm", "--out", tmp_path / "out")
    done = cli("quantize", "--algo", "rtn", folder(name), *words)
    assert done.exit_code == 0, done.output
    assert "source: is quantized (" in done.output
    verified = cli("verify", tmp_path / "out", "--json")
    assert verified.exit_code == 0, verified.output
    assert json.loads(verified.stdout)["against"] == str(folder(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FOLDERS))
def test_commands_open_folders_of_other_tools(
    name: str, folder: Callable[[str], Path], cli: Cli
) -> None:
    shown = cli("inspect", folder(name))
    assert shown.exit_code == 0, shown.output
    measured = cli("eval", folder(name), "--windows", 1, "--seq-len", 32, "--device", "cpu")
    assert measured.exit_code == 0, measured.output


def test_what_its_engine_refuses_is_opened_as_float_but_not_verified(
    folder: Callable[[str], Path], cli: Cli
) -> None:
    source = folder("GPTQModel, asymmetric")
    assert "read as float from: gptq of 4 bits in groups of 32" in cli("inspect", source).output
    assert "engines refuse gptq that is asymmetric" in cli("verify", source).output


def test_a_stopped_run_goes_on_but_not_with_another_reading(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "in"
    shutil.copytree(folder("GPTQModel, asymmetric"), source)

    def convert(out: Path, watch: Any = None) -> qplug.Result:
        return qplug.convert(str(source), out, backend="awq", watch=watch)

    def stop(done: int, *_: object) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", stop)
    told = (source / "config.json").read_text()
    config = json.loads(told)
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(QplugError, match="holds an unfinished run with another model"):
        convert(tmp_path / "out")
    (source / "config.json").write_text(told)
    assert convert(tmp_path / "out").resumed == 9
    convert(tmp_path / "whole")
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert one.read_bytes() == other.read_bytes()
