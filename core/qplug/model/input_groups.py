"""What a decoder block is made of, found by running it: who reads one tensor, and who makes it.

Linears that are given the same tensor are a group. The operation before a group is whatever can be
divided by a scale, channel by channel, with the columns of the group multiplied, so that the block
computes the same: a norm's weight, or rows of an earlier linear (values before the output
projection, ``up`` before ``down``). It is not looked up but tried: no architecture is named here.
Experts read some of the tokens of a tensor, and belong to its group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn

from qplug.checkpoint.names import is_within, local_of
from qplug.model.experts import Experts
from qplug.model.hooks import hooked

#: Runs the block on the same small input each time.
Call = Callable[[], Tensor]

_RTOL = 1e-3


@dataclass(frozen=True)
class Before:
    """The operation that makes a group's input. ``rows[c]``: the row behind channel ``c``.

    ``norm`` multiplies by its weight, ``offset-norm`` by one plus its weight (Gemma), ``rows`` is a
    linear.
    """

    kind: Literal["norm", "offset-norm", "rows"]
    module: str
    rows: Tensor


@dataclass(frozen=True)
class Group:
    """Modules that read one tensor, by their names within the block; ``before`` None if unknown.

    ``linears`` are all that multiply it by a matrix, routers too; ``at`` is a module that is given
    the whole tensor. ``routed``: those of ``linears`` that read some of its tokens, expert by
    expert. ``experts``: the module that has the experts of which the reader is one.
    """

    linears: tuple[str, ...]
    before: Before | None
    at: str
    routed: tuple[tuple[str, ...], ...] = ()
    experts: str | None = None


def find_groups(block: nn.Module, call: Call) -> tuple[Group, ...]:
    """The groups of ``block``, in the order in which it computes. ``block`` must be float32.

    The block is left as it was. Experts are alike: what is found of one is told of all.
    """
    seen = _watch(block, call)
    groups: dict[tuple[int, int], list[str]] = {}
    for name, tensor in seen.inputs.items():
        groups.setdefault((tensor.data_ptr(), tensor.shape[-1]), []).append(name)
    mixtures = {n: part for n, part in block.named_modules() if isinstance(part, Experts)}
    found: list[Group] = []
    earlier: list[str] = []
    told: set[str] = set()
    for given in groups.values():
        mixture = next((name for name in mixtures if is_within(name, given[0])), None)
        if mixture is not None:
            experts = mixtures[mixture]
            if mixture not in told and given[0].endswith(f".{experts.last}"):
                told.add(mixture)
                found += _behind_experts(block, call, seen, mixture)
            continue
        readers, routed = [], []
        for name in given:
            if name not in mixtures:
                readers.append(name)
                continue
            routed += _readers_of(name, mixtures[name])
            readers += [linear for linears in routed for linear in linears]
        before = _find_before(block, call, seen, readers, given[0], earlier)
        found.append(Group(tuple(readers), before, given[0], tuple(routed)))
        earlier += [name for name in given if name not in mixtures]
    return tuple(found)


def _readers_of(mixture: str, experts: Experts) -> list[tuple[str, ...]]:
    """The linears that read tokens, expert by expert."""
    return [
        tuple(f"{mixture}.{number}.{local}" for local in experts.readers)
        for number, _ in experts.named_children()
    ]


def _behind_experts(block: nn.Module, call: Call, seen: _Seen, mixture: str) -> Iterator[Group]:
    """A group for each expert's last linear."""
    experts = block.get_submodule(mixture)
    assert isinstance(experts, Experts)
    lasts = [f"{mixture}.{number}.{experts.last}" for number, _ in experts.named_children()]
    given = [name for name in lasts if name in seen.inputs]
    most = max(given, key=lambda name: seen.inputs[name].shape[0])
    readers = _readers_of(mixture, experts)
    before = _find_before(block, call, seen, [most], most, readers[lasts.index(most)])
    for last, linears in zip(lasts, readers, strict=True):
        own = before
        if before is not None:
            local = local_of(before.module)
            module = next(name for name in linears if name.endswith(f".{local}"))
            own = replace(before, module=module)
        yield Group((last,), own, last, experts=mixture)


