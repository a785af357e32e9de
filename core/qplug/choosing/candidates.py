"""Finds the schemes to choose from: those that the backend serves, on its device, in one folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from qplug.api import Exporter, ModelView
from qplug.api.gpus import DEVICES
from qplug.api.scheme import PRESETS, Scheme
from qplug.choosing.decisions import Decision, part_of
from qplug.errors import QplugError
from qplug.numerics.scales import check_widths

#: The schemes that each decision may get; None stands for float weights.
Candidates: TypeAlias = Mapping[Decision, Sequence[Scheme | None]]

#: The sizes of groups of a backend that no engine limits.
_GROUP_SIZES = (32, 64, 128, -1)

#: The schemes to choose from: those with which choices were measured (benchmarks/RESULTS.md). Each
#: more takes as long to estimate, and estimates fail where weights have fewer than 4 bits.
_MEASURED = (
    *("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK"),
    *("W4AFP8", "NVFP4A16", "NVFP4", "MXFP4A16"),
)


#: Schemes with static inputs that are taken where the backend serves nothing as fine without.
_STATIC = ("W8A8_STATIC", "FP8")


def served_schemes(exporter: Exporter[Any]) -> list[Scheme]:
    """The schemes to choose from that the engine serves on the device of the target.

    A scheme with static inputs is left out if another has weights as fine and inputs that need no
    calibration: it loses no more in the same bytes, but for those of scales.

    If the target is any device, a scheme must be served on each GPU that the engine serves at all.
    Without an engine these are all schemes to choose from.
    """
    engine, target = exporter.engine, exporter.target
    rows = [] if engine is None else engine.capabilities()
    served = [row for row in rows if row.served]
    names = (*_MEASURED, *_STATIC)
    if not rows:
        found = [s for name in names for s in _grouped(PRESETS[name], _GROUP_SIZES)]
    else:
        asked = target.column.device
        devices = {asked} if asked != "any" else _gpus(served)
        sizes: dict[str, list[set[int]]] = {}
        for name in dict.fromkeys(row.scheme for row in served):
            by_device = [
                {
                    size
                    for row in served
                    if row.scheme == name and (not row.devices or device in row.devices)
                    for size in row.group_sizes or (0,)
                }
                for device in devices
            ]
            sizes[name] = by_device
        found = [
            scheme
            for name, by_device in sizes.items()
            if name in names
            for scheme in _grouped(PRESETS[name], sorted(set.intersection(*by_device)))
        ]
    kinds = list(dict.fromkeys(found))
    return [scheme for scheme in kinds if not any(_beats(other, scheme) for other in kinds)]


def _beats(other: Scheme, scheme: Scheme) -> bool:
    """Whether ``other`` has weights as fine as ``scheme``, and no static inputs as ``scheme`` has.

    One scale for a tensor is the coarsest.
    """
    if not scheme.static_inputs or other.static_inputs:
        return False
    weights, others = scheme.weights, other.weights
    return others == weights or (
        weights.strategy == "tensor" and others.dtype == weights.dtype and others.symmetric
    )


def _gpus(served: Sequence[Any]) -> set[str]:
    """The GPUs on which anything is served; CPUs if there are none."""
    known = {device for row in served for device in row.devices} & {*DEVICES}
    return known - {"cpu"} or known or {""}


def _grouped(scheme: Scheme, sizes: Sequence[int]) -> list[Scheme]:
    """``scheme`` with groups of each of ``sizes``; 0 is the scheme's own size."""
    found = []
    for size in sizes:
        try:
            found.append(scheme.with_group_size(size) if size else scheme)
        except QplugError:  # it has no group size to choose
            found.append(scheme)
    return list(dict.fromkeys(found))


def candidates(
    found: Sequence[Decision],
    schemes: Sequence[Scheme],
    model: ModelView,
    exporter: Exporter[Any],
    fixed: Mapping[str, Scheme],
) -> dict[Decision, list[Scheme | None]]:
    """The schemes of ``schemes`` that each decision may get, and None for float weights.

    ``fixed``: the schemes of linears that the recipe itself names; such a decision has no other
    candidate. A scheme in which kernels do not take the shapes of a decision is left out.
    """
    allowed: dict[tuple[object, ...], list[Scheme | None]] = {}
    result: dict[Decision, list[Scheme | None]] = {}
    for decision in found:
        own = {fixed[name] for name in decision.linears if name in fixed}
        if own:
            if len(own) > 1 or not all(name in fixed for name in decision.linears):
                raise QplugError(
                    f"--override: {decision.name} must have one scheme, because engines merge it"
                )
            result[decision] = [own.pop()]
            continue
        part = decision.view(model)
        kind = tuple((name.rpartition(".")[2], shape) for name, shape in part.linears.items())
        if kind not in allowed:
            fitting = [scheme for scheme in schemes if _fits(decision, scheme, part, exporter)]
            allowed[kind] = [*fitting, None]
        result[decision] = allowed[kind]
    return result


def _fits(decision: Decision, scheme: Scheme, part: ModelView, exporter: Exporter[Any]) -> bool:
    """Whether the linears of ``decision``, whose view is ``part``, can have ``scheme``."""
    assigned = dict.fromkeys(decision.linears, scheme)
    try:
        for name, (_, width) in part.linears.items():
            check_widths(name, width, scheme)
    except QplugError:
        return False
    return not exporter.too_narrow(part, assigned) and exporter.refuses(part, assigned) is None


def families(
    options: Mapping[Decision, Sequence[Scheme | None]], model: ModelView, exporter: Exporter[Any]
) -> list[dict[Decision, list[Scheme | None]]]:
    """The ways to limit ``options`` so that the backend takes any mixture of what is left.

    Most engines take all schemes in one folder; some read one format alone. A way in which a
    decision has nothing left is left out.
    """
    schemes = list(dict.fromkeys(s for each in options.values() for s in each if s is not None))
    fits = _compatible(options, model, exporter)
    sets: dict[frozenset[Scheme], None] = {}
    for first in schemes:
        together = [first]
        for other in schemes:
            if other is not first and all(fits(other, each) for each in together):
                together.append(other)
        sets[frozenset(together)] = None
    limited = [
        {d: [s for s in each if s is None or s in kept] for d, each in options.items()}
        for kept in sets
    ]
    return [way for way in limited if all(way.values())]


def _compatible(
    options: Mapping[Decision, Sequence[Scheme | None]], model: ModelView, exporter: Exporter[Any]
) -> Callable[[Scheme, Scheme], bool]:
    """A function that says whether one folder can have linears in two schemes."""
    known: dict[frozenset[Scheme], bool] = {}

    def fits(one: Scheme, other: Scheme) -> bool:
        both = frozenset((one, other))
        if both not in known:
            first = next(d for d, each in options.items() if one in each)
            second = next((d for d, each in options.items() if other in each and d != first), None)
            if second is None:
                known[both] = True
            else:
                assigned = dict.fromkeys(first.linears, one)
                assigned |= dict.fromkeys(second.linears, other)
                part = part_of(model, assigned)
                known[both] = exporter.refuses(part, assigned) is None
        return known[both]

    return fits
