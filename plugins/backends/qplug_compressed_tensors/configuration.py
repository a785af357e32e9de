"""Writes ``quantization_config`` into config.json, and reads it as engines do.

A config group gives a scheme to its ``targets``; ``ignore`` takes modules out. Entries are module
names, class names (``Linear``), or ``re:`` and a regular expression that must match from the start.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qplug import E4M3_SCALES, E8M0_SCALES, PRESETS, ModelView, QplugError, QuantArgs, Scheme
from qplug_compressed_tensors.fusing import with_merged_names
from qplug_compressed_tensors.loader import Plain, plain_match
from qplug_compressed_tensors.outside import (
    expert_groups,
    loose_ends,
    portable,
    renamed,
    tower_entries,
)

PACK_QUANTIZED = "pack-quantized"
INT_QUANTIZED = "int-quantized"
FLOAT_QUANTIZED = "float-quantized"
NAIVE_QUANTIZED = "naive-quantized"
NVFP4_PACKED = "nvfp4-pack-quantized"
MXFP4_PACKED = "mxfp4-pack-quantized"
MXFP8_QUANTIZED = "mxfp8-quantized"
MIXED = "mixed-precision"

#: The class of embeddings in targets: a part of the name that engines have for it.
EMBEDDING = "Embedding"

# Layouts of schemes whose formats prescribe the dtype of scales.
_FIXED = {
    (PRESETS[name].weights, PRESETS[name].activations): layout
    for name, layout in (
        ("NVFP4", NVFP4_PACKED),
        ("NVFP4A16", NVFP4_PACKED),
        ("MXFP4A16", MXFP4_PACKED),
        ("MXFP4", MXFP4_PACKED),
        ("MXFP4AFP8", MXFP4_PACKED),
        ("MXFP8", MXFP8_QUANTIZED),
    )
}
_FP8_TOKEN = PRESETS["W4AFP8"].activations
_INT8_TOKEN = PRESETS["W4A8"].activations


def format_of(scheme: Scheme) -> str | None:
    """The name of the layout that stores ``scheme``; None if no layout can."""
    weights, activations = scheme.weights, scheme.activations
    if weights.fixes_scales:
        return _FIXED.get((weights, activations))
    fp8 = weights.dtype == "e4m3" and weights.strategy in ("tensor", "channel", "block")
    if activations is None and weights.is_float:
        return NAIVE_QUANTIZED if fp8 else None
    if activations is None or (not weights.is_float and weights.bits < 8):
        return PACK_QUANTIZED if _packs(weights, activations) else None
    if not (weights.symmetric and activations.symmetric and weights.dtype == activations.dtype):
        return None
    if weights.dtype == "int8" and weights.strategy in ("tensor", "channel"):
        return INT_QUANTIZED
    return FLOAT_QUANTIZED if fp8 else None


def stores(name: str, scheme: Scheme) -> bool:
    """Whether the layout ``name`` stores ``scheme``, be it in folders of other writers alone.

    compressed-tensors stores all integers in bytes whose inputs are quantized, in any bits. Its
    ``naive-quantized`` is for all weights that fit no other layout, and stores each code in the
    dtype that is next to it: int8, or fp8. fp8 whose inputs are float is such; in
    ``float-quantized`` it has the same tensors, and engines load both.
    """
    weights = scheme.weights
    if name == format_of(scheme):
        return True
    if name == FLOAT_QUANTIZED:
        return format_of(scheme) == NAIVE_QUANTIZED
    if name == NAIVE_QUANTIZED:
        return not weights.is_float or (weights.dtype == "e4m3" and not weights.fixes_scales)
    return name == INT_QUANTIZED and scheme.activations is not None and not weights.is_float


def _packs(weights: QuantArgs, activations: QuantArgs | None) -> bool:
    """Whether words of int32 can store ``weights`` for inputs that are rounded as given."""
    if weights.is_float or weights.strategy not in ("group", "channel"):
        return False
    if activations == _FP8_TOKEN:
        return weights.dtype == "int4" and weights.strategy == "group" and weights.symmetric
    return activations in (None, _INT8_TOKEN)


#: The names of scale dtypes that belong to a format; e8m0 scales are stored as bare exponents.
_SCALE_DTYPES = {E4M3_SCALES: "torch.float8_e4m3fn", E8M0_SCALES: "torch.uint8"}


# --- writing -------------------------------------------------------------------------------------


def write_config(model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """The ``quantization_config`` of a model whose linears in ``schemes`` are quantized."""
    kinds = list(dict.fromkeys(schemes.values()))
    formats = {format_of(scheme) for scheme in kinds}
    groups = {}
    for number, scheme in enumerate(kinds):
        members = {name for name, assigned in schemes.items() if assigned == scheme}
        targets = ["Linear"] if len(kinds) == 1 else _entries(members, schemes, model)
        if model.head in members and len(kinds) == 1:  # engines do not class a head as Linear
            targets.append(rf"re:.*{re.escape(model.head)}$")
        if model.embedding in members:  # vLLM builds that of Llama without a name
            targets += [EMBEDDING] if len(kinds) > 1 else [EMBEDDING, model.embedding]
        groups[f"group_{number}"] = _group(scheme, targets)
        if len(formats) > 1:
            groups[f"group_{number}"]["format"] = format_of(scheme)
    floats = [name for name in model.linears if name not in schemes]
    if model.head is not None and model.head not in model.linears:
        floats.append(model.head)  # a tied head has no tensor, but loaders have a module for it
    ignore = _entries(floats, [*schemes, *floats], model) + float_modules(model, schemes)
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": groups,
    }


def _entries(names: Iterable[str], among: Iterable[str], model: ModelView) -> list[str]:
    """Entries that match ``names`` and the matrices that engines merge them into, not ``among``.

    SGLang looks up ``qkv_proj`` itself, because for most models it does not know its members.
    """
    return patterns(with_merged_names(names), with_merged_names(among), model.blocks)


def float_modules(model: ModelView, schemes: Mapping[str, Scheme]) -> list[str]:
    """Expressions for modules of ``model`` that are float as a whole, in names that engines have.

    They are towers and draft layers outside of the blocks, linears there, linears that an engine
    has other names for, and experts that are stacked.
    """
    floats = model.linears.keys() - schemes.keys()
    loose = [rf"re:.*\.{re.escape(end)}$" for end in loose_ends(model, floats)]
    others = renamed(model, floats)
    named = _entries(others, [*schemes, *others], model)
    return [*tower_entries(model, floats), *loose, *named, *experts_entries(model, schemes)]


def experts_entries(model: ModelView, schemes: Mapping[str, Scheme]) -> list[str]:
    """Entries that match the experts that ``model`` has stacked in one tensor, which stay float.

    Engines look up the name of all experts of a layer, or names inside it that no tensor has.
    """
    stacked = model.stacked_experts
    if not stacked:
        return []
    entry = r"re:.*\.experts(\..+)?$"
    if not any(matches(entry, name) for name in schemes):
        return [entry]
    return [rf"re:{re.escape(name)}(\..+)?$" for name in stacked]


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    activations = scheme.activations
    return {
        "targets": targets,
        "weights": args_to_json(scheme.weights),
        "input_activations": None if activations is None else args_to_json(activations),
        "output_activations": None,
    }


def args_to_json(args: QuantArgs) -> dict[str, Any]:
    """The fields of compressed-tensors' QuantizationArgs for ``args``."""
    plain: dict[str, Any] = {
        "num_bits": args.bits,
        "type": "float" if args.is_float else "int",
        "symmetric": args.symmetric,
        "strategy": args.strategy,
        "group_size": args.group_size,
        "block_structure": None if args.block is None else list(args.block),
        "dynamic": args.dynamic,
        "actorder": None,
        "observer": None if args.dynamic else "minmax",
        "observer_kwargs": {},
    }
    if args.two_level:  # for inputs, the global scale is static and the group scales are dynamic
        plain |= {"strategy": "tensor_group", "dynamic": "local" if args.dynamic else False}
        plain["observer"] = "minmax"
    if args.fixes_scales:
        plain["scale_dtype"] = _SCALE_DTYPES[args.scale_dtype]
    return plain