@dataclass(frozen=True)
class _Seen:
    """One forward pass: what linears and experts read, what norms make, in order, and the result.

    The tensors are kept, so that no address is used twice.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    result: Tensor


def _watch(block: nn.Module, call: Call) -> _Seen:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in block.named_modules():
        if isinstance(module, Experts) or _is_matrix(module):
            handles.append(module.register_forward_pre_hook(_keep_input(inputs, name)))
        elif is_norm(module):
            handles.append(module.register_forward_hook(_keep_output(outputs, name)))
    with hooked(handles):
        result = call()
    return _Seen(inputs, outputs, result)


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix: linears do, and routers with ways of their own."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) or (isinstance(weight, Tensor) and weight.ndim == 2)


def _keep_input(kept: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
        weight = getattr(module, "weight", None)
        # Not a matrix of [in, out], as GPT-2 has them; one that is square is seen by trial.
        if weight is None or weight.shape[-1] == inputs[0].shape[-1]:
            kept[name] = inputs[0]

    return hook


def _keep_output(
    kept: dict[str, Tensor], name: str
) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        kept[name] = output

    return hook


def is_norm(module: nn.Module) -> bool:
    """Whether a module multiplies by a vector: norms do, and nothing else that has weights."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def _find_before(
    block: nn.Module,
    call: Call,
    seen: _Seen,
    readers: Sequence[str],
    given: str,
    earlier: Sequence[str],
) -> Before | None:
    """What makes the tensor that ``given`` and all ``readers`` read; ``earlier`` are linears."""
    for candidate in _candidates(block, seen, given, earlier):
        if _holds(block, call, seen.result, candidate, readers):
            return candidate
    return None


def _candidates(
    block: nn.Module, seen: _Seen, given: str, earlier: Sequence[str]
) -> Iterator[Before]:
    read = seen.inputs[given]
    width = read.shape[-1]
    each = torch.arange(width, device=read.device)
    for name, output in seen.outputs.items():
        same = output.data_ptr() == read.data_ptr() and output.numel() == read.numel()
        if same and output.shape[-1] == width:
            yield Before("norm", name, each)
            yield Before("offset-norm", name, each)
    for name in reversed(earlier):
        linear = block.get_submodule(name)
        if isinstance(linear, nn.Linear):
            for rows in _sections(linear.out_features, width, read.device):
                yield Before("rows", name, rows)


def _sections(out: int, width: int, device: torch.device) -> Iterator[Tensor]:
    """Ways in which ``width`` channels can come from the ``out`` rows of a linear.

    One by one; heads that share values, repeated; and both as the last part of a matrix in which
    engines or architectures have fused several (qkv, gate-up), or as the last part of each head of
    it.
    """
    sizes = [out] if out <= width else []
    if out > width:
        sizes.append(width)
        if (out - width) % 2 == 0:
            sizes.append((out - width) // 2)
    for size in dict.fromkeys(sizes):
        if size == 0 or width % size:
            continue
        start = torch.arange(out - size, out, device=device)
        repeats = width // size
        if repeats == 1:
            yield start
            continue
        for head in _divisors(size):
            yield start.view(-1, 1, head).expand(-1, repeats, -1).reshape(-1)
    if out > width:
        for count in _divisors(gcd(out, width))[:-1]:  # in a single run they were the last already
            runs = torch.arange(out, device=device).view(count, -1)
            yield runs[:, -(width // count) :].reshape(-1)


def _divisors(size: int) -> list[int]:
    """The sizes that heads can have, and the counts of them."""
    return [head for head in range(size, 0, -1) if size % head == 0]


def _holds(
    block: nn.Module, call: Call, result: Tensor, before: Before, readers: Sequence[str]
) -> bool:
    """Whether scale can be moved from ``before`` to ``readers`` without a change of the result."""
    source = block.get_submodule(before.module)
    count = int(before.rows.max()) + 1
    generator = torch.Generator().manual_seed(0)
    factors = (torch.rand(count, generator=generator) * 1.5 + 0.5).to(before.rows.device)
    scale = factors[before.rows]  # [in]
    made = dict(source.named_parameters(recurse=False))
    read = [block.get_parameter(f"{name}.weight") for name in readers]
    touched = [*made.values(), *read]
    kept = [parameter.detach().clone() for parameter in touched]
    try:
        with torch.no_grad():
            for weight in read:
                weight.mul_(scale)
            disturbed = call()
            divide(made["weight"], made.get("bias"), before, scale)
            restored = call()
    finally:
        with torch.no_grad():
            for parameter, old in zip(touched, kept, strict=True):
                parameter.copy_(old)
    # Compared with what the scale does alone: beside a large residual all changes are small.
    return bool((restored - result).norm() < _RTOL * (disturbed - result).norm())


def divide(weight: Tensor, bias: Tensor | None, before: Before, scale: Tensor) -> None:
    """Divide what ``before`` makes by ``scale: [in]``, in place, in its ``weight`` and ``bias``."""
    new_weight, new_bias = divided(weight, bias, before, scale)
    weight.copy_(new_weight)
    if bias is not None and new_bias is not None:
        bias.copy_(new_bias)


def divided(
    weight: Tensor, bias: Tensor | None, before: Before, scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What ``divide`` makes of them. Of channels that share a row, the first tells its scale."""
    if before.kind == "rows":
        channels = torch.full((len(weight),), -1, device=weight.device)
        channels[before.rows.flip(0)] = torch.arange(len(before.rows), device=weight.device).flip(0)
        scale = torch.where(channels >= 0, scale.to(weight.dtype)[channels.clamp(min=0)], 1)
        made = weight / scale[:, None]
    elif before.kind == "offset-norm":
        made = (weight + 1) / scale - 1
    else:
        made = weight / scale
    return made, None if bias is None else bias / scale
