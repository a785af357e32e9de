"""Backends that are joined: one folder, which the engine of each of them serves.

A linear may have what every engine serves, as far as all exporters store it in the same tensors and
describe it in the same words. The folder is checked by the rules of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, cast

from qplug.api.capability import NEWEST, Capability
from qplug.api.engine import Engine
from qplug.api.exporter import Exporter
from qplug.api.format import Format
from qplug.api.layout import Problem
from qplug.api.limits import Target
from qplug.api.model import ModelView
from qplug.api.scheme import QuantArgs, Scheme
from qplug.api.tensors import Checkpoint
from qplug.errors import QplugError

if TYPE_CHECKING:
    from torch import Tensor

#: What stands between the names of backends that are joined, and between versions of engines.
PLUS = "+"


class JoinedEngine(Engine):
    """Several engines, each of which has to serve what is written.

    ``engines`` are by the name of their backend. It has no server: a user names the backend whose
    server is to be started.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = dict(engines)
        newest = [held[0] for each in self.engines.values() for held in each.held.values()]
        tables = [each.capabilities() for each in self.engines.values()]
        # What the class says of other engines, each object says of its own.
        self.version = PLUS.join(each.version for each in self.engines.values())
        if self.version == PLUS.join([NEWEST] * len(self.engines)):
            self.version = NEWEST
        self.releases = {f" {PLUS} ".join(newest): served_by_all(tables)}  # type: ignore[misc]

    @property
    def held(self) -> dict[str, list[str]]:
        """The newest release that counts of each engine, under one name."""
        return {f" {PLUS} ".join(self.engines): list(self.releases)}

    def capabilities(self) -> list[Capability]:
        """What every engine serves in its version, and what one of them does not."""
        return [
            replace(row, engine=release) for release, rows in self.releases.items() for row in rows
        ]

    @property
    def servers(self) -> frozenset[str]:
        return frozenset[str]().union(*(each.servers for each in self.engines.values()))

    def at(self, version: str) -> JoinedEngine:
        """Returns these engines in versions with ``+`` between them, in the order of the engines.

        ``newest`` is the newest version of each. Raises QplugError if there is no table for a
        version, or if there are more or fewer versions than engines.
        """
        versions = version.split(PLUS)
        if version == NEWEST:
            versions = [NEWEST] * len(self.engines)
        if len(versions) != len(self.engines):
            names = f" {PLUS} ".join(self.engines)
            raise QplugError(
                f"engine={version}: name a version of each of {names}, as in engine="
                f"{PLUS.join([NEWEST] * len(self.engines))}"
            )
        pairs = zip(self.engines.items(), versions, strict=True)
        return JoinedEngine({name: engine.at(each) for (name, engine), each in pairs})

    def refuses(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> str | None:
        for name, engine in self.engines.items():
            sentence = engine.refuses(model, schemes, target)
            if sentence is not None:
                return f"{name}: {sentence}"
        return None

    def too_narrow(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> dict[str, str]:
        narrow: dict[str, str] = {}
        for engine in self.engines.values():
            narrow = engine.too_narrow(model, schemes, target) | narrow
        return narrow

    def refuses_cache(self, cache: QuantArgs, model: ModelView) -> str | None:
        for name, engine in self.engines.items():
            sentence = engine.refuses_cache(cache, model)
            if sentence is not None:
                return f"{name}: {sentence}"
        return None

    def merged(self, names: Sequence[str]) -> list[list[str]]:
        """The groups that any engine makes one matrix of; groups that share a linear are one."""
        joined: list[list[str]] = []
        for engine in self.engines.values():
            for group in engine.merged(names):
                apart = [each for each in joined if not {*each} & {*group}]
                touching = [name for each in joined if {*each} & {*group} for name in each]
                joined = [*apart, list(dict.fromkeys([*touching, *group]))]
        return joined

    def effective_weight(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, format: Format
    ) -> Tensor:
        """The weight that the first of the engines multiplies with."""
        first = next(iter(self.engines.values()))
        return first.effective_weight(tensors, scheme, format)


def served_by_all(tables: Sequence[Sequence[Capability]]) -> list[Capability]:
    """Returns a row for each scheme and device that every one of ``tables`` tells of.

    It is served if every table has it served: in the sizes of groups and the multiples of all.
    """
    schemes = dict.fromkeys(row.scheme for table in tables for row in table)
    devices = dict.fromkeys(each for table in tables for row in table for each in row.devices)
    joined = []
    for scheme in schemes:
        for device in devices:
            rows = [row for table in tables for row in _rows(table, scheme, device)]
            if len(rows) == len(tables):
                joined.append(reduce(_both, rows))
    return joined


def _rows(table: Sequence[Capability], scheme: str, device: str) -> Iterator[Capability]:
    """Yields the row of ``table`` for ``scheme`` on ``device``, for this device alone, if any."""
    for row in table:
        if row.scheme == scheme and device in row.devices:
            yield replace(row, devices=(device,))
            return


def _both(one: Capability, other: Capability) -> Capability:
    """The row of what two engines serve of a scheme on a device."""
    refused = next((row for row in (one, other) if not row.served), None)
    if refused is not None:
        return refused
    sizes = tuple(size for size in one.group_sizes if size in other.group_sizes)
    if one.group_sizes and other.group_sizes and not sizes:
        return Capability(one.scheme, "no size of groups fits both", False, devices=one.devices)
    not_run = [each for each in (one.evidence, other.evidence) if not each.startswith("run")]
    return Capability(
        one.scheme,
        one.kernel if one.kernel == other.kernel else f"{one.kernel}; {other.kernel}",
        group_sizes=sizes or one.group_sizes or other.group_sizes,
        out_multiple=math.lcm(one.out_multiple, other.out_multiple),
        in_multiple=math.lcm(one.in_multiple, other.in_multiple),
        evidence=not_run[0] if not_run else f"{one.evidence}; {other.evidence}",
        devices=one.devices,
    )


class JoinedExporter(Exporter[Target]):
    """The base class of joined backends, which ``join`` makes."""

    Params = Target
    #: The exporters, in the order in which the user named them.
    kinds: ClassVar[tuple[type[Exporter[Any]], ...]] = ()

    def __init__(self, params: Target) -> None:
        """Makes each exporter, with its engine in the version that ``params`` names for it.

        Raises QplugError as ``JoinedEngine.at`` does.
        """
        super().__init__(params)
        engine = cast("JoinedEngine", self.engine)
        versions = [each.version for each in engine.engines.values()]
        self.parts = [
            kind(replace(params, engine=version))
            for kind, version in zip(self.kinds, versions, strict=True)
        ]
        self.format = self.parts[0].format

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        for part in self.parts:
            sentence = part.format.refuses(model, schemes)
            if sentence is not None:
                return f"{part.name}: {sentence}"
        sentence = self._divided(model, schemes)
        if sentence is None and self.engine is not None:
            sentence = self.engine.refuses(model, schemes, self.target)
        return sentence

    def refuses_cache(self, cache: QuantArgs, model: ModelView) -> str | None:
        for part in self.parts:
            sentence = part.format.refuses_cache(cache)
            if sentence is not None:
                return f"{part.name}: {sentence}"
        return None if self.engine is None else self.engine.refuses_cache(cache, model)

    def _divided(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        """Why one folder is not the folder of each part, as a sentence; None if it is."""
        first, dtype = self.parts[0], model.dtype
        for part in self.parts[1:]:
            for name, scheme in schemes.items():
                mine, theirs = (
                    each.format.layout(
                        model.linears[name],
                        scheme.with_scale_dtype(each.format.scale_dtype(scheme, dtype)),
                        dtype,
                    )
                    for each in (first, part)
                )
                if mine != theirs:
                    return (
                        f"{name}: {first.name} and {part.name} store {scheme.name} in different "
                        "tensors: take another --scheme, or a folder for each"
                    )
            if first.format.config(model, schemes) != part.format.config(model, schemes):
                return (
                    f"{first.name} and {part.name} describe this model in different words: write "
                    "a folder for each"
                )
        return None

    def check_folder(self, folder: Checkpoint, model: ModelView) -> Iterator[Problem]:
        """The rules of every format and engine that ``folder`` breaks, each problem once."""
        found: dict[Problem, None] = {}
        for part in self.parts:
            found |= dict.fromkeys(part.check_folder(folder, model))
        yield from found
        config = folder.config.get("quantization_config")
        if config is None:
            return
        read = {part.name: part.format.read_schemes(config, model) for part in self.parts}
        for name in model.linears:
            kinds = {part: schemes.get(name) for part, schemes in read.items()}
            if len(set(kinds.values())) > 1:
                told = ", ".join(f"{k.name if k else 'float'} for {p}" for p, k in kinds.items())
                yield Problem("joined", name, f"is {told}")


def join(kinds: Sequence[type[Exporter[Any]]]) -> type[JoinedExporter]:
    """Returns a backend that writes one folder for the engines of ``kinds``.

    It is named after them, with ``+`` between the names. Raises QplugError if one of ``kinds``
    occurs twice, has no engine, has other options than a ``Target``, or writes a single file.
    """
    names = [kind.name for kind in kinds]
    joined = PLUS.join(names)
    for kind in kinds:
        if names.count(kind.name) > 1:
            raise QplugError(f"--backend {joined}: names {kind.name} twice")
        if kind.engine is None or kind.Params is not Target:
            raise QplugError(
                f"--backend {joined}: {kind.name} is for no engine with kernels to choose from, so "
                "it cannot be joined with another"
            )
        if kind.format.stores_float or kind.format.single_file is not None:
            raise QplugError(f"--backend {joined}: {kind.name} writes a folder of its own kind")
    engines = {kind.name: cast("Engine", kind.engine) for kind in kinds}
    body = {
        "__doc__": f"Writes one folder that each of {' and '.join(names)} serves.",
        "__module__": __name__,
        "name": joined,
        "kinds": tuple(kinds),
        "format": kinds[0].format,
        "engine": JoinedEngine(engines),
    }
    return cast("type[JoinedExporter]", type("Joined", (JoinedExporter,), body))
