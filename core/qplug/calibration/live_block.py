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
from qplug.model.input_groups import Before, Group, divide
from qplug.numerics.scales import clip_to_scale

#: Statistics anew, by the paths at which they are taken: with the parameters given first, beside
#: the float block with those given next, and rounding what the linears of the weights named last
#: read.
Observe = Callable[
    [Mapping[str, Tensor], Mapping[str, Tensor], Sequence[str]], Mapping[str, Statistics]
]
T = TypeVar("T")
R = TypeVar("R")


class LiveBlock(Block):
    """A block with float32 masters of its parameters, which ``smooth`` and ``shift`` rewrite.

    ``masters``: every parameter by its name within the block. Those of norms and biases always have
    a value that the dtype of the checkpoint can hold, so that what is stored is what was computed.
    """

    def __init__(
        self,
        name: str,
        structure: tuple[Group, ...],
        statistics: Mapping[str, Statistics],
        weights: Mapping[str, Tensor],
        schemes: Mapping[str, Scheme],
        stored: Mapping[str, str],
        observe_again: Observe,
        processes: Processes = ALONE,
    ) -> None:
        """``stored``: the dtype in which the checkpoint holds each of ``weights``."""
        self._processes = processes
        self.masters = {n: weight.to(torch.float32, copy=True) for n, weight in weights.items()}
        self._dtypes: dict[str, torch.dtype] = {n: getattr(torch, d) for n, d in stored.items()}
        self._observe_again = observe_again
        self._advanced: dict[str, QuantizedWeight] = {}
        self._rewritten: set[str] = set()
        linears = {
            path: Linear(
                f"{name}.{path}",
                self.masters[f"{path}.weight"],
                schemes[f"{name}.{path}"].weights,
                schemes[f"{name}.{path}"].activations,
            )
            for path in (local.removesuffix(".weight") for local in weights)
            if f"{name}.{path}" in schemes
        }
        groups, self._structure = [], {}
        #: Every group, those of experts too, and the path at which its statistics are taken.
        self._seen_at: list[tuple[InputGroup, str]] = []
        for members in structure:
            whole = _group(name, linears, members.linears, statistics.get(members.at), members)
            if whole is None:
                continue
            routed = [
                (_group(name, linears, paths, statistics.get(paths[0]), members), paths[0])
                for paths in members.routed
            ]
            known = [(group, at) for group, at in routed if group is not None]
            whole.scalable = members.before is not None and whole.tokens > 0
            whole.shiftable = self._is_shiftable(members)
            whole.routed = tuple(group for group, _ in known)
            self._seen_at += [(whole, members.at), *known]
            groups.append(whole)
            self._structure[id(whole)] = members
        super().__init__(name, tuple(linears.values()), tuple(groups))

    def advance(self, codes: Mapping[str, QuantizedWeight]) -> None:
        self._advanced.update(codes)
        names = [f"{self._local(name)}.weight" for name in self._advanced]
        values = {n: dequantize(w) for n, w in zip(names, self._advanced.values(), strict=True)}
        for linear in self.linears:  # a scheme may round what they read under a fixed scale
            if linear.input_scale is not None:
                values[f"{self._local(linear.name)}.input_scale"] = linear.input_scale
        originals = {f"{self._local(name)}.weight": w for name, w in self.originals.items()}
        ideal = {**self.masters, **originals}
        statistics = self._observe_again({**self.masters, **values}, ideal, names)
        for group, at in self._seen_at:
            if any(linear.name not in self._advanced for linear in group.linears):
                for field, value in _known(statistics[at]).items():
                    setattr(group, field, value)

    def replace(self, linear: Linear, weight: Tensor) -> None:
        self.originals.setdefault(linear.name, linear.weight.clone())
        super().replace(linear, weight)
        # What moves scale finds a weight in the masters.
        linear.weight = self.masters[f"{self._local(linear.name)}.weight"].copy_(weight)

    def _local(self, name: str) -> str:
        return relative_name(self.name, name)

    def shared(self, group: InputGroup, per_channel: Tensor) -> Tensor:
        rows = self._before(group).rows
        count = int(rows.max()) + 1
        total = torch.zeros(count, device=rows.device).index_add_(0, rows, per_channel.float())
        return (total / torch.bincount(rows, minlength=count).clamp_(min=1))[rows]

    def smooth(self, group: InputGroup, scale: Tensor) -> None:
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError("a scale must be positive and finite")
        before = self._before(group)
        scale = self._divided(before, self.shared(group, scale))
        readers = [f"{path}.weight" for path in self._structure[id(group)].linears]
        for name in readers:
            self.masters[name].mul_(scale)
        for path in self._structure[id(group)].linears:
            if (original := self.originals.get(f"{self.name}.{path}")) is not None:
                original.mul_(scale)
        made = [f"{before.module}.weight", f"{before.module}.bias"]
        self._rewritten.update(name for name in [*readers, *made] if name in self.masters)
        behind = f"{self.name}.{before.module}"
        for linear in self.linears:
            if linear in group.linears or linear.name == behind:
                linear.scale = linear.zero = None
            if linear in group.linears:
                linear.input_scale = None
        for each in (group, *group.routed):
            _divide_known(each, scale)

    def moved(self, group: InputGroup) -> tuple[Before, tuple[str, ...]]:
        """The operation before ``group``, and all linears that read it, by their local names.

        Raises ValueError if there is no operation that scale can be moved out of.
        """
        return self._before(group), self._structure[id(group)].linears

    def spread(
        self,
        items: Sequence[T],
        work: Callable[[T], R],
        cost: Callable[[T], float] | None = None,
    ) -> list[R]:
        return self._processes.spread(items, work, cost)

    def clip(self) -> None:
        """Cut off what lies outside the scales that algorithms chose, for float weights to show.

        With it, weights that were replaced are what is stored, so they count as rewritten.
        """
        for linear in self.linears:
            if linear.scale is not None:
                clip_to_scale(linear.weight, linear.scale, linear.zero, linear.args)
                self._rewritten.add(f"{self._local(linear.name)}.weight")
            if linear.name in self.originals:
                self._rewritten.add(f"{self._local(linear.name)}.weight")

    def rewritten(self) -> tuple[str, ...]:
        """The parameters that ``smooth``, ``shift`` and ``clip`` have changed, by full name."""
        return tuple(sorted(f"{self.name}.{local}" for local in self._rewritten))

    def others(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Those of ``names`` (full names) that are parameters, as they are to be stored."""
        found = {}
        for name in names:
            local = self._local(name)
            if local in self.masters:
                found[name] = self.masters[local].to(self._dtypes[local]).cpu()
        return found

    def served(
        self,
        codes: Mapping[str, QuantizedWeight],
        others: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """Every parameter by its name within the block, as an engine will compute with it.

        Beside them the scales of static inputs, as ``input_scale`` of their linears.
        """
        values = {f"{name}.weight": dequantize(weight).to(dtype) for name, weight in codes.items()}
        for name, weight in codes.items():
            if weight.input_scale is not None:
                values[f"{name}.input_scale"] = weight.input_scale
        values.update(others)
        return {self._local(name): value for name, value in values.items()}

    def shift(self, group: InputGroup, offset: Tensor) -> None:
        if not group.shiftable:
            raise ValueError("no bias before or behind this group can take an offset")
        members = self._structure[id(group)]
        bias = self.masters[f"{self._before(group).module}.bias"]
        old = bias.clone()
        bias.sub_(offset)
        self._round(f"{self._before(group).module}.bias")
        offset = old - bias
        for path in members.linears:
            self.masters[f"{path}.bias"].add_(self.masters[f"{path}.weight"] @ offset)
        changed = [self._before(group).module, *members.linears]
        self._rewritten.update(f"{path}.bias" for path in changed)
        if group.drift is not None and group.lag is not None:
            group.drift -= offset[:, None] * group.lag
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
        # What is left of |x| is known of the sample alone.
        group.mean_abs = group.sample.abs().mean(0)

    def _is_shiftable(self, members: Group) -> bool:
        if members.before is None or members.before.kind != "norm":
            return False
        paths = [members.before.module, *members.linears]
        return all(f"{path}.bias" in self.masters for path in paths)

    def _before(self, group: InputGroup) -> Before:
        before = self._structure[id(group)].before if id(group) in self._structure else None
        if before is None:
            raise ValueError("no operation before this group can take a scale")
        return before

    def _divided(self, before: Before, scale: Tensor) -> Tensor:
        """Divide the operation before by ``scale``; give back what it was really divided by.

        A norm is stored in half precision: what rounding takes from it goes into the columns.
        """
        weight = self.masters[f"{before.module}.weight"]
        bias = self.masters.get(f"{before.module}.bias")
        if before.kind == "rows":
            if (original := self.originals.get(f"{self.name}.{before.module}")) is not None:
                divide(original, None, before, scale)
            divide(weight, bias, before, scale)
            return scale
        offset = 1.0 if before.kind == "offset-norm" else 0.0
        kept, old = weight.clone(), weight + offset
        divide(weight, None, before, scale)
        self._round(f"{before.module}.weight")
        lost = (weight + offset == 0) & (old != 0)
        weight.copy_(torch.where(lost, kept, weight))  # scaled by 1 instead
        new = weight + offset
        scale = torch.where(new != 0, old / new, scale)
        if bias is not None:
            bias.div_(scale)
            self._round(f"{before.module}.bias")
        return scale

    def _round(self, local: str) -> None:
        """To what the checkpoint can hold."""
        self.masters[local].copy_(self.masters[local].to(self._dtypes[local]))


def _group(
    block: str,
    linears: Mapping[str, Linear],
    paths: Sequence[str],
    statistics: Statistics | None,
    members: Group,
) -> InputGroup | None:
    """The group of those of ``paths`` that are ``linears``; None if none is."""
    own = tuple(linears[path] for path in paths if path in linears)
    if not own:
        return None
    assert statistics is not None
    return InputGroup(
        own,
        **_known(statistics),
        scalable=False,
        shiftable=False,
        after_norm=members.before is not None and members.before.kind != "rows",
        experts=f"{block}.{members.experts}" if members.experts else None,
    )


def _divide_known(group: InputGroup, scale: Tensor) -> None:
    """What is known of a group whose input is divided by ``scale: [in]``."""
    group.gram /= scale[:, None] * scale
    if group.drift is not None and group.lag is not None:
        group.drift /= scale[:, None] * scale
        group.lag /= scale
    for known in (group.mean, group.mean_abs, group.low, group.high, group.sample):
        known /= scale
    for extremes in (group.lows, group.highs):
        if extremes is not None:
            extremes /= scale


def _known(statistics: Statistics) -> dict[str, Any]:
    """The fields of an InputGroup that statistics tell."""
    return {
        "gram": statistics.gram,
        "drift": statistics.drift,
        "lag": statistics.lag,
        "mean": statistics.mean,
        "mean_abs": statistics.mean_abs,
        "low": statistics.low if statistics.tokens else torch.zeros_like(statistics.low),
        "high": statistics.high if statistics.tokens else torch.zeros_like(statistics.high),
        "lows": statistics.lows,
        "highs": statistics.highs,
        "sample": statistics.sample,
        "tokens": statistics.tokens,
    }
