"""A decoder block in the middle of a calibrated run, as algorithms see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from qplug.api import Block, InputGroup, Linear, QuantizedWeight
from qplug.api.groups import dequantize
from qplug.api.scheme import Scheme
from qplug.calibration.statistics import Statistics
from qplug.checkpoint.names import relative_name
from qplug.machine.processes import ALONE, Processes
from qplug.model.input_groups import GroupPaths, Producer, divide
from qplug.numerics.alike import as_one, copied, of_one_shape
from qplug.numerics.scales import clip_to_scale

#: Gathers statistics again. Arguments: the block's current parameters; the float block's; the
#: weights whose linears round their inputs. Returns statistics by module path.
Observe = Callable[
    [Mapping[str, Tensor], Mapping[str, Tensor], Sequence[str]], Mapping[str, Statistics]
]
T = TypeVar("T")
R = TypeVar("R")


class LiveBlock(Block):
    """A block with float32 copies of its parameters, which ``smooth`` and ``shift`` rewrite.

    ``weights32``: every parameter by its name relative to the block. Norms and biases always have
    values that the checkpoint's dtype can hold, so that the stored values are the computed ones.
    """

    def __init__(
        self,
        name: str,
        structure: tuple[GroupPaths, ...],
        statistics: Mapping[str, Statistics],
        weights: Mapping[str, Tensor],
        schemes: Mapping[str, Scheme],
        stored: Mapping[str, str],
        observe_again: Observe,
        processes: Processes = ALONE,
        *,
        alike: Sequence[Sequence[str]] = (),
        is_whole: bool = True,
    ) -> None:
        """``stored``: the dtype in which the checkpoint holds each of ``weights``.

        ``alike``: names of parameters that are kept together in memory, those of experts.
        ``is_whole``: whether it has all parameters of the block.
        """
        self.is_whole = is_whole
        self._processes = processes
        self.weights32 = copied(weights, torch.float32, alike)
        self._dtypes: dict[str, torch.dtype] = {n: getattr(torch, d) for n, d in stored.items()}
        self._observe_again = observe_again
        self._codes_in_use: dict[str, QuantizedWeight] = {}
        self._rewritten: set[str] = set()
        linears = {
            path: Linear(
                f"{name}.{path}",
                self.weights32[f"{path}.weight"],
                schemes[f"{name}.{path}"].weights,
                schemes[f"{name}.{path}"].activations,
            )
            for path in (local.removesuffix(".weight") for local in weights)
            if f"{name}.{path}" in schemes
        }
        groups, self._structure = [], {}
        #: Every group, also of single experts, and the path at which its statistics are taken.
        self._seen_at: list[tuple[InputGroup, str]] = []
        for paths in structure:
            group = _group(name, linears, paths.linears, statistics.get(paths.at), paths)
            if group is None:
                continue
            of_experts = [
                (_group(name, linears, own, statistics.get(own[0]), paths), own[0])
                for own in paths.by_expert
            ]
            quantized = [(expert, at) for expert, at in of_experts if expert is not None]
            group.scalable = paths.producer is not None and group.tokens > 0
            group.shiftable = self._is_shiftable(paths)
            group.by_expert = tuple(expert for expert, _ in quantized)
            self._seen_at += [(group, paths.at), *quantized]
            groups.append(group)
            self._structure[id(group)] = paths
        super().__init__(name, tuple(linears.values()), tuple(groups), processes=processes.count)

    # --- what algorithms do to a block -----------------------------------------------------------

    def shared(self, group: InputGroup, per_channel: Tensor) -> Tensor:
        producer = self._producer(group)
        if not producer.repeats:
            return per_channel.float()
        rows = producer.rows
        count = int(rows.max()) + 1
        total = torch.zeros(count, device=rows.device).index_add_(0, rows, per_channel.float())
        return (total / torch.bincount(rows, minlength=count).clamp_(min=1))[rows]

    def smooth(self, group: InputGroup, scale: Tensor) -> None:
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise ValueError("a scale must be positive and finite")
        producer = self._producer(group)
        scale = self._divide(producer, self.shared(group, scale))
        readers = [f"{path}.weight" for path in self._structure[id(group)].linears]
        for name in readers:
            self.weights32[name].mul_(scale)
        for path in self._structure[id(group)].linears:
            if (original := self.originals.get(self._full(path))) is not None:
                original.mul_(scale)
        divided = [f"{producer.module}.weight", f"{producer.module}.bias"]
        self._rewritten.update(name for name in [*readers, *divided] if name in self.weights32)
        for linear in self.linears:
            if linear in group.linears or linear.name == self._full(producer.module):
                linear.scale = linear.zero = None
            if linear in group.linears:
                linear.input_scale = None
        for part in (group, *group.by_expert):
            _divide_statistics(part, scale)

    def shift(self, group: InputGroup, offset: Tensor) -> None:
        if not group.shiftable:
            raise ValueError("no bias before or behind this group can take an offset")
        paths, producer = self._structure[id(group)], self._producer(group)
        bias = self.weights32[f"{producer.module}.bias"]
        old = bias.clone()
        bias.sub_(offset)
        self._round(f"{producer.module}.bias")
        offset = old - bias
        for path in paths.linears:
            self.weights32[f"{path}.bias"].add_(self.weights32[f"{path}.weight"] @ offset)
        self._rewritten.update(f"{path}.bias" for path in (producer.module, *paths.linears))
        _shift_statistics(group, offset)

    def replace(self, linear: Linear, weight: Tensor) -> None:
        self.originals.setdefault(linear.name, linear.weight.clone())
        super().replace(linear, weight)
        # ``smooth`` scales the weight in ``weights32``, so the linear has to share its memory.
        linear.weight = self.weights32[f"{self._local(linear.name)}.weight"].copy_(weight)

    def use_codes(self, codes: Mapping[str, QuantizedWeight]) -> None:
        self._codes_in_use.update(codes)
        names = [f"{self._local(name)}.weight" for name in self._codes_in_use]
        weights = self._codes_in_use.values()
        values = {n: dequantize(w) for n, w in zip(names, weights, strict=True)}
        for linear in self.linears:  # a scheme may round inputs under a static scale
            if linear.input_scale is not None:
                values[f"{self._local(linear.name)}.input_scale"] = linear.input_scale
        originals = {f"{self._local(name)}.weight": w for name, w in self.originals.items()}
        statistics = self._observe_again(
            {**self.weights32, **values}, {**self.weights32, **originals}, names
        )
        for group, at in self._seen_at:
            if any(linear.name not in self._codes_in_use for linear in group.linears):
                for field, value in _known(statistics[at]).items():
                    setattr(group, field, value)

    def spread(
        self,
        items: Sequence[T],
        work: Callable[[T], R],
        cost: Callable[[T], float] | None = None,
    ) -> list[R]:
        return self._processes.spread(items, work, cost)

    @property
    def parameters(self) -> frozenset[str]:
        """The full names of the parameters."""
        return frozenset(map(self._full, self.weights32))

    # --- what a run reads from a block -----------------------------------------------------------

    def producer_and_readers(self, group: InputGroup) -> tuple[Producer, tuple[str, ...]]:
        """The operation that makes the input of ``group``, and all linears that read the input.

        Names are relative to the block. Raises ValueError if no scale can be moved out of the
        input.
        """
        return self._producer(group), self._structure[id(group)].linears

    def clip(self) -> None:
        """Clips float weights to the chosen ranges, so that a float export contains the clips.

        Weights that ``replace`` changed then count as rewritten, too.
        """
        for linear in self.linears:
            if linear.scale is not None:
                clip_to_scale(linear.weight, linear.scale, linear.zero, linear.args)
                self._rewritten.add(f"{self._local(linear.name)}.weight")
            if linear.name in self.originals:
                self._rewritten.add(f"{self._local(linear.name)}.weight")

    def rewritten(self) -> tuple[str, ...]:
        """The full names of parameters that ``smooth``, ``shift`` and ``clip`` have changed."""
        return tuple(sorted(self._full(local) for local in self._rewritten))

    def forget_statistics(self) -> None:
        """Frees the Gram matrices of all groups, which nothing reads any more."""
        for group, _ in self._seen_at:
            group.gram = group.gram.new_empty(0, 0)

    def stored_floats(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The parameters among ``names`` (full names), in the checkpoint's dtype, on the CPU."""
        return {
            name: self.weights32[local].to(self._dtypes[local]).cpu()
            for name in names
            if (local := self._local(name)) in self.weights32
        }

    def effective_parameters(
        self,
        codes: Mapping[str, QuantizedWeight],
        floats: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """The values with which an engine computes, by name relative to the block.

        ``codes`` are dequantized to ``dtype``; ``floats`` (by full name) stay as they are. Static
        scales of inputs are added as ``input_scale`` of their linears.
        """
        values: dict[str, Tensor] = {}
        names = [*codes]
        for places in of_one_shape([codes[name].codes for name in names]):
            run = [names[place] for place in places]
            joined = as_one([codes[name] for name in run])
            if joined is None:
                found = [dequantize(codes[name]).to(dtype) for name in run]
            else:
                found = [*dequantize(joined).to(dtype).chunk(len(run))]
            values.update({f"{name}.weight": w for name, w in zip(run, found, strict=True)})
        for name, weight in codes.items():
            if weight.input_scale is not None:
                values[f"{name}.input_scale"] = weight.input_scale
        values.update(floats)
        return {self._local(name): value for name, value in values.items()}

    # --- moving scale ----------------------------------------------------------------------------

    def _local(self, name: str) -> str:
        return relative_name(self.name, name)

    def _full(self, local: str) -> str:
        return f"{self.name}.{local}"

    def _is_shiftable(self, paths: GroupPaths) -> bool:
        if paths.producer is None or paths.producer.kind != "norm":
            return False
        modules = [paths.producer.module, *paths.linears]
        return all(f"{path}.bias" in self.weights32 for path in modules)

    def _producer(self, group: InputGroup) -> Producer:
        producer = self._structure[id(group)].producer if id(group) in self._structure else None
        if producer is None:
            raise ValueError("no operation before this group can take a scale")
        return producer

    def _divide(self, producer: Producer, scale: Tensor) -> Tensor:
        """Divides the output of ``producer`` by ``scale``; returns the divisor after rounding.

        A norm is stored in half precision, so the effective divisor differs from ``scale``; the
        columns of the readers have to be multiplied by the effective one.
        """
        weight = self.weights32[f"{producer.module}.weight"]
        bias = self.weights32.get(f"{producer.module}.bias")
        if producer.kind == "rows":
            if (original := self.originals.get(self._full(producer.module))) is not None:
                divide(original, None, producer, scale)
            divide(weight, bias, producer, scale)
            return scale
        offset = 1.0 if producer.kind == "offset-norm" else 0.0
        kept, old = weight.clone(), weight + offset
        divide(weight, None, producer, scale)
        self._round(f"{producer.module}.weight")
        lost = (weight + offset == 0) & (old != 0)
        weight.copy_(torch.where(lost, kept, weight))  # these channels are divided by 1 instead
        new = weight + offset
        scale = torch.where(new != 0, old / new, scale)
        if bias is not None:
            bias.div_(scale)
            self._round(f"{producer.module}.bias")
        return scale

    def _round(self, local: str) -> None:
        """Rounds a parameter to values that the checkpoint's dtype can hold."""
        self.weights32[local].copy_(self.weights32[local].to(self._dtypes[local]))


def _group(
    block: str,
    linears: Mapping[str, Linear],
    paths: Sequence[str],
    statistics: Statistics | None,
    structure: GroupPaths,
) -> InputGroup | None:
    """The group of the quantized ``linears`` among ``paths``; None if none is quantized."""
    own = tuple(linears[path] for path in paths if path in linears)
    if not own:
        return None
    assert statistics is not None
    return InputGroup(
        own,
        **_known(statistics),
        scalable=False,
        shiftable=False,
        after_norm=structure.producer is not None and structure.producer.kind != "rows",
        experts=f"{block}.{structure.experts}" if structure.experts else None,
    )


# --- the statistics of a group --------------------------------------------------------------------


def _known(statistics: Statistics) -> dict[str, Any]:
    """The fields of an InputGroup that come from statistics."""
    return {
        "gram": statistics.gram,
        "drift": statistics.drift,
        "total_shift": statistics.total_shift,
        "mean": statistics.mean,
        "mean_abs": statistics.mean_abs,
        "low": statistics.low if statistics.tokens else torch.zeros_like(statistics.low),
        "high": statistics.high if statistics.tokens else torch.zeros_like(statistics.high),
        "lows": statistics.lows,
        "highs": statistics.highs,
        "sample": statistics.sample,
        "tokens": statistics.tokens,
    }


def _divide_statistics(group: InputGroup, scale: Tensor) -> None:
    """Updates the statistics of a group whose input is divided by ``scale: [in]``."""
    group.gram /= scale[:, None] * scale
    if group.drift is not None and group.total_shift is not None:
        group.drift /= scale[:, None] * scale
        group.total_shift /= scale
    for values in (group.mean, group.mean_abs, group.low, group.high, group.sample):
        values /= scale
    for extremes in (group.lows, group.highs):
        if extremes is not None:
            extremes /= scale


def _shift_statistics(group: InputGroup, offset: Tensor) -> None:
    """Updates the statistics of a group from whose input ``offset: [in]`` is subtracted."""
    if group.drift is not None and group.total_shift is not None:
        group.drift -= offset[:, None] * group.total_shift
    total = group.mean * group.tokens
    group.gram -= total[:, None] * offset + offset[:, None] * total
    group.gram += group.tokens * offset[:, None] * offset
    group.mean -= offset
    group.low -= offset
    group.high -= offset
    group.sample -= offset
    for extremes in (group.lows, group.highs):
        if extremes is not None:
            extremes -= offset
    # E|x - offset| does not follow from the sums; estimate it on the sample.
    group.mean_abs = group.sample.abs().mean(0)
