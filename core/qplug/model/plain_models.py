"""Architectures whose module tree is known without the code of transformers: a table.

A run that only rounds weights needs no more of a model than its module tree, and importing the code
that builds one takes seconds. A checkpoint that has exactly the tensors of a row, in the shapes
that its config.json states there, has the tree of that row. Any other checkpoint, and any
config.json that says something else, is left to transformers, whose errors name what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qplug.api.tensors import FLOAT_DTYPES, Checkpoint
from qplug.model.module_tree import ModuleTree

#: A width by the name of a field of config.json, or of a product of two.
Shape = tuple[str, ...]

_QUERIES, _KEYS = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
_ATTENTION = {
    "self_attn.q_proj": (_QUERIES, "hidden_size"),
    "self_attn.k_proj": (_KEYS, "hidden_size"),
    "self_attn.v_proj": (_KEYS, "hidden_size"),
    "self_attn.o_proj": ("hidden_size", _QUERIES),
}
_DENSE = {
    "mlp.gate_proj": ("intermediate_size", "hidden_size"),
    "mlp.up_proj": ("intermediate_size", "hidden_size"),
    "mlp.down_proj": ("hidden_size", "intermediate_size"),
}
_NORMS: Mapping[str, Shape] = {
    "input_layernorm.weight": ("hidden_size",),
    "post_attention_layernorm.weight": ("hidden_size",),
}
_BIASES: Mapping[str, Shape] = {
    "self_attn.q_proj.bias": (_QUERIES,),
    "self_attn.k_proj.bias": (_KEYS,),
    "self_attn.v_proj.bias": (_KEYS,),
}
_HEAD_NORMS: Mapping[str, Shape] = {
    "self_attn.q_norm.weight": ("head_dim",),
    "self_attn.k_norm.weight": ("head_dim",),
}


@dataclass(frozen=True)
class PlainModel:
    """A row: the tensors of one decoder block of an architecture, which is like all others.

    ``linears`` are linears that are modules of their own, ``others`` tensors, both by name within
    the block. ``experts`` are linears of each expert, ``number_of_experts`` the field that counts
    them. ``stated`` are fields that config.json must have, since transformers has another default
    for them than the width of the model gives; ``fixed`` are fields that have this value if they
    are there.
    """

    architecture: str
    model_type: str
    linears: Mapping[str, Shape]
    others: Mapping[str, Shape]
    experts: Mapping[str, Shape] = field(default_factory=dict)
    number_of_experts: str = ""
    stated: tuple[str, ...] = ()
    fixed: Mapping[str, object] = field(default_factory=dict)


PLAIN_MODELS = (
    PlainModel("LlamaForCausalLM", "llama", {**_ATTENTION, **_DENSE}, _NORMS),
    PlainModel(
        "MistralForCausalLM",
        "mistral",
        {**_ATTENTION, **_DENSE},
        _NORMS,
        stated=("num_key_value_heads",),
    ),
    PlainModel(
        "Qwen2ForCausalLM",
        "qwen2",
        {**_ATTENTION, **_DENSE},
        {**_NORMS, **_BIASES},
        stated=("num_key_value_heads",),
        fixed={"use_sliding_window": False},
    ),
    PlainModel(
        "Qwen3ForCausalLM",
        "qwen3",
        {**_ATTENTION, **_DENSE},
        {**_NORMS, **_HEAD_NORMS},
        stated=("num_key_value_heads", "head_dim"),
        fixed={"use_sliding_window": False},
    ),
    PlainModel(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        _ATTENTION,
        {**_NORMS, **_HEAD_NORMS, "mlp.gate.weight": ("num_experts", "hidden_size")},
        experts={
            "mlp.experts.*.gate_proj": ("moe_intermediate_size", "hidden_size"),
            "mlp.experts.*.up_proj": ("moe_intermediate_size", "hidden_size"),
            "mlp.experts.*.down_proj": ("hidden_size", "moe_intermediate_size"),
        },
        number_of_experts="num_experts",
        stated=("num_key_value_heads", "head_dim", "num_experts_per_tok"),
        fixed={"use_sliding_window": False, "mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
)


def plain_tree(checkpoint: Checkpoint) -> ModuleTree | None:
    """Returns the module tree of ``checkpoint`` by the table; None if it fits no row exactly."""
    config = checkpoint.config
    for row in PLAIN_MODELS:
        if config.get("architectures") == [row.architecture]:
            return _tree(row, checkpoint) if _is_plain(row, config) else None
    return None


def _tree(row: PlainModel, checkpoint: Checkpoint) -> ModuleTree | None:
    config = checkpoint.config
    sizes = _sizes(config)
    blocks = tuple(f"model.layers.{number}" for number in range(sizes["num_hidden_layers"]))
    experts = range(sizes.get(row.number_of_experts, 0))
    linears: dict[str, tuple[int, int]] = {}
    tensors = {
        "model.embed_tokens.weight": (sizes["vocab_size"], sizes["hidden_size"]),
        "model.norm.weight": (sizes["hidden_size"],),
    }
    of_expert = {name: _shape(shape, sizes) for name, shape in row.experts.items()}
    of_block = {f"{name}.weight": _shape(shape, sizes) for name, shape in row.linears.items()}
    of_block |= {name: _shape(shape, sizes) for name, shape in row.others.items()}
    of_block |= {
        f"{name.replace('*', str(number))}.weight": shape
        for number in experts
        for name, shape in of_expert.items()
    }
    for block in blocks:
        tensors |= {f"{block}.{name}": shape for name, shape in of_block.items()}
        for name in row.linears:
            out, width = of_block[f"{name}.weight"]
            linears[f"{block}.{name}"] = out, width
    found = {name: stored.spec.shape for name, stored in checkpoint.tensors.items()}
    table = tensors["model.embed_tokens.weight"]
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = table
    elif found.get("lm_head.weight") == table:  # some store it though it is tied
        del found["lm_head.weight"]
    if found != tensors:
        return None
    if any(stored.spec.dtype not in FLOAT_DTYPES for stored in checkpoint.tensors.values()):
        return None
    return ModuleTree(
        linears=linears,
        lookups=frozenset({"model.embed_tokens"}),
        blocks=blocks,
        head="lm_head",
        embedding="model.embed_tokens",
        parts=frozenset(),
        idle=frozenset(),
        tensors=tensors,
    )


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The fields of ``config`` that are numbers, with those that follow from others."""
    sizes = {key: value for key, value in config.items() if type(value) is int}
    heads = sizes["num_attention_heads"]
    return {
        **sizes,
        "num_key_value_heads": sizes.get("num_key_value_heads", heads),
        "head_dim": sizes.get("head_dim", sizes["hidden_size"] // heads),
    }


def _shape(shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(_side(side, sizes) for side in shape)


def _side(side: str, sizes: Mapping[str, int]) -> int:
    count, times, width = side.partition(" * ")
    return sizes[count] * sizes[width] if times else sizes[count]


# --- config.json ---------------------------------------------------------------------------------


def _is_plain(row: PlainModel, config: Mapping[str, Any]) -> bool:
    """Whether transformers surely builds a model of ``row`` from ``config``, by its fields."""
    stated = {"model_type", *_STATED, *row.stated, *_counts(row)}
    if config.get("model_type") != row.model_type or not stated <= config.keys():
        return False
    if any(config.get(key, value) != value for key, value in row.fixed.items()):
        return False
    if not all(key in _FIELDS and _FIELDS[key](value) for key, value in config.items()):
        return False
    sizes = _sizes(config)
    layers = sizes["num_hidden_layers"]
    return (
        sizes["hidden_size"] % sizes["num_attention_heads"] == 0
        and sizes["num_attention_heads"] % sizes["num_key_value_heads"] == 0
        and sizes.get("num_experts_per_tok", 0) <= sizes.get("num_experts", 0)
        and sizes.get("pad_token_id", 0) < sizes["vocab_size"]
        and len(config.get("layer_types") or range(layers)) == layers
    )


def _counts(row: PlainModel) -> Iterator[str]:
    """Yields the fields that only rows with experts need."""
    if row.number_of_experts:
        yield row.number_of_experts
    for shape in row.experts.values():
        yield from shape


#: Fields that every row needs.
_STATED = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    "vocab_size",
)


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_token(value: object) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _is_end(value: object) -> bool:
    return _is_token(value) or (isinstance(value, list) and bool(value) and all(map(_is_id, value)))


def _is_id(value: object) -> bool:
    return value is not None and _is_token(value)


def _is_float(value: object) -> bool:
    return type(value) is float and 0 < value < 1


def _is_rate(value: object) -> bool:
    return type(value) in (int, float) and value == 0


def _is_base(value: object) -> bool:
    return type(value) in (int, float) and 1 <= float(value) < float("inf")  # type: ignore[arg-type]


def _is_bool(value: object) -> bool:
    return type(value) is bool


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_no(value: object) -> bool:
    return value is False


def _is_dtype(value: object) -> bool:
    return value in FLOAT_DTYPES


def _is_rope(value: object) -> bool:
    """Whether ``value`` describes no scaling of positions, or that of Llama 3."""
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    kinds = [value[key] for key in ("rope_type", "type") if key in value]
    if not kinds or any(kind != kinds[0] for kind in kinds):
        return False
    numbers = {key: v for key, v in value.items() if key not in ("rope_type", "type")}
    known = {"rope_theta", *(_LLAMA_3 if kinds[0] == "llama3" else ())}
    if kinds[0] not in ("default", "llama3") or not {*numbers} <= known:
        return False
    if kinds[0] == "llama3" and not {*_LLAMA_3} <= {*numbers}:
        return False
    return all(map(_is_base, numbers.values()))


_LLAMA_3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

#: What a field of config.json may be, by name. A file with another field, or with something else
#: in one of these, is left to transformers.
_FIELDS: Mapping[str, Callable[[object], bool]] = {
    "architectures": lambda value: True,  # compared with the row
    "model_type": lambda value: True,
    **dict.fromkeys(_STATED, _is_count),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings"), _is_count),
    **dict.fromkeys(("num_experts", "num_experts_per_tok", "moe_intermediate_size"), _is_count),
    **dict.fromkeys(("decoder_sparse_step", "pretraining_tp"), _is_count),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _is_token),
    "eos_token_id": _is_end,
    **dict.fromkeys(("initializer_range", "rms_norm_eps", "router_aux_loss_coef"), _is_float),
    "attention_dropout": _is_rate,
    "rope_theta": _is_base,
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _is_rope),
    **dict.fromkeys(("tie_word_embeddings", "use_cache", "use_sliding_window"), _is_bool),
    **dict.fromkeys(("norm_topk_prob", "output_router_logits"), _is_bool),
    **dict.fromkeys(("attention_bias", "mlp_bias"), _is_no),
    **dict.fromkeys(("dtype", "torch_dtype"), _is_dtype),
    "hidden_act": lambda value: value == "silu",
    "transformers_version": _is_text,
    "sliding_window": lambda value: value is None or _is_count(value),
    "max_window_layers": _is_id,
    "mlp_only_layers": lambda value: value == [],
    "layer_types": lambda value: (
        isinstance(value, list) and bool(value) and all(each == "full_attention" for each in value)
    ),
}
