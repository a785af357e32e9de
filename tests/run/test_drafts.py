"""Draft layers (MTP) are a part of the model: kept, quantized or left out, as the recipe says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qplug
from qplug import QplugError
from qplug.checkpoint.draft_names import announced, is_draft
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.checkpoint.unindexed import left_behind

if TYPE_CHECKING:
    from click.testing import Result

    Cli = Callable[..., Result]

#: The parts of a draft layer, and their sizes in a model of width 256.
PARTS = {
    "self_attn.q_proj.weight": (256, 256),
    "self_attn.k_proj.weight": (128, 256),
    "self_attn.v_proj.weight": (128, 256),
    "self_attn.o_proj.weight": (256, 256),
    "mlp.gate_proj.weight": (256, 256),
    "mlp.up_proj.weight": (256, 256),
    "mlp.down_proj.weight": (256, 256),
    "input_layernorm.weight": (256,),
}
JOINS = {"numbered": "model.layers.2.eh_proj.weight", "named": "mtp.fc.weight"}
LAYERS = {"numbered": "model.layers.2", "named": "mtp.layers.0"}


@pytest.fixture(params=list(LAYERS))
def naming(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(tmp_path: Path, write_llama: Callable[..., Path], naming: str) -> Path:
    """A model of two blocks and a draft layer, which is in a file that no index names."""
    folder = write_llama(
        tmp_path / "model", intermediate_size=256, num_hidden_layers=2, vocab_size=4096
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / name, folder)
    torch.manual_seed(1)
    tensors = {f"{LAYERS[naming]}.{part}": torch.randn(shape) for part, shape in PARTS.items()}
    tensors[JOINS[naming]] = torch.randn(256, 512)
    save_file({name: t.bfloat16() for name, t in tensors.items()}, folder / "mtp.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantize(model: Path, out: Path, **words: Any) -> qplug.Result:
    return qplug.quantize(str(model), out, **{"group_size": 64, "backend": "vllm", **words})


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("backend", ["vllm", "sglang", "gptq", "fake"])
def test_they_are_kept_and_ignored(model: Path, tmp_path: Path, naming: str, backend: str) -> None:
    out = tmp_path / "out"
    quantize(model, out, backend=backend)
    verified = qplug.verify(str(out))
    assert verified.ok, verified.problems
    held, source = stored(out), load_file(model / "mtp.safetensors")
    assert all(torch.equal(held[name], tensor) for name, tensor in source.items())
    quantization = json.loads((out / "config.json").read_text()).get("quantization_config", {})
    if "ignore" in quantization:
        modules = [f"{LAYERS[naming]}.self_attn.qkv_proj"]
        modules += ["model.decoder.mlp.down_proj"] if naming == "numbered" else []
        for module in modules:
            entries = [e[3:] for e in quantization["ignore"] if e.startswith("re:")]
            assert any(re.match(entry, module) for entry in entries)


@pytest.mark.parametrize("words", [{"algo": "rtn"}, {"algo": "gptq", "samples": 2, "seq_len": 32}])
def test_they_are_quantized(
    model: Path, tmp_path: Path, naming: str, words: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    result = quantize(model, out, mtp="quantize", **words)
    assert f"{LAYERS[naming]}.mlp.down_proj" in result.errors
    verified = qplug.verify(str(out))
    assert verified.ok, verified.problems
    held = stored(out)
    assert f"{LAYERS[naming]}.self_attn.q_proj.weight_packed" in held
    assert JOINS[naming] in held


def test_they_are_dropped(model: Path, tmp_path: Path, naming: str) -> None:
    out = tmp_path / "out"
    quantize(model, out, mtp="drop")
    assert not any(is_draft(name, 2) for name in stored(out))
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    verified = qplug.verify(str(out))
    assert verified.ok, verified.problems


def test_a_folder_that_lost_them_is_a_problem(model: Path, tmp_path: Path, naming: str) -> None:
    out = tmp_path / "out"
    quantize(model, out)
    held = {name: t for name, t in stored(out).items() if not is_draft(name, 2)}
    save_file(held, out / "model.safetensors", {"format": "pt"})
    checks = {problem.check for problem in qplug.verify(str(out)).problems}
    assert "mtp" in checks
    (out / "qplug.json").unlink()
    assert "mtp" in {problem.check for problem in qplug.verify(str(out), backend="vllm").problems}


def test_what_an_engine_cannot_draft_with_is_refused(
    model: Path, tmp_path: Path, naming: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(QplugError, match="NVFP4 stores ranges of inputs"):
        quantize(model, out, mtp="quantize", backend="sglang", scheme="NVFP4", group_size=None)
    with pytest.raises(QplugError, match="ranges of inputs, which are not measured in draft"):
        quantize(model, out, mtp="quantize", scheme="W8A8_STATIC", group_size=None, samples=2)
    if naming == "named":
        with pytest.raises(QplugError, match="vLLM loads all of mtp as float"):
            quantize(model, out, mtp="quantize", backend="gptq")


def test_a_model_without_them_has_none_to_quantize(tmp_path: Path) -> None:
    with pytest.raises(QplugError, match=r"--mtp quantize: .* has no draft layers"):
        quantize(Path("qplug:demo"), tmp_path / "out", mtp="quantize", dry_run=True)
    quantize(Path("qplug:demo"), tmp_path / "out", mtp="drop", dry_run=True)


def test_a_second_copy_of_the_model_is_left_behind(
    tmp_path: Path, write_llama: Callable[..., Path]
) -> None:
    folder = write_llama(tmp_path / "model")
    weight = torch.zeros(8, 8)
    copies = {f"layers.{n}.attention.wq.weight": weight.clone() for n in range(2)}
    save_file(copies, folder / "consolidated.safetensors")
    shutil.copy(folder / "config.json", folder / "broken.safetensors")
    source = open_checkpoint(folder)
    assert not copies.keys() & source.tensors.keys()
    assert [line.partition(" ")[0] for line in left_behind(source)] == [
        "broken.safetensors",
        "consolidated.safetensors",
    ]
    plan = quantize(folder, tmp_path / "out", dry_run=True)
    assert any("consolidated.safetensors is left behind" in note for note in plan.notes)


def test_layers_that_are_announced_but_not_there_are_said(
    tmp_path: Path, write_llama: Callable[..., Path], cli: Cli
) -> None:
    folder = write_llama(tmp_path / "model", num_nextn_predict_layers=1)
    words = ("quantize", "--algo", "rtn", folder, "--out", tmp_path / "out", "--dry-run")
    assert "note: config.json announces draft layers (MTP) that the model lacks" in (
        cli(*words).output
    )
    assert "announces" not in cli(*words, "--mtp", "drop").output


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.61.mlp.experts.0.up_proj.weight", True),
        ("model.layers.60.mlp.experts.61.up_proj.weight", False),
        ("mtp.fc.weight", True),
        ("mtp.0.attn.wq_b.weight", True),
        ("model.mtp_layers.0.mlp.up_proj.weight", True),
        ("model.mtp_block.0.mlp.up_proj.weight", True),
        ("layers.0.attention.wq.weight", False),
        ("model.nextn.eh_proj.weight", True),
        ("model.visual.blocks.80.mlp.fc1.weight", False),
    ],
)
def test_names_of_draft_layers(name: str, expected: bool) -> None:
    assert is_draft(name, 61, "model.layers") is expected


def test_layers_that_are_announced() -> None:
    assert announced({"text_config": {"mtp_num_hidden_layers": 1}}) == 1
    assert announced({"num_nextn_predict_layers": 0}) == 0
