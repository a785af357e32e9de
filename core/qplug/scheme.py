"""How weights and activations are stored: number formats, scale layouts, and the named schemes.

The names are the ecosystem's preset names (``W4A16`` ... ``FP8_BLOCK``). Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from qplug.errors import QplugError

Strategy = Literal["tensor", "channel", "group", "block", "token"]

#: Largest finite value of the float formats that have one fixed by their standard.
FLOAT_MAX = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}


@dataclass(frozen=True)
class QuantArgs:
    """How one kind of tensor is quantized.

    ``dtype`` is ``int<bits>`` or ``e<exponent>m<mantissa>``. One scale serves: the whole tensor
    (``tensor``), one output row (``channel``), ``group_size`` columns of one row (``group``), one
    ``block`` of rows x columns, or one token of an activation (``token``). ``dynamic`` scales are
    found by the engine at run time and are not stored. ``scale_dtype`` is the dtype in which the
    backend stores scales: codes must be nearest under the scale *as stored*.
    """

    dtype: str
    strategy: Strategy
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"int[2-8]|e[1-8]m[0-9]", self.dtype):
            raise QplugError(f"unknown number format {self.dtype!r}: say int2..int8 or e4m3, e5m2")
        if (self.strategy == "group") != (self.group_size is not None):
            raise QplugError(f"strategy {self.strategy!r} does not go with group_size")
        if self.group_size is not None and self.group_size < 1:
            raise QplugError(f"group_size must be positive, not {self.group_size}")
        if (self.strategy == "block") != (self.block is not None):
            raise QplugError(f"strategy {self.strategy!r} does not go with block")
        if self.is_float and not self.symmetric:
            raise QplugError(f"{self.dtype} is symmetric by nature")

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith("e")

    @property
    def bits(self) -> int:
        """Bits of one code, the sign of a float format included."""
        if self.is_float:
            exponent, mantissa = self.dtype[1:].split("m")
            return 1 + int(exponent) + int(mantissa)
        return int(self.dtype[3:])

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest integer code: signed if symmetric, from 0 if not."""
        if self.symmetric:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a weight ``[out, in]``: always two axes, ``[out, groups]``."""
        out, width = shape
        if self.strategy == "group":
            assert self.group_size is not None
            return out, -(-width // self.group_size)
        if self.strategy == "block":
            assert self.block is not None
            return -(-out // self.block[0]), -(-width // self.block[1])
        return (1, 1) if self.strategy == "tensor" else (out, 1)

    def to_dict(self) -> dict[str, Any]:
        """A plain form for JSON; ``from_dict`` reads it back."""
        return {**self.__dict__, "block": self.block and [*self.block]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> QuantArgs:
        return cls(**{**plain, "block": plain["block"] and tuple(plain["block"])})


@dataclass(frozen=True)
class Scheme:
    """What a layer is turned into. ``activations`` is None where they stay as they are."""

    name: str
    weights: QuantArgs
    activations: QuantArgs | None = None

    @property
    def static_inputs(self) -> bool:
        """Whether inputs are rounded under a stored scale, which calibration data must tell."""
        return self.activations is not None and not self.activations.dynamic

    def with_group_size(self, size: int) -> Scheme:
        """The same scheme with another group size; -1 is one scale for the whole row.

        Raises QplugError for schemes whose weights are not quantized in groups or rows of
        integers, such as ``FP8_BLOCK``.
        """
        if self.weights.strategy not in ("group", "channel") or self.weights.is_float:
            raise QplugError(f"{self.name} has no group size to choose")
        if self.activations is not None and size != -1:
            raise QplugError(f"{self.name} has one scale for each row: no engine serves groups")
        weights = (
            replace(self.weights, strategy="channel", group_size=None)
            if size == -1
            else replace(self.weights, strategy="group", group_size=size)
        )
        return replace(self, weights=weights)

    def with_scale_dtype(self, dtype: str) -> Scheme:
        """The same scheme with the scales of weights stored in ``dtype``."""
        return replace(self, weights=replace(self.weights, scale_dtype=dtype))

    def to_dict(self) -> dict[str, Any]:
        """A plain form for JSON; ``from_dict`` reads it back."""

        def plain(args: QuantArgs | None) -> dict[str, Any] | None:
            return None if args is None else args.to_dict()

        return {
            "name": self.name,
            "weights": plain(self.weights),
            "activations": plain(self.activations),
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Scheme:
        def args(values: dict[str, Any] | None) -> QuantArgs | None:
            return None if values is None else QuantArgs.from_dict(values)

        weights = args(plain["weights"])
        assert weights is not None
        return cls(plain["name"], weights, args(plain["activations"]))


_TOKEN_INT8 = QuantArgs("int8", "token", dynamic=True)
_TOKEN_E4M3 = QuantArgs("e4m3", "token", dynamic=True)
_STATIC_INT8 = QuantArgs("int8", "tensor")
_STATIC_E4M3 = QuantArgs("e4m3", "tensor")

#: The schemes that have a name.
PRESETS: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("W4A16", QuantArgs("int4", "group", 128)),
        Scheme("W4A16_ASYM", QuantArgs("int4", "group", 128, symmetric=False)),
        Scheme("W8A16", QuantArgs("int8", "group", 128)),
        Scheme("W8A8", QuantArgs("int8", "channel"), _TOKEN_INT8),
        Scheme("W8A8_STATIC", QuantArgs("int8", "channel"), _STATIC_INT8),
        Scheme("FP8", QuantArgs("e4m3", "tensor"), _STATIC_E4M3),
        Scheme("FP8_DYNAMIC", QuantArgs("e4m3", "channel"), _TOKEN_E4M3),
        Scheme(
            "FP8_BLOCK",
            QuantArgs("e4m3", "block", block=(128, 128)),
            QuantArgs("e4m3", "group", 128, dynamic=True),
        ),
    )
}

#: How the keys and values of attention can be stored: one scale each, a layer.
CACHES: dict[str, QuantArgs] = {"fp8": _STATIC_E4M3}


def preset(name: str) -> Scheme:
    """The scheme called ``name``, in upper or lower case.

    Beside those that engines serve there is one for every ``W<2-8>A<2-8 or 16>`` of integers, with
    ``_ASYM`` for asymmetric weights: groups of 128 where inputs stay as they are, else a scale each
    row and each token.
    """
    name = name.upper()
    if name in PRESETS:
        return PRESETS[name]
    found = re.fullmatch(r"W([2-8])A([2-8]|16)(_ASYM)?", name)
    if found is None:
        names = ", ".join(PRESETS)
        raise QplugError(f"no scheme {name!r}. There are: {names}; to be measured: W2A16 ... W8A8")
    weights, inputs, asymmetric = found.groups()
    if inputs == "16":
        args = QuantArgs(f"int{weights}", "group", 128, symmetric=not asymmetric)
        return Scheme(name, args)
    args = QuantArgs(f"int{weights}", "channel", symmetric=not asymmetric)
    return Scheme(name, args, QuantArgs(f"int{inputs}", "token", dynamic=True))
