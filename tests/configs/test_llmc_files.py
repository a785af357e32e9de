"""LLMC's own files, unmodified but for their placeholder paths, if they are at hand.

``QPLUG_LLMC_CONFIGS=.../configs/quantization pytest -m llmc tests/configs/test_llmc_files.py`` runs
every file of ``backend/sglang`` and ``backend/vllm`` on small models: its algorithm, its scheme and
its stages, on less data. Steps that read what another step writes run after it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from qplug.source import find_model

Cli = Callable[..., Result]
pytestmark = pytest.mark.llmc

ROOT = Path(os.environ.get("QPLUG_LLMC_CONFIGS", "no such folder"))
FILES = [
    path.relative_to(ROOT).as_posix()
    for engine in ("sglang", "vllm")
    for path in sorted((ROOT / "backend" / engine).rglob("*.yml"))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a model that takes windows of 2048 tokens."""
    root = tmp_path_factory.mktemp("llmc")
    lines = (f"The {n}th line of a text is about {n * n}, or {n % 7}." for n in range(900))
    (root / "text.txt").write_text("\n".join(lines))
    shutil.copytree(find_model("qplug:demo"), root / "model")
    config = json.loads((root / "model/config.json").read_text())
    config["max_position_embeddings"] = 4096
    (root / "model/config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def deepseek(place: Path) -> Path:
    """A random DeepSeek-V3 in blocks of fp8, whose widths groups of 128 divide."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=128,
        q_lora_rank=128,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
    )
    folder = place / "deepseek"
    DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / name, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        if "_proj" in name and weight.ndim == 2:
            rows, columns = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
            tensors[name] = weight.to(torch.float8_e4m3fn)  # scales of 1
            tensors[f"{name}_scale_inv"] = torch.ones(rows, columns)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    told["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def filled(text: str, place: Path, engine: str, model: Path) -> str:
    """The file with every placeholder replaced, and nothing else."""
    section = ""
    lines = []
    for line in text.splitlines():
        section = line.partition(":")[0] if re.match(r"\w", line) else section
        key = line.strip().partition(":")[0]
        if key == "path" and section in ("calib", "eval"):
            line = f"    path: {place / 'text.txt'}"
        elif key == "path" and "/path/to" not in line:
            line = f"    path: {model}"
        lines.append(line.replace("/path/to", str(place / engine)))
    return "\n".join(lines).replace("../cache", str(place / engine)) + "\n"


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_llmc(file: str, place: Path, request: pytest.FixtureRequest, cli: Cli) -> None:
    model = request.getfixturevalue("deepseek") if "dsv3" in file else place / "model"
    told = filled((ROOT / file).read_text(), place, file.split("/")[1], model)
    path = place / "f.yml"
    path.write_text(told)
    out = re.search(r"save_path: *(\S+)", told)
    assert out is not None
    # Two files have one save_path between them.
    shutil.rmtree(out[1], ignore_errors=True)
    less = ("--samples", 4, "--device", "cpu")
    result = cli("quantize", "--config", path, "--json", *less)
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    (written,) = done["results"]
    saves = re.findall(r"save_(\w+): True", told)
    folder = Path(out[1]) / ("transformed_model" if saves == ["trans"] else "")
    assert Path(written["out"]) == folder
    checked = cli("verify", folder)
    assert checked.exit_code == 0, checked.output
    asked = re.search(r"eval_pos: \[fake.quant\]", told) is not None
    assert [measured["at"] for measured in done["measured"]] == ["quantized"] * asked


def test_the_folder_is_whole() -> None:
    assert len(FILES) == 34, "set QPLUG_LLMC_CONFIGS to LLMC's configs/quantization"
