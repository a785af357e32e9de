"""Reads LLMC's ``weight``, ``act`` and ``kvcache`` sections as schemes."""

from __future__ import annotations

import re
from typing import Literal

from qplug.api.scheme import FLOAT_MAX, QuantArgs, Scheme
from qplug.errors import QplugError
from qplug.recipe.recipe import ObserverName
from qplug.recipe.spelled_scheme import spelled
from qplug.recipe.yaml_tree import Node, Section

#: qplug's names for LLMC's observers of static inputs; the default is minmax.
OBSERVERS: dict[str, ObserverName] = {
    "minmax": "minmax",
    "static_minmax": "minmax",
    "static_moving_minmax": "moving-average",
    "static_hist": "histogram",
}

_INT, _FLOAT = "int-quant", "float-quant"
_WEIGHT_RANGES = ("minmax", "mse", "learnable", "hqq")
_WEIGHTS = ("per_tensor", "per_channel", "per_group", "per_block")
_INPUTS = ("per_token", "per_channel", "per_tensor", "per_group")

#: Keys of LLMC's own training and bookkeeping, which do not change the result.
_SILENT = ("qmax_to_tensor", "pack_mode", "pack_version", "need_pack", "ste", "ste_all", "bins")
_HQQ = ("lp_norm", "beta", "kappa", "iters", "axis")


def read_scheme(quant: Section, kind: str | None) -> Scheme:
    """Read the scheme in a section with ``weight`` and an optional ``act``.

    ``kind`` is the ``quant_type`` of an outer section, where older files have it, or None. Raises
    QplugError, with file and line, for a wrong value or an unsupported scheme.
    """
    kind = _kind(quant) or kind
    node = quant.need("weight")
    weight = Section(node, quant.warnings)
    weights = _args(weight, kind, _WEIGHTS)
    _weight_extras(weight, weights)
    act, inputs = quant.section("act"), None
    if act is not None:
        inputs = _args(act, kind, _INPUTS, is_input=True)
        for key in ("quant_attn", "quant_softmax", "quant_act_fn"):
            if act.switch(key):
                raise act.need(key).place.error(
                    "qplug rounds only inputs of linear layers", ["False"]
                )
        act.leave("calib_algo", *_SILENT)
        act.warn_of_rest()
    try:
        return spelled(weights, inputs)
    except QplugError as error:
        raise (act or weight).place.error(str(error)) from error


def observer_of(act: Section | None) -> ObserverName:
    """The observer that an ``act`` section asks for; "minmax" by default."""
    node = act.get("calib_algo") if act is not None else None
    return "minmax" if node is None else OBSERVERS[node.word(OBSERVERS)]


def cache_of(kvcache: Section) -> str:
    """The name of the KV cache format in a ``kvcache`` section.

    Raises QplugError, with file and line, if no engine reads such a cache.
    """
    kvcache.word("method", ["Naive"])  # Kivi keeps the last tokens float: no engine can do that
    kvcache.leave("static", "calib_algo", "residual_length", "special", "use_qtorch")
    args = _args(kvcache, _kind(kvcache), ("per_tensor", "per_token", "per_group", "per_head"))
    if (args.dtype, args.strategy) != ("e4m3", "tensor"):
        raise kvcache.place.error(
            f"a cache of {args.dtype}, {kvcache.need('granularity').value}: no engine reads one",
            "quant_type: float-quant, bit: e4m3, granularity: per_tensor",
        )
    kvcache.warn_of_rest()
    return "fp8"


def rounds_as_qtorch(scheme: Scheme, *sections: Section | None) -> bool:
    """Whether ``sections`` ask to round a float format of ``scheme`` as qtorch does.

    qplug always rounds the formats that engines compute with (e4m3, e5m2) as engines do.
    """
    asked = any(section.switch("use_qtorch") for section in sections if section is not None)
    parts = [args for args in (scheme.weights, scheme.activations) if args is not None]
    return asked and any(args.is_float and args.dtype not in ("e4m3", "e5m2") for args in parts)


