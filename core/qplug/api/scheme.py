"""Describes how weights and activations are stored: number formats, scales, named schemes.

The names are the ecosystem's preset names (``W4A16`` ... ``FP8_BLOCK``). Nothing here needs torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from qplug.errors import QplugError, did_you_mean

Strategy = Literal["tensor", "channel", "group", "block", "token", "attn_head"]

#: The bits of exponent and mantissa of each float format, by name (``e4m3``). Every format has a
#: sign bit, the bias ``2^(E-1) - 1``, and subnormals. With one exponent bit the values are evenly
#: spaced; without mantissa bits they are zero and powers of two. The widest is bfloat16, ``e8m7``.
FLOATS: dict[str, tuple[int, int]] = {f"e{e}m{m}": (e, m) for e in range(1, 9) for m in range(8)}


def all_finite_max(exponent: int, mantissa: int) -> float:
    """Returns the largest value of a float format that has no codes for infinity and NaN.

    ``exponent`` and ``mantissa`` are numbers of bits.
    """
    return math.ldexp(2 - 2.0**-mantissa, 2 ** (exponent - 1))


def _float_max(exponent: int, mantissa: int) -> float:
    if (exponent, mantissa) == (4, 3):
        return 448.0
    ieee = (exponent, mantissa) == (5, 2) or exponent == 8
    return all_finite_max(exponent, mantissa) / (2 if ieee else 1)


#: The largest finite value of each float format. ``e4m3`` uses one code for NaN (OCP's ``fn``).
#: ``e5m2`` and the formats with 8 exponent bits use the top exponent for infinity and NaN, as IEEE
#: 754 does; the largest ``e5m2`` is 57344. In all other formats every code is a number, as in OCP's
#: MX formats (6 for ``e2m1``, 28 for ``e3m2``, 7.5 for ``e2m3``).
FLOAT_MAX: dict[str, float] = {name: _float_max(*bits) for name, bits in FLOATS.items()}

#: The smallest positive value of each float format, which is the distance of its subnormals.
FLOAT_STEP = {name: math.ldexp(1, 2 - 2 ** (e - 1) - m) for name, (e, m) in FLOATS.items()}

#: Dtypes of scales that a format prescribes to every backend. The scales of NVFP4 are fp8, and a
#: float32 global scale multiplies them; the scales of MXFP4 and MXFP8 (OCP MX) are powers of two.
E4M3_SCALES, E8M0_SCALES = "float8_e4m3fn", "float8_e8m0fnu"


#: The dtypes in which scales are stored.
SCALE_DTYPES = ("float32", "bfloat16", "float16", E4M3_SCALES, E8M0_SCALES)


@dataclass(frozen=True)
class QuantArgs:
    """How weights, activations or a KV cache are quantized.

    ``dtype`` is ``int<bits>`` or one of ``FLOATS``, ``e<exponent>m<mantissa>``. ``strategy`` says
    what shares one scale: the whole tensor (``tensor``), an output row (``channel``),
    ``group_size`` columns of a row (``group``), a ``block`` of rows x columns, a token of an
    activation (``token``), or a head of attention in a KV cache (``attn_head``).

    ``dynamic`` scales are computed by the engine at run time and are not stored. ``scale_dtype`` is
    the dtype in which the backend stores scales: codes must be nearest under the scale *as stored*.
    ``E4M3_SCALES`` and ``E8M0_SCALES`` are prescribed by the format. ``use_qtorch`` makes the
    package qtorch round to a float format, which no engine does: ties away from zero, saturation at
    ``all_finite_max``.

    Raises QplugError if the fields contradict one another.
    """

    dtype: str
    strategy: Strategy
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale_dtype: str = "float32"
    use_qtorch: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        if self.dtype not in FLOATS and not re.fullmatch(r"int[2-8]", self.dtype):
            raise QplugError(
                f"there is no number format {self.dtype!r}: use int2 to int8, or e<E>m<M> with "
                "1 to 8 bits of exponent and 0 to 7 of mantissa, such as e4m3"
            )
        if (self.strategy == "group") != (self.group_size is not None):
            raise QplugError(f"strategy {self.strategy!r} does not go with group_size")
        if self.group_size is not None and self.group_size < 1:
            raise QplugError(f"group_size must be positive, not {self.group_size}")
        if (self.strategy == "block") != (self.block is not None):
            raise QplugError(f"strategy {self.strategy!r} does not go with block")
        if self.fixes_scales and (self.strategy != "group" or not self.is_float):
            raise QplugError(f"scales in {self.scale_dtype} go with groups of floats alone")
        if self.is_float and not self.symmetric:
            raise QplugError(f"{self.dtype} is a float format, which is always symmetric")
        if self.use_qtorch and not self.is_float:
            raise QplugError(f"use_qtorch: {self.dtype} is not a float format")
        if self.use_qtorch and FLOATS[self.dtype][0] == 8:
            raise QplugError(f"use_qtorch: {self.dtype} has no largest value in qtorch")

    @property
    def is_float(self) -> bool:
        """Whether codes are floats, not integers."""
        return self.dtype in FLOATS

    @property
    def fixes_scales(self) -> bool:
        """Whether the format prescribes the dtype of its scales."""
        return self.scale_dtype in (E4M3_SCALES, E8M0_SCALES)

    @property
    def two_level(self) -> bool:
        """Whether a ``global_scale`` of the whole tensor multiplies all scales (NVFP4)."""
        return self.scale_dtype == E4M3_SCALES

    @property
    def stores_scale(self) -> bool:
        """Whether a scale is stored. For the inputs of NVFP4 that is the global scale alone."""
        return not self.dynamic or self.two_level

    @property
    def bits(self) -> int:
        """The bits of one code, including the sign of a float format."""
        if self.is_float:
            return 1 + sum(FLOATS[self.dtype])
        return int(self.dtype[3:])

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and largest integer code; signed if symmetric, else from 0."""
        if self.symmetric:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Returns the shape of the scales of a weight of ``shape`` ``(out, in)``.

        It always has two axes: rows, or blocks of rows, and groups of columns.
        """
        out, width = shape
        if self.strategy == "group":
            assert self.group_size is not None
            return out, -(-width // self.group_size)
        if self.strategy == "block":
            assert self.block is not None
            return -(-out // self.block[0]), -(-width // self.block[1])
        return (1, 1) if self.strategy == "tensor" else (out, 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns a mapping for JSON, which ``from_dict`` reads."""
        return {**self.__dict__, "block": self.block and [*self.block]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> QuantArgs:
        """Returns the QuantArgs that ``to_dict`` wrote as ``plain``.

        Raises QplugError, KeyError or TypeError if ``plain`` is something else.
        """
        return cls(**{**plain, "block": plain["block"] and tuple(plain["block"])})


def _check_types(args: QuantArgs) -> None:
    """Raises QplugError for a value that its field cannot have: files of others are read too."""
    block = args.block
    sizes = (args.group_size,) if block is None else (args.group_size, *_members(block))
    right = {
        "dtype": isinstance(args.dtype, str),
        "strategy": args.strategy in get_args(Strategy),
        "block": block is None or len(_members(block)) == 2,
        "symmetric": isinstance(args.symmetric, bool),
        "dynamic": isinstance(args.dynamic, bool),
        "scale_dtype": args.scale_dtype in SCALE_DTYPES,
        "use_qtorch": isinstance(args.use_qtorch, bool),
    }
    for name, is_right in right.items():
        if not is_right:
            raise QplugError(f"{name}: {ascii(getattr(args, name))[:40]} is wrong")
    for size in sizes:
        if size is not None and not (type(size) is int and abs(size) < 2**31):
            raise QplugError(f"{ascii(size)[:40]} is no size of a group or block")


def _members(block: object) -> tuple[object, ...]:
    return block if isinstance(block, tuple) else ()


@dataclass(frozen=True)
class Scheme:
    """How the weight and the inputs of a layer are quantized, under a name.

    ``activations`` is None if inputs stay float. Raises QplugError for what a KV cache alone has.
    """

    name: str
    weights: QuantArgs
    activations: QuantArgs | None = None

    def __post_init__(self) -> None:
        """Checks that a layer can have such scales."""
        for args in (self.weights, self.activations):
            if args is not None and args.strategy == "attn_head":
                raise QplugError("strategy 'attn_head' is of a KV cache, not of a layer")

    @property
    def static_inputs(self) -> bool:
        """Whether inputs are rounded under a stored scale, which comes from calibration data."""
        return self.activations is not None and self.activations.stores_scale

    def with_group_size(self, size: int) -> Scheme:
        """Returns this scheme with another group size; -1 is one scale for a whole row.

        Raises QplugError if the weights are not quantized in groups or rows, as in ``FP8_BLOCK``;
        if the format prescribes the group size; if weights are floats and inputs are quantized
        too; or if the scheme has one scale a row and its weights are floats, or inputs quantized.
        """
        floats_with_inputs = self.weights.is_float and self.activations is not None
        is_fixed = floats_with_inputs or self.weights.fixes_scales
        if self.weights.strategy not in ("group", "channel") or is_fixed:
            raise QplugError(f"{self.name} has no group size to choose")
        by_row = self.weights.strategy == "channel"
        if by_row and size != -1 and (self.weights.is_float or self.activations is not None):
            raise QplugError(f"{self.name} has one scale for each row: no engine serves groups")
        weights = (
            replace(self.weights, strategy="channel", group_size=None)
            if size == -1
            else replace(self.weights, strategy="group", group_size=size)
        )
        return replace(self, weights=weights)

    def with_scale_dtype(self, dtype: str) -> Scheme:
        """Returns this scheme with the scales of weights stored in ``dtype``.

        A scheme whose format prescribes the dtype of scales is returned unchanged.
        """
        if self.weights.fixes_scales:
            return self
        return replace(self, weights=replace(self.weights, scale_dtype=dtype))

    @property
    def uses_qtorch(self) -> bool:
        """Whether the package qtorch rounds weights or inputs."""
        return any(args.use_qtorch for args in (self.weights, self.activations) if args)

    def with_qtorch(self) -> Scheme:
        """Returns this scheme with floats rounded by qtorch; integer formats stay as they are."""

        def rounded(args: QuantArgs) -> QuantArgs:
            return replace(args, use_qtorch=True) if args.is_float else args

        inputs = self.activations
        return replace(self, weights=rounded(self.weights), activations=inputs and rounded(inputs))

    def to_dict(self) -> dict[str, Any]:
        """Returns a mapping for JSON, which ``from_dict`` reads."""

        def plain(args: QuantArgs | None) -> dict[str, Any] | None:
            return None if args is None else args.to_dict()

        return {
            "name": self.name,
            "weights": plain(self.weights),
            "activations": plain(self.activations),
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Scheme:
        """Returns the scheme that ``to_dict`` wrote as ``plain``.

        Raises QplugError, KeyError or TypeError if ``plain`` is something else.
        """

        def args(values: dict[str, Any] | None) -> QuantArgs | None:
            return None if values is None else QuantArgs.from_dict(values)

        weights, name = args(plain["weights"]), plain["name"]
        if weights is None or not isinstance(name, str):
            raise QplugError("a scheme needs a name and weights")
        return cls(name, weights, args(plain["activations"]))


_TOKEN_INT8 = QuantArgs("int8", "token", dynamic=True)
_TOKEN_E4M3 = QuantArgs("e4m3", "token", dynamic=True)
_STATIC_INT8 = QuantArgs("int8", "tensor")
_STATIC_E4M3 = QuantArgs("e4m3", "tensor")
_GROUP_E4M3 = QuantArgs("e4m3", "group", 128, dynamic=True)
_NVFP4 = QuantArgs("e2m1", "group", 16, scale_dtype=E4M3_SCALES)
_MXFP4 = QuantArgs("e2m1", "group", 32, scale_dtype=E8M0_SCALES)
_MXFP8 = QuantArgs("e4m3", "group", 32, scale_dtype=E8M0_SCALES)


def _odd_integers() -> Iterator[Scheme]:
    """Yields weights of 2, 3, 5, 6 and 7 bits with float inputs, symmetric and asymmetric."""
    for bits in (2, 3, 5, 6, 7):
        for symmetric in (True, False):
            name = f"W{bits}A16" if symmetric else f"W{bits}A16_ASYM"
            yield Scheme(name, QuantArgs(f"int{bits}", "group", 128, symmetric=symmetric))


#: The named schemes, by name.
PRESETS: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("W4A16", QuantArgs("int4", "group", 128)),
        Scheme("W4A16_ASYM", QuantArgs("int4", "group", 128, symmetric=False)),
        Scheme("W8A16", QuantArgs("int8", "group", 128)),
        Scheme("W8A16_ASYM", QuantArgs("int8", "group", 128, symmetric=False)),
        *_odd_integers(),
        Scheme("W4A8", QuantArgs("int4", "group", 128), _TOKEN_INT8),
        Scheme("W8A8", QuantArgs("int8", "channel"), _TOKEN_INT8),
        Scheme("W8A8_STATIC", QuantArgs("int8", "channel"), _STATIC_INT8),
        Scheme("FP8", QuantArgs("e4m3", "tensor"), _STATIC_E4M3),
        Scheme("FP8_DYNAMIC", QuantArgs("e4m3", "channel"), _TOKEN_E4M3),
        Scheme(
            "FP8_BLOCK",
            QuantArgs("e4m3", "block", block=(128, 128)),
            _GROUP_E4M3,
        ),
        Scheme("FP8A16", QuantArgs("e4m3", "channel")),
        Scheme("FP8A16_TENSOR", QuantArgs("e4m3", "tensor")),
        Scheme("FP8A16_BLOCK", QuantArgs("e4m3", "block", block=(128, 128))),
        Scheme("W4AFP8", QuantArgs("int4", "group", 128), _TOKEN_E4M3),
        Scheme("NVFP4A16", _NVFP4),
        Scheme("NVFP4", _NVFP4, replace(_NVFP4, dynamic=True)),
        Scheme("MXFP4A16", _MXFP4),
        Scheme("MXFP4", _MXFP4, replace(_MXFP4, dynamic=True)),
        Scheme("MXFP4AFP8", _MXFP4, _GROUP_E4M3),
        Scheme("MXFP8", _MXFP8, replace(_MXFP8, dynamic=True)),
    )
}