def patterns(names: Iterable[str], among: Iterable[str], blocks: tuple[str, ...]) -> list[str]:
    """A short list of entries that match all of ``names`` and no other name in ``among``.

    Names that occur in every block become one expression. A name that is part of another name
    becomes an expression too, since SGLang matches plain names as parts of names.
    """
    wanted, present = set(names), set(among)
    inside: dict[str, set[str]] = {}
    for name in present:
        block = next((block for block in blocks if name.startswith(block + ".")), None)
        if block is not None:
            inside.setdefault(_any_number(name.removeprefix(block + ".")), set()).add(name)
    entries, covered = [], set()
    for local, members in inside.items():
        entry = rf"re:.*\.{local}$"
        # The expression for `proj` would match `attn.proj` too.
        if members <= wanted and not any(matches(entry, name) for name in present - wanted):
            entries.append(entry)
            covered |= members
    for experts, inner in expert_groups(wanted - covered).items():
        entry = rf"re:.*{re.escape(portable(experts))}\..+"
        if len(inner) > 1 and not any(matches(entry, name) for name in present - wanted):
            entries.append(entry)
            covered |= {*inner}
    for name in wanted - covered:
        alone = not any(name in longer for longer in present - {name})
        entries.append(name if alone else expression(name, present - {name}))
    return sorted(entries)


def expression(name: str, others: Iterable[str]) -> str:
    """An expression that matches ``name`` and none of ``others``, in composite models too."""
    entry = rf"re:.*\b{re.escape(portable(name))}$"
    if portable(name) != name and not any(matches(entry, other) for other in others):
        return entry
    return f"re:{re.escape(name)}$"


