"""Small random models of many families, and walks through them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_deepseek import small_deepseek
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qplug import QuantArgs, Scheme
from qplug.calibration import batches
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.model.view import model_view
from qplug.registry.registry import Registry

#: Heads of 24 are in no list of usual sizes; queries are 96 wide, keys and values 48, the rest 64.
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GATED: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 80,
    "num_key_value_heads": 2,
    "head_dim": 24,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
#: Windows shorter than the samples of the tests.
SLIDING: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**GATED),
    "llama, biases": lambda: transformers.LlamaConfig(**GATED, attention_bias=True, mlp_bias=True),
    "llama, one kv head": lambda: transformers.LlamaConfig(**{**GATED, "num_key_value_heads": 1}),
    "llama, all kv heads": lambda: transformers.LlamaConfig(**{**GATED, "num_key_value_heads": 4}),
    "qwen2": lambda: transformers.Qwen2Config(
        **{**GATED, "head_dim": 16},
        sliding_window=8,
        use_sliding_window=True,
        max_window_layers=1,
    ),
    "qwen3": lambda: transformers.Qwen3Config(**GATED),
    "mistral": lambda: transformers.MistralConfig(**GATED, sliding_window=8),
    "gemma2": lambda: transformers.Gemma2Config(**GATED, **SLIDING, query_pre_attn_scalar=24),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GATED, **SLIDING, query_pre_attn_scalar=24),
    "phi3": lambda: transformers.Phi3Config(**{**GATED, "head_dim": 16}),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64),
    "opt, gelu": lambda: transformers.OPTConfig(
        **SIZES, ffn_dim=96, word_embed_proj_dim=64, activation_function="gelu"
    ),
    "opt, squared": lambda: transformers.OPTConfig(
        **SIZES, ffn_dim=96, word_embed_proj_dim=64, activation_function="relu2"
    ),
    "opt, norm after": lambda: transformers.OPTConfig(
        **SIZES, ffn_dim=96, word_embed_proj_dim=64, do_layer_norm_before=False
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=96),
    "gpt-neox, in sequence": lambda: transformers.GPTNeoXConfig(
        **SIZES, intermediate_size=96, use_parallel_residual=False
    ),
    "phi": lambda: transformers.PhiConfig(**SIZES, intermediate_size=96, num_key_value_heads=2),
    "llama, tied": lambda: transformers.LlamaConfig(**GATED, tie_word_embeddings=True),
    "opt, untied": lambda: transformers.OPTConfig(
        **SIZES, ffn_dim=96, word_embed_proj_dim=64, tie_word_embeddings=False
    ),
    "opt, words of another width": lambda: transformers.OPTConfig(
        **SIZES, ffn_dim=96, word_embed_proj_dim=32
    ),
    "gemma": lambda: transformers.GemmaConfig(**GATED),
    "cohere": lambda: transformers.CohereConfig(**{**GATED, "head_dim": 16}),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=4096, n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=96
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **GATED, **EXPERTS, moe_intermediate_size=48, decoder_sparse_step=2
    ),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **{**GATED, "head_dim": 16},
        **EXPERTS,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=64,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **GATED, num_local_experts=4, num_experts_per_tok=2
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **GATED, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "deepseek-v3": lambda: small_deepseek(**SIZES, moe_intermediate_size=48),
    "olmo2": lambda: transformers.Olmo2Config(**{**GATED, "head_dim": 16}),
    "bloom": lambda: transformers.BloomConfig(vocab_size=4096, hidden_size=64, n_layer=2, n_head=4),
}

Family = Callable[..., Path]
StartWalk = Callable[..., Walk]


@pytest.fixture
def passes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks compute in float32, also on CPUs that multiply bfloat16."""
    monkeypatch.setattr(batches, "_multiplies_bfloat16", lambda: False)


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """No norm's weight near 1, no bias near 0, and attention that is neither flat nor one-hot."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            values = 0.3 * values
        elif parameter.ndim == 1:
            values = torch.where(values > 0, 0.3 + 0.1 * values, 1.4 - 0.2 * values)
        elif "embed" not in name:
            values = values / parameter.shape[-1] ** 0.5
        parameter.copy_(values)
    for name, buffer in model.state_dict().items():
        if name.endswith("correction_bias"):  # of DeepSeek's routers
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def save(model: PreTrainedModel, folder: Path) -> Path:
    """With the tokenizer of the demo model, whose vocabulary all models here have."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / name, folder)
    return folder


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """``family("gemma2")``: a folder with a random model, to read, not to change."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def write(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
            randomise(model)
            made[name, dtype] = save(model.to(dtype), tmp_path_factory.mktemp("family") / "model")
        return made[name, dtype]

    return write


INT4 = Scheme("int4", QuantArgs("int4", "group", 16))


@pytest.fixture
def start_walk() -> StartWalk:
    """``start_walk(folder, tokens)``: a Walk on the CPU, by default with every linear in int4."""

    def start(
        folder: Path,
        tokens: Tensor,
        *,
        propagate: str = "float",
        scheme: Scheme = INT4,
        ignore: Sequence[str] = (),
        batch_size: int | None = None,
        with_drift: bool = False,
        with_targets: bool = False,
        all_experts: bool = False,
    ) -> Walk:
        source = open_checkpoint(folder)
        view = model_view(source)
        names = [name for name in view.linears if name in view.quantizable]
        schemes = {name: scheme for name in names if not name.endswith(tuple(ignore))}
        return Walk(
            source,
            view,
            schemes,
            Samples(tokens),
            Session(Registry([])),
            propagate=propagate,
            batch_size=batch_size,
            with_drift=with_drift,
            with_targets=with_targets,
            all_experts=all_experts,
        )

    return start


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., Tensor]:
    """``make_tokens(samples, length)``: random tokens, never the padding."""

    def make(samples: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 4096, (samples, length), generator=generator)

    return make
