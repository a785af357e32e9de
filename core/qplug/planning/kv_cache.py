"""The size of the KV cache, by config.json and by the shapes of what fills the cache.

A layer of attention stores keys and values of each token: ``2 * kv_heads * head_dim`` numbers, or a
latent of ``kv_lora_rank + qk_rope_head_dim`` numbers (MLA, DeepSeek-V2, arXiv 2405.04434, section
2.1). A sliding window stores no more tokens than it is long. Layers of linear attention,
convolutions and state spaces have a state of constant size instead, which is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qplug.planning.outline import Outline

#: Words in ``layer_types`` and its like for layers without keys and values.
_WITHOUT = ("linear", "mamba", "conv", "recurrent", "mlp", "moe", "rwkv", "kda", "ssm", "gdn")
#: The fields of config.json that list the type of each layer.
_TYPES = ("layer_types", "layers_block_type", "block_types")
#: Each how many layers one has no window, where config.json has a window and does not say which
#: layers have it, by model type (transformers 5.23, configuration_*.py).
_PERIODS = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3_text": 6,
    "cohere2": 4,
    "gemma3n_text": 5,
    "gpt_oss": 2,
}
#: Linears that make keys, in the order of trial, by their local names.
_KEYS = ("k_proj", "wk", "key", "key_proj")
_VALUES = ("v_proj", "wv", "value", "value_proj")
_LATENTS = ("kv_a_proj_with_mqa", "wkv_a", "wkv_a_with_mqa")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "wqkv", "in_proj_qkv_attn")


@dataclass(frozen=True)
class CacheLayer:
    """A layer that stores ``width`` numbers for each token; ``window``: at most that many tokens.

    ``heads`` are what processes can share; 1 for a latent, of which each process has a copy.
    """

    width: int
    heads: int
    window: int | None = None

    def numbers(self, tokens: int, processes: int = 1) -> int:
        """The numbers that each of ``processes`` stores for a request of ``tokens``."""
        own = -(-self.heads // processes) / self.heads
        return round(self.width * own) * min(tokens, self.window or tokens)


@dataclass(frozen=True)
class Cache:
    """The layers that have keys and values; ``without`` is the number of the others."""

    layers: tuple[CacheLayer, ...]
    without: int = 0

    def nbytes(self, tokens: int, *, bits: int = 16, processes: int = 1) -> int:
        """The bytes in each of ``processes`` for a request of ``tokens``, ``bits`` a number."""
        return sum(layer.numbers(tokens, processes) for layer in self.layers) * bits // 8

    @property
    def windows(self) -> tuple[int, ...]:
        """The lengths of sliding windows, in order, each once."""
        return tuple(sorted({layer.window for layer in self.layers if layer.window}))


def find_cache(outline: Outline) -> Cache:
    """Returns the layers of ``outline`` that have a KV cache."""
    config = outline.config
    types = _layer_types(config, outline.blocks)
    shared = _number(config, "num_kv_shared_layers")
    layers = []
    for index, tensors in enumerate(outline.tensors):
        if types[index] == "none" or index >= outline.blocks - shared:
            continue
        found = _of_tensors(tensors, config)
        if found is not None:
            width, heads = found
            window = _number(config, "sliding_window") if types[index] == "window" else 0
            layers.append(CacheLayer(width, heads, window or None))
    return Cache(tuple(layers), outline.blocks - len(layers))


def _of_tensors(
    tensors: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Returns the numbers that a block stores for a token, and its heads; None if it has none."""
    rows: dict[str, int] = {}
    for name, shape in tensors.items():
        module, _, local = name.rpartition(".")
        if local == "weight" and len(shape) == 2:
            rows.setdefault(module.rpartition(".")[2], shape[0])
    latent = next((rows[name] for name in _LATENTS if name in rows), None)
    if latent is not None and _number(config, "kv_lora_rank"):
        return _number(config, "kv_lora_rank") + _number(config, "qk_rope_head_dim"), 1
    if latent is not None:
        return latent, 1
    queries = _number(config, "num_attention_heads", "n_head", "n_heads") or 1
    heads = _number(config, "num_key_value_heads", "num_kv_heads", "n_head_kv") or queries
    size = _number(config, "head_dim") or _number(config, "hidden_size", "n_embd") // queries
    keys = next((rows[name] for name in _KEYS if name in rows), None)
    if keys is not None:
        values = next((rows[name] for name in _VALUES if name in rows), keys)
        return keys + values, max(1, keys // size) if size else heads
    if any(name in rows for name in _FUSED):
        return 2 * heads * size, heads
    return None


def _layer_types(config: Mapping[str, Any], count: int) -> list[str]:
    """Returns ``full``, ``window`` or ``none`` for each of ``count`` layers, by config.json."""
    window = _number(config, "sliding_window")
    if config.get("use_sliding_window") is False:
        window = 0
    listed = next((config[key] for key in _TYPES if isinstance(config.get(key), list)), None)
    if listed is not None and len(listed) >= count:
        return [_kind(str(word).lower(), window) for word in listed[:count]]
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and len(pattern) >= count:  # Nemotron-H: * is attention
        return ["full" if sign == "*" else "none" for sign in pattern[:count]]
    linear = config.get("linear_attn_config")
    if isinstance(linear, Mapping) and isinstance(linear.get("kda_layers"), Sequence):
        without = set(linear["kda_layers"])  # counted from 1
        return ["none" if index + 1 in without else "full" for index in range(count)]
    if not window:
        return ["full"] * count
    stated = _number(config, "sliding_window_pattern", "_sliding_window_pattern")
    period = stated or _PERIODS.get(str(config.get("model_type")), 0)
    if period:
        return ["full" if (index + 1) % period == 0 else "window" for index in range(count)]
    first = _number(config, "max_window_layers") if config.get("use_sliding_window") else 0
    return ["full" if index < first else "window" for index in range(count)]


def _kind(word: str, window: int) -> str:
    if "sliding" in word or "local" in word or "chunked" in word:
        return "window" if window else "full"
    return "none" if any(part in word for part in _WITHOUT) else "full"


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """Returns the first of the fields ``keys`` that is a positive number; 0 if none is."""
    found = (config.get(key) for key in keys)
    return next((n for n in found if isinstance(n, int) and n > 0 and n is not True), 0)
