"""Raises blocks whose output is too far from the float model's, and plans the run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qplug.api import BuiltFloat, ModelView
from qplug.api.events import RaisedBlock
from qplug.api.scheme import Scheme
from qplug.checkpoint.names import module_of
from qplug.checkpoint.stacked import CutTensor
from qplug.choosing.candidates import served_schemes
from qplug.choosing.ladder import Ladder, Level, find_ladder
from qplug.choosing.patterns import with_changes
from qplug.errors import QplugError
from qplug.recipe.assign import assign
from qplug.recipe.recipe import Recipe
from qplug.recipe.spelled_scheme import scheme_text
from qplug.registry.registry import Registry
from qplug.run.choose import accepted
from qplug.run.prepare import Prepared
from qplug.run.stages import Stages


@dataclass(frozen=True, eq=False)
class Raising:
    """What the blocks of a run can be raised to, and which of them were.

    ``asked`` is the recipe without raised blocks, which assigns the schemes ``assigned``.
    """

    asked: Recipe
    assigned: Mapping[str, Scheme]
    ladder: Ladder
    raised: tuple[RaisedBlock, ...] = ()

    @classmethod
    def of(
        cls, stages: Stages, prepared: Prepared, quantized: Mapping[str, Scheme], registry: Registry
    ) -> Raising:
        """Returns what can be raised in a run that stores the linears ``quantized`` as codes.

        Raises QplugError if no block can be raised.
        """
        recipe, view, exporter = stages.recipe, prepared.view, stages.exporter
        every = assign(recipe, view, exporter.built_float(view))
        assigned = {name: scheme for name, scheme in every.items() if name in quantized}
        served, _ = accepted(served_schemes(exporter), recipe, registry)
        ladder = find_ladder(
            assigned,
            [recipe.rounding(scheme) for scheme in served],
            view,
            exporter,
            bound=_stacked_experts(prepared),
        )
        if not ladder.levels:
            why = ladder.refusal or "it serves no other scheme for the blocks of this model"
            raise QplugError(
                f"--on-stop raise: {exporter.name}: {why}; leave --on-stop out, and --stop-at "
                "stops the run"
            )
        return cls(recipe, assigned, ladder)

    def levels(self, block: str) -> tuple[Level, ...]:
        """The levels to which ``block`` can be raised, in order."""
        return self.ladder.levels.get(block, ())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all schemes to which blocks can be raised, in order."""
        most = max(map(len, self.ladder.levels.values()))
        found = (
            level_text(levels[-place], self.assigned)
            for place in range(most, 0, -1)  # from the end: blocks that begin lower have more
            for levels in self.ladder.levels.values()
            if place <= len(levels)
        )
        return tuple(dict.fromkeys(found))

    def with_raised(self, raised: Sequence[RaisedBlock]) -> Raising:
        """Returns the same with other ``raised`` blocks, in the order of the model.

        Raises QplugError if a block cannot be raised so: another qplug raised it.
        """
        for block in raised:
            if not 2 <= len(block.schemes) <= 1 + len(self.levels(block.name)):
                raise QplugError(f"{block.name}: cannot be raised to {block.schemes[-1]}")
        by_name = {block.name: block for block in raised}
        return replace(self, raised=tuple(by_name[b] for b in self.ladder.levels if b in by_name))

    def tried(self, block: str, distances: Sequence[float | None], limit: float) -> RaisedBlock:
        """Returns the block as raised to the level that was tried last of ``distances``."""
        own: Level = {n: s for n, s in self.assigned.items() if n.startswith(f"{block}.")}
        every = (own, *self.levels(block))[: len(distances)]
        names = tuple(level_text(level, own) for level in every)
        return RaisedBlock(block, names, tuple(distances), limit)

    def recipe(self, view: ModelView, built_float: Mapping[str, BuiltFloat]) -> Recipe:
        """Returns the recipe that assigns the schemes of all blocks, raised ones included.

        ``built_float`` as for ``assign``.
        """
        schemes: dict[str, Scheme | None] = dict(self.assigned)
        for block in self.raised:
            schemes |= self.levels(block.name)[len(block.schemes) - 2]
        wanted = {name: scheme for name, scheme in schemes.items() if scheme is not None}
        recipe = with_changes(self.asked, self.assigned, wanted, view)
        got = assign(recipe, view, built_float)
        if {name: got.get(name) for name in schemes} != schemes:
            raise AssertionError("the patterns of the recipe do not give the raised schemes")
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Returns what qplug.json says of raised blocks, and of the recipe that was asked for."""
        return {"asked": self.asked.to_dict(), "blocks": [asdict(block) for block in self.raised]}


def level_text(level: Level, usual: Level) -> str:
    """Returns the names of the schemes in ``level``, ``float`` for float weights.

    Linears that have no scheme in ``usual`` are float anyway, and do not count.
    """
    names = (
        "float" if (scheme := level[name]) is None else scheme_text(scheme)
        for name in level
        if usual.get(name) is not None
    )
    return " and ".join(dict.fromkeys(names))


def _stacked_experts(prepared: Prepared) -> set[str]:
    """Returns the linears of experts that the source stores in one tensor.

    Float experts are stored so again, and the walk reads them one by one.
    """
    tensors = prepared.checkpoint.tensors.items()
    return {module_of(name) for name, tensor in tensors if isinstance(tensor, CutTensor)}