def _any_number(local: str) -> str:
    """An expression for a name within a block, in which any number may replace an expert's."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in local.split("."))


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """One config group: its modules, their scheme, and the name of their layout."""

    targets: tuple[str, ...]
    scheme: Scheme
    format: str


@dataclass(frozen=True)
class Configuration:
    """A parsed ``quantization_config``.

    ``plain``: how plain entries of ``ignore`` match names. ``embedding``: the module that is not of
    the class ``Linear`` but of ``Embedding``.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    plain: Plain = "whole"
    embedding: str | None = None

    @classmethod
    def parse(
        cls, config: Mapping[str, Any], *, plain: Plain = "whole", embedding: str | None = None
    ) -> Configuration:
        """Parse ``config``. Raises QplugError for a configuration that no engine takes."""
        if config.get("quant_method") != "compressed-tensors":
            raise QplugError(
                f"quant_method {config.get('quant_method')!r} is another format's, not "
                "compressed-tensors"
            )
        try:
            groups = tuple(
                Group(
                    tuple(group["targets"]),
                    _scheme(group),
                    group.get("format") or config["format"],
                )
                for group in config["config_groups"].values()
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise QplugError(f"quantization_config is damaged: {error!r}") from error
        return cls(groups, tuple(config.get("ignore") or ()), plain, embedding)

    def ignored(self, name: str) -> bool:
        """Whether the module ``name`` stays float."""
        return any(
            matches(entry, name)
            if entry.startswith("re:")
            else plain_match(entry, name, self.plain)
            for entry in self.ignore
        )

    def group(self, name: str) -> Group | None:
        """The group of the module ``name``, by its name, else by its class; None if float."""
        if self.ignored(name):
            return None
        for group in self.groups:
            if any(matches(target, name) for target in group.targets):
                return group
        kind = "Linear" if name != self.embedding else EMBEDDING
        return next((group for group in self.groups if kind in group.targets), None)


#: Names of an expert's linears by which engines look up how to build all experts of a layer.
_IN_EXPERT = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def quantizes_experts(config: Configuration, name: str) -> bool:
    """Whether ``config`` makes engines build the experts of the module ``name`` with codes."""
    return any(config.group(f"{name}.0.{local}") is not None for local in _IN_EXPERT)


def matches(entry: str, name: str) -> bool:
    """Whether ``entry`` of ``targets`` or ``ignore`` equals or matches the module ``name``."""
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return entry == name


def _scheme(group: Mapping[str, Any]) -> Scheme:
    weights = _args_from_json(group["weights"])
    inputs = group.get("input_activations")
    return named_scheme(weights, None if inputs is None else _args_from_json(inputs))


def named_scheme(weights: QuantArgs, activations: QuantArgs | None) -> Scheme:
    """The preset with these formats, in groups of any size; else a scheme named after them."""
    for preset in PRESETS.values():
        sizes = preset.weights.strategy == "group" and not preset.weights.fixes_scales
        if sizes and weights.strategy in ("group", "channel"):
            preset = preset.with_group_size(weights.group_size or -1)
        if (preset.weights, preset.activations) == (weights, activations):
            return preset
    name = f"{weights.dtype}/{activations.dtype if activations else '-'}"
    return Scheme(name, weights, activations)


def cache_of(config: Mapping[str, Any]) -> QuantArgs | None:
    """The format of the KV cache in a ``quantization_config``; None if the cache stays float.

    Raises QplugError if ``kv_cache_scheme`` is damaged.
    """
    scheme = config.get("kv_cache_scheme")
    try:
        return None if scheme is None else _args_from_json(scheme)
    except (KeyError, TypeError, AttributeError) as error:
        raise QplugError(f"kv_cache_scheme is damaged: {error!r}") from error


def _args_from_json(args: Mapping[str, Any]) -> QuantArgs:
    bits, strategy = args["num_bits"], args["strategy"]
    floats = {8: "e4m3", 4: "e2m1"}
    is_float = args.get("type", "int") == "float"
    scale_dtype = "float32"
    if is_float and bits == 4 and strategy == "tensor_group":
        strategy, scale_dtype = "group", E4M3_SCALES
    elif is_float and strategy == "group" and args.get("group_size") == 32:
        # Engines take groups of 32 in four bits for MXFP4, whatever the dtype of scales is.
        powers = str(args.get("scale_dtype")).endswith("uint8")
        scale_dtype = E8M0_SCALES if bits == 4 or powers else scale_dtype
    return QuantArgs(
        dtype=floats[bits] if is_float else f"int{bits}",
        strategy=strategy,
        group_size=args.get("group_size") if strategy == "group" else None,
        block=tuple(args["block_structure"]) if args.get("block_structure") else None,
        symmetric=args.get("symmetric", True),
        dynamic=bool(args.get("dynamic", False)),
        scale_dtype=scale_dtype,
    )