#: The formats of a KV cache, by name. Keys and values have one scale each in every layer, or each
#: head has its own; then each head of queries has one too.
CACHES: dict[str, QuantArgs] = {
    "fp8": _STATIC_E4M3,
    "fp8_per_head": replace(_STATIC_E4M3, strategy="attn_head"),
}


#: Other spellings of schemes, in the exact case: ``FP8`` is the name of a scheme, ``fp8`` is what
#: engines call fp8 weights with scales of inputs that the engine computes.
ALIASES: dict[str, str] = {
    "int4": "W4A16",
    "INT4": "W4A16",
    "int8": "W8A8",
    "INT8": "W8A8",
    "fp8": "FP8_DYNAMIC",
}


def preset(name: str) -> Scheme:
    """Returns the scheme called ``name``: a key of ``ALIASES``, or a name in any case.

    The schemes in ``PRESETS`` are those that engines serve. Any other ``W<weights>A<inputs>`` is a
    scheme to measure: each number is 2 to 8 bits or a float format (``W4A4``, ``WE2M1A16``,
    ``W4AE4M3``), and ``_ASYM`` makes integer weights asymmetric. With ``A16`` inputs stay float and
    weights have groups of 128; else weights have a scale for each row and inputs a scale for each
    token. If such a scheme equals a preset, the preset is returned.

    Raises QplugError if there is no such scheme or number format.
    """
    typed, name = name, ALIASES.get(name, name).upper()
    if name in PRESETS:
        return PRESETS[name]
    match = re.fullmatch(rf"W({_NUMBER})A({_NUMBER}|16)(_ASYM)?", name)
    if match is None:
        hint = did_you_mean(name, PRESETS)
        raise QplugError(
            f"no scheme {typed!r}.{hint} There are: {', '.join(PRESETS)}; "
            "to be measured: W2A2 ... W8A8, WE2M1A16 ... WE5M2AE5M2"
        )
    weights, inputs, asymmetric = match.groups()
    dtype, symmetric = _dtype(weights), not asymmetric
    if inputs == "16":
        return Scheme(name, QuantArgs(dtype, "group", 128, symmetric=symmetric))
    scheme = Scheme(
        name,
        QuantArgs(dtype, "channel", symmetric=symmetric),
        QuantArgs(_dtype(inputs), "token", dynamic=True),
    )
    return next((known for known in PRESETS.values() if _same(known, scheme)), scheme)


# Matches float formats of any size: QuantArgs then refuses a format that does not exist with a
# better message than "no scheme".
_NUMBER = r"[2-8]|E\d+M\d+"


def _dtype(number: str) -> str:
    return number.lower() if number.startswith("E") else f"int{number}"


def _same(first: Scheme, second: Scheme) -> bool:
    """Returns whether two schemes differ in nothing but their names."""
    return (first.weights, first.activations) == (second.weights, second.activations)