def _kind(section: Section) -> str | None:
    node = section.get("quant_type")
    if node is None:
        return None
    return node.word([_INT, _FLOAT, "int_quant", "float_quant"]).replace("_", "-")


def _args(
    section: Section, outer_kind: str | None, granularities: tuple[str, ...], is_input: bool = False
) -> QuantArgs:
    bit = section.need("bit")
    dtype = _dtype(bit, _kind(section) or outer_kind)
    granularity = section.need("granularity")
    name = granularity.word([*granularities, "per_head"])
    if name not in granularities:
        raise granularity.place.error(f"{name!r} is not supported here", granularities)
    symmetric = section.need("symmetric").switch()
    if dtype.startswith("e"):
        symmetric = True  # as in LLMC
    section.leave("use_qtorch", "static", "group_size", "block_size", "head_num")
    strategy, size, block = _grain(section, name, is_input)
    static = is_input and section.switch("static")
    if static and name != "per_tensor":
        raise granularity.place.error(f"{name!r} does not go with static: True", ["per_tensor"])
    if is_input and name == "per_tensor" and not static:
        raise granularity.place.error(
            "engines cannot compute one scale for all tokens", "static: True, per_token"
        )
    _check_range(section, dtype, symmetric)
    try:
        return QuantArgs(dtype, strategy, size, block, symmetric, is_input and not static)
    except QplugError as error:
        raise section.place.error(str(error)) from error


def _dtype(bit: Node, kind: str | None) -> str:
    value = bit.scalar()
    if isinstance(value, str) and re.fullmatch(r"e[1-8]m[0-9]", value):
        if kind == _INT:
            raise bit.place.error(f"{value!r} does not go with {_INT}", f"quant_type: {_FLOAT}")
        return value
    if value == 48:
        raise bit.place.error("qplug has no 4 bits in 8 (two levels of scales)", "2 to 8, e4m3")
    if isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= 8:
        if kind == _FLOAT:
            raise bit.place.error(f"{value} does not go with {_FLOAT}", "e4m3, e5m2, e2m1 ...")
        return f"int{value}"
    raise bit.place.error(f"{value!r} is wrong", "2 to 8, or a float format such as e4m3")


Grain = tuple[
    Literal["tensor", "channel", "group", "block", "token"], "int | None", "tuple[int, int] | None"
]


def _grain(section: Section, granularity: str, is_input: bool) -> Grain:
    if granularity == "per_group":
        size = section.need("group_size")
        return "group", size.whole(1), None
    if granularity == "per_block":
        size = section.need("block_size")
        return "block", None, (size.whole(1), size.whole(1))
    if granularity == "per_tensor":
        return "tensor", None, None
    return ("token" if is_input else "channel"), None, None


def _check_range(section: Section, dtype: str, symmetric: bool) -> None:
    """Raise QplugError if ``int_range`` or ``float_range`` is not the full range of ``dtype``."""
    node = section.get("int_range") or section.get("float_range")
    if node is None:
        return
    if dtype.startswith("e"):
        top = FLOAT_MAX.get(dtype)
        usual: list[float] = [] if top is None else [-top, top]
    else:
        usual = [*QuantArgs(dtype, "channel", symmetric=symmetric).code_range]
    if [item.number() for item in node.items()] != usual:
        raise node.place.error(f"{node.plain()} is not the range of {dtype}", [usual])


def _weight_extras(weight: Section, args: QuantArgs) -> None:
    weight.leave("calib_algo", *_SILENT, *_HQQ, "mse_b_num", "maxshrink", "mse_grid")
    range_from = weight.get("calib_algo")
    if range_from is not None:
        range_from.word(_WEIGHT_RANGES)
    if not weight.switch("round_zp", default=True) and not args.symmetric:
        weight.warn("round_zp", "no effect: zero points are always integers, as engines need")
    weight.warn_of_rest()
