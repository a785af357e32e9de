"""The linears of a decoder block that read one tensor, and the operation that makes the tensor.

Both are found by running the block; no architecture is named here. Linears that are given the same
tensor form a group. The producer of a group's input is an operation that can be divided by a scale,
channel by channel, while the columns of the group are multiplied by it, without a change of the
block's output: a norm's weight, or rows of an earlier linear (values before the output projection,
``up`` before ``down``). Experts read some of the tokens of a tensor, and belong to its group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn

from qplug.checkpoint.names import is_within, local_of
from qplug.model.experts import Experts, silent
from qplug.model.hooks import hooked

#: Runs the block on the same small input each time.
Call = Callable[[], Tensor]

_RTOL = 1e-3
#: What float32 may change of an input that is the same, relative to it.
_SAME = 1e-5
#: Bytes of a matrix of which a trial keeps no copy: it is undone, which may change last bits.
_LARGE = 1 << 28


@dataclass(frozen=True)
class Producer:
    """The operation that makes a group's input. ``rows[c]``, int64: the row behind channel ``c``.

    ``kind``: a ``norm`` multiplies by its weight, an ``offset-norm`` by one plus its weight
    (Gemma), ``rows`` means a linear. ``module``: its path within the block. ``power``: the rows are
    divided by the scale to this power; a half where a squared activation lies between, since the
    square root of a scale leaves it as the scale.
    """

    kind: Literal["norm", "offset-norm", "rows"]
    module: str
    rows: Tensor
    power: float = 1.0

    @cached_property
    def repeats(self) -> bool:
        """Whether several channels come from one row, so that they share a scale."""
        return bool(len(self.rows.unique()) < len(self.rows))


@dataclass(frozen=True)
class GroupPaths:
    """Modules that read one tensor, by path within the block; ``producer`` is None if unknown.

    ``linears``: all modules that multiply the tensor by a matrix, routers too. ``at``: a module
    that is given the whole tensor. ``by_expert``: the members of ``linears`` that read some of its
    tokens, for each expert. ``experts``: the module of the experts, if the reader is one of them.
    ``is_last``: whether no linear of the block reads anything that comes of these experts.
    """

    linears: tuple[str, ...]
    producer: Producer | None
    at: str
    by_expert: tuple[tuple[str, ...], ...] = ()
    experts: str | None = None
    is_last: bool = False


def find_groups(block: nn.Module, call: Call) -> tuple[GroupPaths, ...]:
    """The groups of ``block``, in the order in which it computes. ``block`` must be float32.

    The block is left as it was, large matrices but for rounding. One expert is examined; the others
    are taken to be alike.
    """
    seen = _watch(block, call)
    readers_of_tensor: dict[tuple[int, int], list[str]] = {}
    for name, tensor in seen.inputs.items():
        readers_of_tensor.setdefault((tensor.data_ptr(), tensor.shape[-1]), []).append(name)
    mixtures = {n: part for n, part in block.named_modules() if isinstance(part, Experts)}
    groups: list[GroupPaths] = []
    earlier: list[str] = []
    finished: set[str] = set()
    for given in readers_of_tensor.values():
        mixture = next((name for name in mixtures if is_within(name, given[0])), None)
        if mixture is not None:
            experts = mixtures[mixture]
            if mixture not in finished and given[0].endswith(f".{experts.last}"):
                finished.add(mixture)
                groups += _behind_experts(block, call, seen, mixture)
            continue
        readers, by_expert = [], []
        for name in given:
            if name not in mixtures:
                readers.append(name)
                continue
            by_expert += _readers_of(name, mixtures[name])
            readers += [linear for linears in by_expert for linear in linears]
        producer = _find_producer(block, call, seen, readers, given[0], earlier)
        groups.append(GroupPaths(tuple(readers), producer, given[0], tuple(by_expert)))
        earlier += [name for name in given if name not in mixtures]
    return tuple(groups)


def _readers_of(mixture: str, experts: Experts) -> list[tuple[str, ...]]:
    """The linears that read tokens, for each expert."""
    return [
        tuple(f"{mixture}.{number}.{local}" for local in experts.readers)
        for number in range(len(experts))
    ]


def _behind_experts(
    block: nn.Module, call: Call, seen: _Seen, mixture: str
) -> Iterator[GroupPaths]:
    """A group for each expert's last linear."""
    experts = block.get_submodule(mixture)
    assert isinstance(experts, Experts)
    lasts = [f"{mixture}.{number}.{experts.last}" for number in range(len(experts))]
    given = [name for name in lasts if name in seen.inputs]
    most = max(given, key=lambda name: seen.inputs[name].shape[0])
    is_last = _is_last(block, call, seen, mixture, experts)
    readers = _readers_of(mixture, experts)
    producer = _find_producer(block, call, seen, [most], most, readers[lasts.index(most)])
    for last, linears in zip(lasts, readers, strict=True):
        own = producer
        if producer is not None:
            local = local_of(producer.module)
            module = next(name for name in linears if name.endswith(f".{local}"))
            own = replace(producer, module=module)
        yield GroupPaths((last,), own, last, experts=mixture, is_last=is_last)


