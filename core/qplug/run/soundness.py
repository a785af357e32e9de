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
from qplug.numerics.alike import as_one, of_one_shape
from qplug.numerics.losses import TOO_LARGE, TOO_SMALL
from qplug.numerics.rounding import code_dtype, round_floats
from qplug.numerics.scale_formats import largest_code

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Check:
    """A statement on ``linears``: ``holds``, bool ``[n]``; ``sentence`` says what is wrong."""

    linears: Sequence[Linear]
    holds: Tensor
    sentence: str


def refuse_unsound(
    linears: Sequence[Linear], codes: Mapping[str, QuantizedWeight], who: str
) -> None:
    """Raises QplugError for the first of ``codes`` that breaks the contract of QuantizedWeight.

    ``codes`` are by linear; ``who`` names the algorithm, and its plugin, in the message.
    """
    for linear in linears:
        sentence = _misshapen(linear, codes[linear.name])
        if sentence is not None:
            raise QplugError(f"{linear.name}: {who} gave {sentence}; choose another algorithm")
    checks: list[_Check] = []
    for alike in of_one_shape([linear.weight for linear in linears]):
        checks += _checks_side_by_side([linears[place] for place in alike], codes)
    order = {linear.name: place for place, linear in enumerate(linears)}
    wrong = [
        (linear, check.sentence)
        for check, all_hold in zip(checks, _read(checks), strict=True)
        for linear, holds in zip(check.linears, all_hold, strict=True)
        if not (holds or _is_zero(linear, check.sentence))
    ]
    if wrong:
        linear, sentence = min(wrong, key=lambda found: order[found[0].name])
        raise QplugError(_blame(linear, sentence, who))


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


def _checks_side_by_side(
    linears: Sequence[Linear], codes: Mapping[str, QuantizedWeight]
) -> Iterator[_Check]:
    """Yields ``_checks`` of ``linears`` of one shape, as those of one if that is possible."""
    weights = [codes[linear.name] for linear in linears]
    joined = None
    if all(linear.input_scale is None and linear.global_scale is None for linear in linears):
        joined = as_one(weights) if len(weights) > 1 else None
    if joined is not None:
        yield from _checks(linears, joined)
        return
    for linear, weight in zip(linears, weights, strict=True):
        yield from _checks([linear], weight)


def _checks(linears: Sequence[Linear], weight: QuantizedWeight) -> Iterator[_Check]:
    """Yields what must hold of ``weight``, which has those of ``linears``, one below the other.

    Scales of inputs and global scales are those of the first.
    """
    first, args, scale = linears[0], linears[0].args, weight.scale.view(len(linears), -1)
    yield _Check(linears, _positive(scale), "scales that are NaN, infinite, zero or negative")
    largest = scale.amax(1) * largest_code(args)
    yield _Check(linears, largest <= TOO_LARGE, _TOO_LARGE)
    yield _Check(linears, largest >= TOO_SMALL, _TOO_SMALL)
    for own, what in ((first.input_scale, "scale of inputs"), (first.global_scale, "global scale")):
        if own is not None:
            yield _Check(linears, _positive(own.view(1, -1)), f"a {what} that is not sound")
    local = scale if first.global_scale is None else scale / first.global_scale
    if args.scale_dtype != "float32":
        stored = local.to(getattr(torch, args.scale_dtype)).float()
        yield _Check(
            linears, (stored == local).all(1), f"scales that {args.scale_dtype} cannot hold"
        )
    outside = f"codes that are no {args.dtype}"
    rows = weight.codes.view(len(linears), -1)
    if args.is_float:
        yield _Check(linears, _on_grid(rows, args), outside)
        return
    low, high = args.code_range
    if args.bits < 8:
        least, most = torch.aminmax(rows, dim=1)
        yield _Check(linears, (least >= low) & (most <= high), outside)
        if weight.zero is not None:
            most = weight.zero.view(len(linears), -1).amax(1)
            yield _Check(linears, most <= high, "zero points outside the codes")


_TOO_LARGE = "weights too large"
_TOO_SMALL = "weights too small"


def _positive(scale: Tensor) -> Tensor:
    """Returns whether each row of ``scale: [n, scales]`` is positive and finite, bool ``[n]``."""
    low, high = torch.aminmax(scale, dim=1)
    return (low > 0) & (high < float("inf"))  # both are NaN if one is


def _on_grid(codes: Tensor, args: QuantArgs) -> Tensor:
    """Returns whether float ``codes: [n, numbers]`` are values of their format, bool ``[n]``."""
    if codes.element_size() == 1:
        every = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
        on_grid = _is_value(every, args).to(codes.device)
        if FLOAT_STEP[args.dtype] == FLOAT_STEP.get(_NATIVE.get(codes.dtype, "")):
            # The format is torch's own: its NaN and infinities alone are no values.
            return _native_is_finite(codes)
        return on_grid[codes.view(torch.uint8).int()].all(1)
    return _is_value(codes.float(), args).all(1)


_NATIVE = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def _is_value(values: Tensor, args: QuantArgs) -> Tensor:
    rounded = round_floats(values.clone().nan_to_num_(), args).float()
    return rounded == values


def _native_is_finite(codes: Tensor) -> Tensor:
    top = torch.finfo(codes.dtype).max
    largest = torch.tensor([top]).to(codes.dtype).view(torch.uint8).item()
    bits = codes.view(torch.uint8)
    if bits.is_cuda:
        return (bits & 0x7F).amax(1) <= largest
    step = 1 << 17
    return torch.tensor(
        [
            all(int((row[n : n + step] & 0x7F).max()) <= largest for n in range(0, len(row), step))
            for row in bits.numpy()
        ]
    )


def _read(checks: Sequence[_Check]) -> list[list[bool]]:
    """Returns where each of ``checks`` holds; waits once for each device."""
    if not checks:
        return []
    device = checks[0].holds.device
    held = torch.cat([check.holds.to(device) for check in checks])
    return [part.tolist() for part in held.cpu().split([len(check.linears) for check in checks])]


def _is_zero(linear: Linear, sentence: str) -> bool:
    """Returns whether a check failed for a weight of zeros, which has the least of scales."""
    return sentence == _TOO_SMALL and not linear.weight.any()


def _blame(linear: Linear, sentence: str, who: str) -> str:
    """Returns what is wrong with ``linear``: the weight's fault, or the algorithm's."""
    args = linear.args
    peak = float(linear.weight.abs().amax()) if linear.weight.numel() else 0.0
    limit = torch.finfo(getattr(torch, args.scale_dtype)).max
    if args.scale_dtype == "float16" and peak / largest_code(args) > limit:
        return (
            f"{linear.name}: its weights, up to {peak:.3g}, need scales that overflow float16, the "
            "dtype in config.json; state bfloat16 there, or --ignore this layer"
        )
    return f"{linear.name}: {who} gave {sentence}; choose another algorithm"
