"""The real vLLM drafts with the head (MTP) of folders that qplug writes, and answers as without."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from real_engines import VLLM_ON_CPU
from safetensors.torch import load_file, save_file

import qplug
from qplug.checkpoint.locate import DEMO, find_model

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
#: Nats between neighbours among logits from 16 to 32 in bfloat16, of which either may be chosen.
TIE = 0.125


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in the layout of MiMo; its head is a copy of its last block, which drafts badly."""
    demo, folder = find_model(DEMO), tmp_path_factory.mktemp("drafting") / "float"
    folder.mkdir()
    config = json.loads((demo / "config.json").read_text("utf-8"))
    tensors = load_file(demo / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    biased = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    for name in [name for name in tensors if name.endswith(biased)]:
        tensors[name.replace(".weight", ".bias")] = torch.zeros(len(tensors[name])).bfloat16()
    last, head = f"model.layers.{config['num_hidden_layers'] - 1}.", "model.mtp_layers.0."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[name.replace(last, head)] = tensors[name].clone()
    width = config["hidden_size"]
    for norm in ("token_layernorm", "hidden_layernorm"):
        tensors[f"{head}{norm}.weight"] = torch.ones(width).bfloat16()
    tensors[f"{head}final_layernorm.weight"] = tensors["model.norm.weight"].clone()
    tensors[f"{head}input_proj.weight"] = torch.eye(width, 2 * width).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config |= {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2"}
    config |= {"num_nextn_predict_layers": 1, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / file, folder)
    return folder


def test_it_drafts_with_float_and_quantized_heads(model: Path) -> None:
    """A head that is kept float beside quantized blocks is the case that engines look up.

    The float model runs in float32: in bfloat16, batches of other sizes choose otherwise between
    two tokens whose logits are neighbours. vLLM's int4 product takes no float32.
    """
    outs = [
        qplug.quantize(str(model), model.parent / mtp, mtp=mtp, backend="vllm").out
        for mtp in ("keep", "quantize")
    ]
    found = measured([model], "--options", json.dumps({"dtype": "float32"})) + measured(outs)
    assert [row["folder"] for row in found] == ["float", "keep", "quantize"]
    for row in found:
        assert row["drafts"] > 0
        assert row["of"] == 4
        assert row["same"] == 4 or row["near"] <= (0 if row["folder"] == "float" else TIE), row


def measured(folders: list[Path], *words: str) -> list[dict[str, Any]]:
    """Returns what ``benchmarks/acceptance.py`` finds of ``folders``, in vLLM's environment."""
    program = ROOT / "benchmarks" / "acceptance.py"
    command = [VLLM_ON_CPU.python, program, ROOT / "README.md", *folders, "--prompts", "4", *words]
    ran = subprocess.run(
        [str(word) for word in command],
        env=VLLM_ON_CPU.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