def _is_last(block: nn.Module, call: Call, seen: _Seen, mixture: str, experts: Experts) -> bool:
    """Whether all other linears read the same if ``experts`` return zeros.

    The same up to rounding: trials before have changed the last bits of large matrices.
    """
    with silent([experts]):
        without = _watch(block, call)
    return all(
        bool((tensor - seen.inputs[name]).norm() <= _SAME * tensor.norm())
        for name, tensor in without.inputs.items()
        if name == mixture or not is_within(mixture, name)
    )


# --- one forward pass -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """One forward pass: inputs of linears and experts, outputs of norms, in order; and the result.

    The tensors are kept alive, so that no two of them have the same address.
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
    """Whether a module multiplies by a matrix: linears, and routers with classes of their own."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) or (isinstance(weight, Tensor) and weight.ndim == 2)


def _keep_input(kept: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
        weight = getattr(module, "weight", None)
        # A matrix [in, out] of a router is left out; a square one is found out by trial.
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
    """Whether a module multiplies by a vector; among modules with weights only norms do."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


# --- the producer of a tensor ---------------------------------------------------------------------


def _find_producer(
    block: nn.Module,
    call: Call,
    seen: _Seen,
    readers: Sequence[str],
    given: str,
    earlier: Sequence[str],
) -> Producer | None:
    """The producer of the tensor that ``given`` and all ``readers`` read, or None.

    ``earlier``: linears that compute before them. None if a reader makes its weight of a parameter
    with another name: its columns are no columns there.
    """
    if any("weight" not in block.get_submodule(name)._parameters for name in readers):
        return None
    for candidate in _candidates(block, seen, given, earlier):
        if _holds(block, call, seen.result, candidate, readers):
            return candidate
    return None


def _candidates(
    block: nn.Module, seen: _Seen, given: str, earlier: Sequence[str]
) -> Iterator[Producer]:
    read = seen.inputs[given]
    width = read.shape[-1]
    each = torch.arange(width, device=read.device)
    for name, output in seen.outputs.items():
        same = output.data_ptr() == read.data_ptr() and output.numel() == read.numel()
        if same and output.shape[-1] == width:
            yield Producer("norm", name, each)
            yield Producer("offset-norm", name, each)
    for name in reversed(earlier):
        linear = block.get_submodule(name)
        if isinstance(linear, nn.Linear):
            for rows in _sections(linear.out_features, width, read.device):
                yield Producer("rows", name, rows)
    for name in earlier[-1:]:
        linear = block.get_submodule(name)
        if isinstance(linear, nn.Linear) and linear.out_features == width:
            yield Producer("rows", name, each, power=0.5)


