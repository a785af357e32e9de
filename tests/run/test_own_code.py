"""Models that come with their own Python code, which runs only if the user trusts it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qplug
from qplug import QplugError
from qplug.checkpoint.locate import DEMO, find_model
from qplug.reading.load import load

CONFIGURATION = """
from transformers import PreTrainedConfig


class WavesConfig(PreTrainedConfig):
    model_type = "waves"

    def __init__(self, vocab_size=4096, hidden_size=64, depth=3, wide=128, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.wide = depth, wide
        super().__init__(**kwargs)
"""
#: A decoder without attention: tokens mix with those before them by a running mean.
MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_waves import WavesConfig


class Wave(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.wide, bias=False)
        self.down = nn.Linear(config.wide, config.hidden_size, bias=False)

    def forward(self, states, counts):
        read = self.norm(states)
        mixed = self.mix(read).cumsum(1) / counts
        return (states + mixed + self.down(torch.relu(self.up(read))), mixed)


class WavesForCausalLM(PreTrainedModel):
    config_class = WavesConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.waves = nn.ModuleList(Wave(config) for _ in range(config.num_hidden_layers))
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, use_cache=None, **_):
        states = self.words(input_ids)
        counts = torch.arange(1, input_ids.shape[1] + 1, device=states.device)[:, None]
        for wave in self.waves:
            states, _ = wave(states, counts.to(states.dtype))
        return CausalLMOutput(logits=self.out(states))
"""


@pytest.fixture
def waves(tmp_path: Path) -> Path:
    """A random model of a class that transformers does not have."""
    folder = tmp_path / "waves"
    folder.mkdir()
    (folder / "configuration_waves.py").write_text(CONFIGURATION)
    (folder / "modeling_waves.py").write_text(MODEL)
    config = {
        "architectures": ["WavesForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_waves.WavesConfig",
            "AutoModelForCausalLM": "modeling_waves.WavesForCausalLM",
        },
        "model_type": "waves",
        "dtype": "bfloat16",
        "vocab_size": 4096,
        "hidden_size": 64,
        "depth": 3,
        "wide": 128,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"words.weight": (4096, 64), "out.weight": (4096, 64)}
    for number in range(3):
        wave = {
            "norm.weight": (64,),
            "norm.bias": (64,),
            "mix.weight": (64, 64),
            "mix.bias": (64,),
            "up.weight": (128, 64),
            "down.weight": (64, 128),
        }
        shapes |= {f"waves.{number}.{name}": shape for name, shape in wave.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model(DEMO) / file, folder)
    return folder


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
def test_the_model_is_quantized(waves: Path, tmp_path: Path, algorithm: str) -> None:
    out = tmp_path / "out"
    result = qplug.quantize(
        str(waves),
        out,
        algo=algorithm,
        scheme="W8A16",
        group_size=32,
        backend="compressed-tensors",
        samples=2,
        seq_len=16,
        trust_remote_code=True,
    )
    assert len(result.errors) == 9
    assert qplug.verify(str(out), trust_remote_code=True).ok
    assert (out / "modeling_waves.py").read_text() == MODEL
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, found = (
            load(str(folder), trust_remote_code=True)(input_ids=tokens).logits
            for folder in (waves, out)
        )
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


def test_no_code_runs_unless_it_is_trusted(waves: Path, tmp_path: Path) -> None:
    (waves / "configuration_waves.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(QplugError, match="trust"):
        qplug.quantize(str(waves), tmp_path / "out")
    assert not (tmp_path / "out").exists()
