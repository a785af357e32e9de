"""The layers that have a KV cache, and its size, by config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qplug import Checkpoint, TensorSpec
from qplug.planning.headers import RemoteTensor
from qplug.planning.kv_cache import Cache, find_cache
from qplug.planning.outline import find_outline

_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}


def cache_of(layers: int, of_a_block: dict[str, tuple[int, int]], **config: Any) -> Cache:
    file = Path("model/model.safetensors")
    tensors = {
        f"model.layers.{number}.{name}.weight": RemoteTensor(file, TensorSpec("bfloat16", shape))
        for number in range(layers)
        for name, shape in of_a_block.items()
    }
    plain = {"num_hidden_layers": layers, **_HEADS, **config}
    return find_cache(find_outline(Checkpoint(file.parent, plain, {**tensors})))


APART = {"self_attn.k_proj": (16, 64), "self_attn.v_proj": (16, 64), "self_attn.q_proj": (64, 64)}


def test_keys_and_values() -> None:
    cache = cache_of(3, APART)
    assert cache.nbytes(10) == 3 * 10 * 32 * 2
    assert cache.nbytes(10, bits=8) == 3 * 10 * 32
    assert cache.nbytes(10, processes=2) == 3 * 10 * 16 * 2
    assert cache.nbytes(10, processes=8) == 3 * 10 * 16 * 2  # each has a copy of one of two heads


def test_linears_that_are_joined_on_disk() -> None:
    assert cache_of(1, {"attn.qkv_proj": (96, 64)}).nbytes(1) == 2 * 2 * 8 * 2
    assert cache_of(1, {"attn.qkv_proj": (96, 64)}, head_dim=16).nbytes(1) == 2 * 2 * 16 * 2


def test_a_latent() -> None:
    latent = {"self_attn.kv_a_proj_with_mqa": (24, 64)}
    cache = cache_of(2, latent, kv_lora_rank=16, qk_rope_head_dim=8)
    assert cache.nbytes(5) == cache.nbytes(5, processes=4) == 2 * 5 * 24 * 2


@pytest.mark.parametrize(
    ("config", "with_window", "without_cache"),
    [
        ({"sliding_window": 4}, 6, 0),
        ({"sliding_window": 4, "use_sliding_window": False}, 0, 0),
        ({"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 4}, 2, 0),
        ({"sliding_window": 4, "sliding_window_pattern": 3}, 4, 0),
        ({"sliding_window": 4, "model_type": "gemma2"}, 3, 0),
        ({"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 3}, 3, 0),
        ({"layer_types": ["linear_attention"] * 5 + ["full_attention"]}, 0, 5),
        ({"layer_types": ["conv", "full_attention"] * 3}, 0, 3),
        ({"layers_block_type": ["mamba", "attention"] * 3}, 0, 3),
        ({"hybrid_override_pattern": "M-M*M-"}, 0, 5),
        ({"linear_attn_config": {"kda_layers": [1, 2, 3]}}, 0, 3),
        ({"num_kv_shared_layers": 2}, 0, 2),
    ],
)
def test_layers(config: dict[str, Any], with_window: int, without_cache: int) -> None:
    cache = cache_of(6, APART, **config)
    assert cache.without == without_cache
    assert sum(layer.window == 4 for layer in cache.layers) == with_window
    full = len(cache.layers) - with_window
    assert cache.nbytes(10) == (4 * with_window + 10 * full) * 32 * 2
    assert cache.windows == ((4,) if with_window else ())


def test_blocks_without_attention_are_found_by_their_tensors() -> None:
    cache = cache_of(2, {"mamba.in_proj": (64, 64)})
    assert (cache.layers, cache.without, cache.nbytes(100)) == ((), 2, 0)
