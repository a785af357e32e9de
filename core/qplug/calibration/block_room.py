"""How much of a block is in memory at once: its parts, and where the values of a part wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from qplug.api.scheme import Scheme
from qplug.api.tensors import Checkpoint
from qplug.calibration.block_modules import BlockModules
from qplug.calibration.groups_apart import divide_groups
from qplug.calibration.portions import divide_experts
from qplug.checkpoint.names import within
from qplug.machine.memory import memory_of_each
from qplug.machine.session import Session
from qplug.model.experts import alike_in, expert_of, experts_in
from qplug.model.input_groups import GroupPaths

if TYPE_CHECKING:
    from torch import Tensor


class BlockRoom:
    """The room for blocks on the device of a session, which all of its processes share alike."""

    def __init__(
        self,
        source: Checkpoint,
        blocks: BlockModules,
        session: Session,
        *,
        memory: int | None,
        divides: bool,
        by_group: bool,
        tokens: int,
    ) -> None:
        """``memory``: bytes that a block may take; None for those that are free.

        ``divides``: whether a block may be in parts at all; ``by_group``: whether its input groups
        may. ``tokens``: calibration tokens of this process.
        """
        self._source, self._blocks = source, blocks
        self._device, self._processes = session.device, session.processes
        self._memory, self._divides, self._by_group = memory, divides, divides and by_group
        self._tokens = tokens
        self._rooms: dict[str, Tensor] = {}  # for the weights of experts with which tokens go on

    def clear(self) -> None:
        """Forgets what is parked."""
        self._rooms.clear()

    # --- parts -----------------------------------------------------------------------------------

    def groups(
        self,
        name: str,
        structure: Callable[[], Sequence[GroupPaths]],
        on_cpu: Mapping[str, Tensor],
        schemes: Mapping[str, Scheme],
    ) -> list[tuple[GroupPaths, ...]] | None:
        """The input groups of each part of block ``name``; None if there is memory for all.

        ``structure`` returns the groups of the block, ``on_cpu`` are its weights by relative name.
        ``schemes`` are those of all linears.
        """
        if not self._by_group or experts_in(self._blocks.modules[name]):
            return None
        if any(scheme.static_inputs for scheme in within(name, schemes).values()):
            return None  # the linears that an engine merges share a scale
        budgets = [each for each in self._processes.gather(self._budget()) if each is not None]
        if not budgets:
            return None
        return divide_groups(structure(), on_cpu, min(budgets))

    def portions(
        self, name: str, on_cpu: Mapping[str, Tensor], schemes: Mapping[str, Scheme]
    ) -> list[range] | None:
        """The experts of each part of block ``name``; None if there is memory for the whole.

        ``on_cpu`` and ``schemes`` as for ``groups``.
        """
        if not self._divides:
            return None
        module = self._blocks.modules[name]
        static = (path for path, s in within(name, schemes).items() if s.static_inputs)
        if any(expert_of(module, path) for path in static):
            return None  # the experts of a layer share a scale
        if not experts_in(module):
            return None
        # All processes take the same portions, though one may have less memory or more tokens.
        every = self._processes.gather((self._budget(), self._tokens))
        budgets = [budget for budget, _ in every if budget is not None]
        return divide_experts(
            module, on_cpu, max(count for _, count in every), min(budgets, default=None)
        )

    def _budget(self) -> int | None:
        """The bytes that a block may take in this process; None if nothing limits them."""
        return memory_of_each(self._device, self._processes.count, self._memory)

    # --- values that wait ------------------------------------------------------------------------

    def parked(self, name: str, effective: dict[str, Tensor]) -> dict[str, Tensor]:
        """``effective`` parameters of a part of block ``name``, where they wait for the others.

        On a GPU the weights of all experts are together, or on the host if they take more than half
        of the memory that a block may take.
        """
        if self._device.type != "cuda":
            return effective
        if not self._fits(name):
            return {local: value.cpu() for local, value in effective.items()}
        parked = dict(effective)
        for names in alike_in(self._blocks.modules[name]):
            for place, local in enumerate(names):
                if local not in effective:
                    continue
                value = effective[local]
                if names[0] not in self._rooms:
                    self._rooms[names[0]] = value.new_empty(len(names), *value.shape)
                parked[local] = self._rooms[names[0]][place].copy_(value)
        return parked

    def on_host(self, name: str) -> set[str]:
        """The parameters of block ``name`` that stay on the host while the block computes."""
        if self._device.type != "cuda" or self._fits(name):
            return set()
        return {local for names in alike_in(self._blocks.modules[name]) for local in names}

    def _fits(self, name: str) -> bool:
        module = self._blocks.modules[name]
        stored = [f"{name}.{local}" for names in alike_in(module) for local in names]
        size = sum(self._source.tensors[n].nbytes for n in stored if n in self._source.tensors)
        budget = self._budget()
        return budget is None or size <= budget / 2
