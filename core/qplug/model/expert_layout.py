"""How the linears of experts lie in the stacked parameters of a fused module.

transformers computes the experts of a layer with one module, whose parameters have three axes. The
layout of these parameters is found by trial: the module, made small, computes random tokens, and
so do separate linears cut from its parameters. No architecture is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from qplug.checkpoint.stacked import Cut

#: The names that engines give to the linears of an expert; a module without gate has no first.
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
#: The largest relative difference that another order of summation makes on a few random tokens.
_RTOL = 1e-4
#: Sizes of the small module: all differ, so that no wrong layout fits; kernels want multiples of 4.
_WIDTH, _INNER, _TOKENS = 12, 4, 16


@dataclass(frozen=True)
class Part:
    """A linear of every expert: ``cut`` from the parameter ``fused`` of the module."""

    linear: str
    fused: str
    cut: Cut


@dataclass(frozen=True)
class Layout:
    """The linears of the ``count`` experts of one layer.

    ``readers`` read the tokens, in the order of their rows; ``last`` makes the output. ``gathers``:
    whether the module is called with the tokens of the layer, and with the experts of each token
    and their shares; else it is given a copy of all tokens for each expert.
    """

    count: int
    readers: tuple[Part, ...]
    last: Part
    gathers: bool = True

    @property
    def parts(self) -> tuple[Part, ...]:
        """All linears of an expert."""
        return (*self.readers, self.last)

    def inner(self, fused: nn.Module, outputs: list[Tensor]) -> Tensor:
        """What the last linear reads, made of the ``outputs`` of ``readers`` as ``fused`` does."""
        if len(outputs) == 1:
            module: Any = fused
            activated: Tensor = module.act_fn(outputs[0])
            return activated
        if self.readers[0].cut.interleaved:
            both = torch.stack(outputs, -1).flatten(-2)
        else:
            both = torch.cat(outputs, -1)
        return _gated(fused, both)


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
    """Whether linears that are cut as in ``layout`` compute what ``fused`` does, made small."""
    generator = torch.Generator().manual_seed(0)
    draw: Callable[..., Tensor] = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    kept = dict(fused._parameters)
    x = draw(_TOKENS, _WIDTH)
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
        with _sizes(fused):
            if layout.gathers:
                expected = fused(x, chosen, shares)
                output = _all_tokens(fused, layout, x, chosen, shares)
                if _returns_others(fused, layout, x, shares):
                    return False
            else:
                copies = x.repeat(layout.count, 1)
                expected = fused(copies)
                each = zip(copies.chunk(layout.count), range(layout.count), strict=True)
                output = torch.cat([_of_expert(fused, layout, part, n) for part, n in each])
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


def _all_tokens(
    fused: nn.Module, layout: Layout, x: Tensor, chosen: Tensor, shares: Tensor
) -> Tensor:
    output = torch.zeros_like(x)
    for number in range(layout.count):
        rows, places = torch.where(chosen == number)
        if len(rows):
            share = shares[rows, places, None]
            output.index_add_(0, rows, share * _of_expert(fused, layout, x[rows], number))
    return output


def _of_expert(fused: nn.Module, layout: Layout, x: Tensor, number: int) -> Tensor:
    """The output of expert ``number`` for the tokens ``x: [tokens, width]``."""
    outputs = [nn.functional.linear(x, *_cut(fused, part, number)) for part in layout.readers]
    inner = layout.inner(fused, outputs)
    return nn.functional.linear(inner, *_cut(fused, layout.last, number))


def _cut(fused: nn.Module, part: Part, number: int) -> tuple[Tensor, Tensor | None]:
    weight, bias = fused._parameters[part.fused], fused._parameters.get(f"{part.fused}_bias")
    assert weight is not None
    return part.cut.of(weight[number]), None if bias is None else part.cut.of(bias[number])


def _gated(fused: nn.Module, both: Tensor) -> Tensor:
    module: Any = fused
    if hasattr(module, "_apply_gate"):
        inner: Tensor = module._apply_gate(both)
        return inner
    gate, up = both.chunk(2, -1)
    activated: Tensor = module.act_fn(gate)
    return activated * up


class _sizes:  # a context, used like a function
    """Within it, attributes of a module that hold the width of its input have the small width."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept: Mapping[str, int] = {
            name: value
            for name in ("hidden_size", "hidden_dim")
            if type(value := getattr(module, name, None)) is int
        }

    def __enter__(self) -> None:
        for name in self._kept:
            setattr(self._module, name, _WIDTH)

    def __exit__(self, *_: object) -> None:
        for name, value in self._kept.items():
            setattr(self._module, name, value)
