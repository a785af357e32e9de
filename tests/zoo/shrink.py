"""Tiny configurations of any class of configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from zoo.sizes import TEXT, TOWER, TOWERS, VOCABULARY, WITH_MARKS

#: Fields that count the layers of the text part.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
#: Tokens that every tokenizer has.
_PLAIN_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shrunk(kind: type[PreTrainedConfig], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """Returns a tiny configuration of class ``kind``.

    Each field of the default configuration that ``zoo.sizes`` names takes its size; a list with an
    entry for each layer keeps each kind of entry once. ``changes`` go over them, and hold mappings
    for sub-configurations.
    """
    default = kind()
    marks = _Marks()
    return kind(**_fields(default, changes, marks, tower=False, marked=_has_tower(default)))


class _Marks:
    """Numbers of tokens that stand for pictures and sound: after those of the tokenizer."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        name = name.removesuffix("_id").removesuffix("_index").removesuffix("_token")
        return self._numbers.setdefault(name, VOCABULARY + len(self._numbers))


def _has_tower(config: PreTrainedConfig) -> bool:
    parts = _parts(config)
    return any(_is_tower(name) or _has_tower(part) for name, part in parts.items())


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """Returns the sub-configurations of ``config``, by name."""
    found = {name: getattr(config, name, None) for name in type(config).sub_configs}
    return {name: part for name, part in found.items() if isinstance(part, PreTrainedConfig)}


def _is_tower(name: str) -> bool:
    return any(word in name for word in TOWERS)


def _fields(
    default: PreTrainedConfig,
    changes: Mapping[str, Any],
    marks: _Marks,
    *,
    tower: bool,
    marked: bool,
) -> dict[str, Any]:
    """Returns the fields to change in ``default``: those with a size, then ``changes``."""
    parts = _parts(default)
    plain = default.to_dict()
    sizes = TOWER if tower else TEXT
    fields = {name: sizes[name] for name, value in plain.items() if _is_sized(name, value, sizes)}
    if not tower:
        fields |= _layers(plain)
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if marked and "vocab_size" in fields and not tower:
        fields["vocab_size"] = WITH_MARKS
    for name, value in plain.items():
        if name in _PLAIN_TOKENS:
            fields[name] = None if value is None else _PLAIN_TOKENS[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            fields[name] = marks.number(name)
    for name, part in parts.items():
        given = changes.get(name, {})
        if isinstance(given, PreTrainedConfig):
            continue
        inner = tower or _is_tower(name)
        fields[name] = {
            **({"model_type": part.model_type} if part.model_type else {}),
            **_fields(part, given, marks, tower=inner, marked=marked),
        }
    return {**fields, **{name: value for name, value in changes.items() if name not in parts}}


def _is_sized(name: str, value: Any, sizes: Mapping[str, Any]) -> bool:
    """Whether the field is to have its size; most that are None or 0 are a choice, and stay."""
    if name == "head_dim" and value is None:
        return name in sizes
    return name in sizes and value is not None and (isinstance(value, bool) or value != 0)


def _layers(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how many layers there are, and the lists with an entry for each of them."""
    counts = [name for name in _LAYERS if isinstance(plain.get(name), int)]
    if not counts:
        return {}
    count = plain[counts[0]]
    lists = {
        name: value
        for name, value in plain.items()
        if isinstance(value, list) and len(value) == count and count > 1
    }
    kinds = {name: list(dict.fromkeys(map(str, value))) for name, value in lists.items()}
    few = max([2, *(len(found) for name, found in kinds.items() if len(found) <= 4)])
    fields: dict[str, Any] = dict.fromkeys(counts, few)
    for name, value in lists.items():
        firsts = list({str(entry): entry for entry in reversed(value)}.values())[::-1]
        firsts = (firsts + value[-1:] * few)[:few]
        fields[name] = firsts
    return fields
