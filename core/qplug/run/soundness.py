"""Refuses codes, scales and errors that no sound run can have, whatever algorithm gave them.

All checks of a block are read together, so that a GPU is waited for once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qplug.api import Linear, QuantizedWeight
from qplug.api.scheme import FLOAT_STEP, QuantArgs
from qplug.errors import QplugError
from qplug.model.parameters import refuse_infinite
from qplug.numerics.losses import TOO_LARGE, TOO_SMALL
from qplug.numerics.rounding import code_dtype, round_floats
from qplug.numerics.scale_formats import largest_code

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Check:
    """A statement on ``linear``: ``holds`` is bool ``[]``; ``sentence`` says what is wrong."""

    linear: Linear
    holds: Tensor
    sentence: str


def refuse_unsound(
    linears: Sequence[Linear], codes: Mapping[str, QuantizedWeight], who: str
) -> None:
    """Raises QplugError for the first of ``codes`` that breaks the contract of QuantizedWeight.

    ``codes`` are by linear; ``who`` names the algorithm, and its plugin, in the message.
    """
    checks: list[_Check] = []
    for linear in linears:
        weight = codes[linear.name]
        sentence = _misshapen(linear, weight)
        if sentence is not None:
            raise QplugError(f"{linear.name}: {who} gave {sentence}; choose another algorithm")
        checks += _checks(linear, weight)
    for check, holds in zip(checks, _read(checks), strict=True):
        if not (holds or _is_zero(check)):
            raise QplugError(_blame(check, who))


def refuse_not_finite(numbers: Mapping[str, float], what: str) -> None:
    """Raises QplugError for the first of ``numbers``, by linear, that is NaN or infinite.

    ``what`` names the numbers: ``the error of its output``.
    """
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise QplugError(
                f"{name}: {what} is no finite number: its weights or inputs are too large, or its "
                "weights too small, to compute with in float32; mend the float model"
            )


@contextmanager
def blaming_weights(linears: Sequence[Linear]) -> Iterator[None]:
    """A context whose QplugErrors are replaced if a weight of ``linears`` is the cause.

    A weight that cannot be computed with is the fault of the float model, not of an algorithm, and
    an error may name another linear that shares a scale with it.
    """
    try:
        yield
    except QplugError:
        refuse_infinite({f"{linear.name}.weight": linear.weight for linear in linears})
        raise


def _misshapen(linear: Linear, weight: object) -> str | None:
    """Returns which part of ``weight`` is not as its type or shape should be, in words."""
    if not isinstance(weight, QuantizedWeight):
        return f"{type(weight).__name__}, not a QuantizedWeight"
    args, shape = linear.args, tuple(linear.weight.shape)
    if weight.args != args:
        return f"a weight in {weight.args.dtype}, {weight.args.strategy}, not as the scheme says"
    scales = args.scale_shape((shape[0], shape[1]))
    parts: list[tuple[str, Any, torch.dtype, tuple[int, ...]]] = [
        ("codes", weight.codes, code_dtype(args), shape),
        ("scales", weight.scale, torch.float32, scales),
    ]
    if args.symmetric and weight.zero is not None:
        return "zero points for symmetric codes"
    if not args.symmetric:
        parts.append(("zero points", weight.zero, torch.uint8, scales))
    if linear.input_scale is not None:
        parts.append(("a scale of inputs", linear.input_scale, torch.float32, (1,)))
    for name, part, dtype, wanted in parts:
        if not isinstance(part, torch.Tensor):
            return f"{name} of type {type(part).__name__}, not a tensor"
        if part.dtype != dtype or tuple(part.shape) != wanted:
            is_now = f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}"
            return f"{name} as {is_now}, not {str(dtype).removeprefix('torch.')} {list(wanted)}"
    return None


def _checks(linear: Linear, weight: QuantizedWeight) -> Iterator[_Check]:
    """Yields what must hold of the numbers in ``weight``."""
    args, scale, unit = linear.args, weight.scale, linear.global_scale
    yield _Check(linear, _positive(scale), "scales that are NaN, infinite, zero or negative")
    largest = scale.amax() * largest_code(args)
    yield _Check(linear, largest <= TOO_LARGE, _TOO_LARGE)
    yield _Check(linear, largest >= TOO_SMALL, _TOO_SMALL)
    if linear.input_scale is not None:
        yield _Check(linear, _positive(linear.input_scale), "a scale of inputs that is not sound")
    if unit is not None:
        yield _Check(linear, _positive(unit), "a global scale that is not sound")
    local = scale if unit is None else scale / unit
    if args.scale_dtype != "float32":
        stored = local.to(getattr(torch, args.scale_dtype)).float()
        yield _Check(linear, (stored == local).all(), f"scales that {args.scale_dtype} cannot hold")
    outside = f"codes that are no {args.dtype}"
    if args.is_float:
        yield _Check(linear, _on_grid(weight.codes, args), outside)
        return
    low, high = args.code_range
    if args.bits < 8:
        inside = (weight.codes.amin() >= low) & (weight.codes.amax() <= high)
        yield _Check(linear, inside, outside)
        if weight.zero is not None:
            yield _Check(linear, weight.zero.amax() <= high, "zero points outside the codes")


_TOO_LARGE = "weights too large"
_TOO_SMALL = "weights too small"


def _positive(scale: Tensor) -> Tensor:
    low, high = torch.aminmax(scale)
    return (low > 0) & (high < float("inf"))  # both are NaN if one is


def _on_grid(codes: Tensor, args: QuantArgs) -> Tensor:
    """Returns whether float ``codes`` are values of their format, bool ``[]``."""
    if codes.element_size() == 1:
        every = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
        on_grid = _is_value(every, args).to(codes.device)
        if FLOAT_STEP[args.dtype] == FLOAT_STEP.get(_NATIVE.get(codes.dtype, "")):
            # The format is torch's own: its NaN and infinities alone are no values.
            return _native_is_finite(codes)
        return on_grid[codes.view(torch.uint8).int()].all()
    return _is_value(codes.float(), args).all()


_NATIVE = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def _is_value(values: Tensor, args: QuantArgs) -> Tensor:
    rounded = round_floats(values.clone().nan_to_num_(), args).float()
    return rounded == values


def _native_is_finite(codes: Tensor) -> Tensor:
    top = torch.finfo(codes.dtype).max
    largest = torch.tensor([top]).to(codes.dtype).view(torch.uint8).item()
    bits = codes.view(torch.uint8)
    if bits.is_cuda:
        return (bits & 0x7F).amax() <= largest
    pieces = bits.flatten().numpy()
    step = 1 << 17
    return torch.tensor(
        all(
            int((pieces[n : n + step] & 0x7F).max()) <= largest for n in range(0, len(pieces), step)
        )
    )


def _read(checks: Sequence[_Check]) -> list[bool]:
    """Returns whether each of ``checks`` holds; waits once for each device."""
    if not checks:
        return []
    device = checks[0].holds.device
    held: list[bool] = torch.stack([check.holds.to(device) for check in checks]).tolist()
    return held


def _is_zero(check: _Check) -> bool:
    """Returns whether ``check`` failed for a weight of zeros, which has the least of scales."""
    return check.sentence == _TOO_SMALL and not check.linear.weight.any()


def _blame(check: _Check, who: str) -> str:
    """Returns a sentence on ``check``, which failed: the weight's fault, or the algorithm's."""
    linear, args = check.linear, check.linear.args
    peak = float(linear.weight.abs().amax()) if linear.weight.numel() else 0.0
    limit = torch.finfo(getattr(torch, args.scale_dtype)).max
    if args.scale_dtype == "float16" and peak / largest_code(args) > limit:
        return (
            f"{linear.name}: its weights, up to {peak:.3g}, need scales that overflow float16, the "
            "dtype in config.json; state bfloat16 there, or --ignore this layer"
        )
    return f"{linear.name}: {who} gave {check.sentence}; choose another algorithm"