def _sections(out: int, width: int, device: torch.device) -> Iterator[Tensor]:
    """Rows of a linear, of ``out``, that may make ``width`` channels: int64 ``[width]`` each.

    Each channel has a row of its own, or heads that share values are repeated. The rows are the
    whole matrix, or its last part where a matrix fuses several (qkv, gate-up), or the last part of
    each head of such a matrix, or the first half (up-gate).
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
        # Count 1 is skipped: the last rows of the whole matrix are a case above.
        for count in _divisors(gcd(out, width))[:-1]:
            runs = torch.arange(out, device=device).view(count, -1)
            yield runs[:, -(width // count) :].reshape(-1)
    if out == 2 * width:
        yield torch.arange(width, device=device)


def _divisors(size: int) -> list[int]:
    """All divisors of ``size``, largest first: possible head sizes, or numbers of heads."""
    return [head for head in range(size, 0, -1) if size % head == 0]


def _holds(
    block: nn.Module, call: Call, result: Tensor, producer: Producer, readers: Sequence[str]
) -> bool:
    """Whether the block has the same result after scale moves from ``producer`` to ``readers``."""
    source = block.get_submodule(producer.module)
    count = int(producer.rows.max()) + 1
    generator = torch.Generator().manual_seed(0)
    factors = (torch.rand(count, generator=generator) * 1.5 + 0.5).to(producer.rows.device)
    scale = factors[producer.rows]  # [in]
    divided_parameters = dict(source.named_parameters(recurse=False))
    # Experts may share the memory of their weights here.
    weights = _apart(block.get_parameter(f"{name}.weight") for name in readers)
    touched = _apart([*divided_parameters.values(), *weights])
    kept = [None if _is_large(parameter) else parameter.detach().clone() for parameter in touched]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(scale)
            disturbed = call()
            divide(divided_parameters["weight"], divided_parameters.get("bias"), producer, scale)
            restored = call()
    finally:
        with torch.no_grad():
            for parameter, old in zip(touched, kept, strict=True):
                if old is not None:
                    parameter.copy_(old)
    with torch.no_grad():
        if _is_large(own := divided_parameters["weight"]):
            own.mul_(_row_scale(producer, scale, len(own))[:, None])
        for weight in filter(_is_large, weights):
            weight.div_(scale)
    # Relative to the effect of the scale alone, since a large residual hides any error.
    return bool((restored - result).norm() < _RTOL * (disturbed - result).norm())


def _is_large(parameter: Tensor) -> bool:
    return parameter.ndim == 2 and parameter.nbytes >= _LARGE


def _apart(tensors: Iterable[Tensor]) -> list[Tensor]:
    """``tensors`` without those whose memory an earlier one has."""
    return [*{tensor.data_ptr(): tensor for tensor in reversed([*tensors])}.values()][::-1]


# --- moving scale ---------------------------------------------------------------------------------


def divide(weight: Tensor, bias: Tensor | None, producer: Producer, scale: Tensor) -> None:
    """Divide ``weight`` and ``bias`` of ``producer`` in place: its output, by ``scale: [in]``."""
    if producer.kind == "rows":
        rows = _row_scale(producer, scale.to(weight.dtype), len(weight))
        weight.div_(rows[:, None])
        if bias is not None:
            bias.div_(rows)
        return
    new_weight, new_bias = divided(weight, bias, producer, scale)
    weight.copy_(new_weight)
    if bias is not None and new_bias is not None:
        bias.copy_(new_bias)


def divided(
    weight: Tensor, bias: Tensor | None, producer: Producer, scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that ``divide`` stores, differentiable.

    If several channels share a row, the scale of the first one counts.
    """
    if producer.kind == "rows":
        scale = _row_scale(producer, scale.to(weight.dtype), len(weight))
        new_weight = weight / scale[:, None]
    elif producer.kind == "offset-norm":
        new_weight = (weight + 1) / scale - 1
    else:
        new_weight = weight / scale
    return new_weight, None if bias is None else bias / scale


def _row_scale(producer: Producer, scale: Tensor, count: int) -> Tensor:
    """What each of ``count`` rows of the linear ``producer`` is divided by, for ``scale: [in]``."""
    rows = producer.rows
    channels = torch.full((count,), -1, device=rows.device)
    channels[rows.flip(0)] = torch.arange(len(rows), device=rows.device).flip(0)
    of_rows = torch.where(channels >= 0, scale[channels.clamp(min=0)], 1)
    return of_rows if producer.power == 1 else of_rows**producer.power
