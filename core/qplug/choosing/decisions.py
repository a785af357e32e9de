"""Groups the linears that must share one scheme: merged ones, and the experts of a layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qplug.api import Exporter, ModelView
from qplug.checkpoint.names import local_of, module_of

_EXPERTS = ".experts."


@dataclass(frozen=True)
class Decision:
    """Linears that get one scheme together, under a name for users."""

    name: str
    linears: tuple[str, ...]

    def view(self, model: ModelView) -> ModelView:
        """The part of ``model`` that the decision is about."""
        return part_of(model, self.linears)


def part_of(model: ModelView, linears: Collection[str]) -> ModelView:
    """``model`` with ``linears`` alone."""
    shapes = {name: model.linears[name] for name in linears}
    return replace(model, linears=shapes, quantizable=model.quantizable & shapes.keys())


def decisions(linears: Collection[str], exporter: Exporter[Any]) -> list[Decision]:
    """The decisions on ``linears``, in the order of their first linears.

    All experts of a layer are one decision, because engines stack them.
    """
    partners: dict[str, list[str]] = {}
    dense = [name for name in linears if _EXPERTS not in name]
    for group in exporter.merged(dense):
        partners |= dict.fromkeys(group, group)
    experts: dict[str, list[str]] = {}
    for name in linears:
        layer, inside, _ = name.partition(_EXPERTS)
        if inside:
            experts.setdefault(f"{layer}.experts", []).append(name)
    found: dict[str, Decision] = {}
    for name in linears:
        layer, inside, _ = name.partition(_EXPERTS)
        if inside:
            place = f"{layer}.experts"
            found.setdefault(place, Decision(place, tuple(experts[place])))
        else:
            group = partners.get(name, [name])
            found.setdefault(group[0], Decision(_joined(group), tuple(group)))
    return list(found.values())


def _joined(group: list[str]) -> str:
    """``model.layers.0.mlp.gate_proj+up_proj`` for the linears of one module."""
    parent = module_of(group[0])
    locals_ = "+".join(local_of(name) for name in group)
    return f"{parent}.{locals_}" if parent else locals_


def weights_of(decision: Decision, shapes: Mapping[str, tuple[int, int]]) -> int:
    """The number of weights of ``decision``; ``shapes`` are ``(out, in)`` by linear."""
    return sum(shapes[name][0] * shapes[name][1] for name in decision.linears)
