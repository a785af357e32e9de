"""The layout of a fused module of experts, found by trial.

The module, made small, computes random tokens, and so do ``Experts`` with each layout that it may
have. No architecture is named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from qplug.checkpoint.stacked import Cut
from qplug.model.expert_layout import Layout, Part
from qplug.model.experts import Experts

#: The names that engines give to the linears of an expert; a module without gate has no first.
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
#: The largest relative difference that another order of summation makes on a few random tokens.
_RTOL = 1e-4
#: Sizes of the small module: all differ, so that no wrong layout fits; kernels want multiples of 4.
_WIDTH, _INNER, _TOKENS = 12, 4, 16


def find_layout(fused: nn.Module) -> Layout | None:
    """Returns the layout of the module ``fused``; None if it is no module of stacked experts."""
    stacked = {n: p for n, p in fused.named_parameters(recurse=False) if p.ndim == 3}
    if len(stacked) != 2 or len({len(p) for p in stacked.values()}) != 1:
        return None
    count = len(next(iter(stacked.values())))
    others = [n for n, _ in fused.named_parameters(recurse=False) if n not in stacked]
    if any(name.removesuffix("_bias") not in stacked for name in others):
        return None
    for layout in _candidates(fused, count, tuple(stacked)):
        readers = _named(fused, layout) if agrees(fused, layout) else None
        if readers is not None:
            return replace(layout, readers=readers)
    return None


def agrees(fused: nn.Module, layout: Layout) -> bool:
    """Whether ``Experts`` with ``layout`` compute what the module ``fused`` does, made small."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    kept = dict(fused._parameters)
    x = draw(_TOKENS, _WIDTH)
    call: tuple[Tensor, ...]
    per_token = min(2, layout.count)
    shares, chosen = torch.rand(_TOKENS, layout.count, generator=generator).topk(per_token)
    try:
        for part in (layout.readers[0], layout.last):
            rows, width = (_WIDTH, _INNER) if part is layout.last else (_INNER, _WIDTH)
            rows *= part.cut.count
            shape = (width, rows) if part.cut.transposed else (rows, width)
            values = {part.fused: draw(layout.count, *shape) / width}
            if f"{part.fused}_bias" in kept:
                values[f"{part.fused}_bias"] = draw(layout.count, rows)
            for name, value in values.items():
                fused._parameters[name] = nn.Parameter(value, requires_grad=False)
        with _small_and_eager(fused):
            if layout.gathers:
                call = (x, chosen, shares)
                if _returns_others(fused, layout, x, shares) != layout.returns_others:
                    return False
                if layout.returns_others:
                    chosen[::3, -1] = layout.count
            else:
                call = (x.repeat(layout.count, 1),)
            expected: Tensor = fused(*call)
            output: Tensor = Experts(fused, layout)(*call)  # takes the parameters of the module
    except Exception:  # the module has other arguments or shapes: it is none of these layouts
        return False
    finally:
        fused._parameters.clear()
        fused._parameters.update(kept)
    same = output.shape == expected.shape
    return same and bool((output - expected).norm() <= _RTOL * expected.norm())


def _returns_others(fused: nn.Module, layout: Layout, x: Tensor, shares: Tensor) -> bool:
    """Whether ``fused`` returns tokens that are routed past its last expert, as they are.

    Some layers have experts without weights there.
    """
    beyond = torch.full(shares.shape, layout.count)
    try:
        output: Tensor = fused(x, beyond, shares)
    except (IndexError, RuntimeError):
        return False
    return torch.allclose(output, x * shares.sum(-1, keepdim=True), rtol=_RTOL)


def _candidates(fused: nn.Module, count: int, names: tuple[str, ...]) -> Iterator[Layout]:
    """Yields layouts that ``fused`` may have."""
    order = sorted(names, key=lambda name: "down" in name or "output" in name or name == "w2")
    for (first, last), transposed, gathers in product(
        (order, order[::-1]), (False, True), (True, False)
    ):
        down = Part(DOWN, last, Cut(transposed=transposed))
        for interleaved in (False, True):
            gate, up = (Cut(index, 2, interleaved, transposed) for index in (0, 1))
            yield Layout(count, (Part(GATE, first, gate), Part(UP, first, up)), down, gathers)
        yield Layout(count, (Part(UP, first, Cut(transposed=transposed)),), down, gathers)


def _named(fused: nn.Module, layout: Layout) -> tuple[Part, ...] | None:
    """Returns the readers of ``layout`` by their names: the output is affine in ``UP`` alone.

    None if it is affine in no reader: then their rows are mixed up.
    """
    if len(layout.readers) == 1:
        return layout.readers
    first, second = layout.readers
    value = torch.linspace(-1.5, 1.0, 4)
    bends = []
    for index in (0, 1):
        low, middle, high = (
            layout.inner(fused, [factor * value, value][:: 1 - 2 * index]) for factor in (-1, 0, 1)
        )
        bends.append(float((low - 2 * middle + high).abs().max()))
    least = min(bends)
    if not (least < _RTOL and max(bends) > 100 * _RTOL):
        return None
    names = (GATE, UP) if bends[1] == least else (UP, GATE)
    return replace(first, linear=names[0]), replace(second, linear=names[1])


@contextmanager
def _small_and_eager(module: nn.Module) -> Iterator[None]:
    """Within it, ``module`` takes inputs of the small width, and runs its own code.

    transformers may replace that code by grouped products, which leave rows of tokens that are
    routed past the last expert as they find them in memory.
    """
    kept: dict[str, Any] = {
        name: value
        for name in ("hidden_size", "hidden_dim")
        if type(value := getattr(module, name, None)) is int
    }
    small: dict[str, Any] = dict.fromkeys(kept, _WIDTH)
    if hasattr(config := getattr(module, "config", None), "_experts_implementation"):
        kept["config"], small["config"] = config, deepcopy(config)
        small["config"]._experts_implementation = "eager"
    for name, value in small.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)
