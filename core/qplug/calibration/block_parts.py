"""The parts of a block that does not fit into memory, one after another, with their statistics."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qplug.calibration.block_modules import BlockModules
from qplug.calibration.groups_apart import weights_of_part
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.observation import Observation
from qplug.calibration.portions import part_of_structure, part_of_weights
from qplug.calibration.statistics import Statistics, share
from qplug.machine.processes import Processes
from qplug.model.input_groups import GroupPaths

Structure = tuple[GroupPaths, ...]


class Gathers(Protocol):
    """What takes the tokens through a block: the walk. Weights go by their names in the block."""

    def structure(self, name: str, weights: Mapping[str, Tensor]) -> Structure:
        """The input groups of block ``name``, whose parameters are shaped as ``weights``."""
        ...

    def on_device(self, name: str, on_cpu: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights ``on_cpu`` of block ``name``, checked."""
        ...

    def passed(
        self,
        name: str,
        structure: Structure,
        parameters: Mapping[str, Tensor],
        float_parameters: Mapping[str, Tensor],
        *,
        first: bool = False,
    ) -> Observation:
        """An observation of all batches, whose experts are still to be computed."""
        ...

    def observe(
        self,
        name: str,
        structure: Structure,
        parameters: Mapping[str, Tensor],
        float_parameters: Mapping[str, Tensor],
        *,
        first: bool = False,
    ) -> dict[str, Statistics]:
        """As ``passed``, with the experts: the statistics by the path they are taken at."""
        ...

    def live(
        self,
        name: str,
        structure: Structure,
        statistics: Mapping[str, Statistics],
        weights: Mapping[str, Tensor],
    ) -> LiveBlock:
        """The block ``name``, or a part of it, with ``weights`` on the device."""
        ...


@dataclass(frozen=True, eq=False)
class BlockParts:
    """Makes the parts of ``blocks`` that ``walk`` stands at; ``processes`` share the statistics.

    Nothing refers to a part that is yielded: it is freed before the next one is made. (A generator
    that torch decorates would be kept company by its last value.)
    """

    walk: Gathers
    blocks: BlockModules
    processes: Processes

    def in_portions(
        self, name: str, on_cpu: Mapping[str, Tensor], portions: Sequence[Collection[int]]
    ) -> Iterator[LiveBlock]:
        """Yields block ``name`` without its experts, and then each of ``portions`` of them."""
        structure = self.walk.structure(name, on_cpu)
        observation = self._passed_without_experts(name, structure, on_cpu)
        for numbers in ((), *portions):
            yield self._portion(name, structure, observation, on_cpu, numbers)

    def group_by_group(
        self, name: str, on_cpu: dict[str, Tensor], parts: Sequence[Structure]
    ) -> Iterator[LiveBlock]:
        """Yields each of ``parts``, for which the tokens pass the block once.

        Empties ``on_cpu``, the weights of the block.
        """
        weights = self.walk.on_device(name, on_cpu)
        on_cpu.clear()
        for number in range(len(parts)):
            yield self._part(name, parts, number, weights)

    @torch.no_grad()
    def _passed_without_experts(
        self, name: str, structure: Structure, on_cpu: Mapping[str, Tensor]
    ) -> Observation:
        rest = part_of_weights(self.blocks.modules[name], on_cpu, ())
        parameters = self.blocks.computable(self.walk.on_device(name, rest))
        observation = self.walk.passed(name, structure, parameters, parameters, first=True)
        share(list(observation.statistics.values()), self.processes)
        return observation

    @torch.no_grad()
    def _portion(
        self,
        name: str,
        structure: Structure,
        observation: Observation,
        on_cpu: Mapping[str, Tensor],
        numbers: Collection[int],
    ) -> LiveBlock:
        """The experts with these ``numbers``; without any, the rest of the block."""
        module = self.blocks.modules[name]
        weights = self.walk.on_device(name, part_of_weights(module, on_cpu, numbers))
        statistics = dict(observation.statistics)
        if numbers:
            parameters = self.blocks.computable(weights)
            own = observation.experts(parameters, parameters, numbers)
            share(list(own.values()), self.processes)
            statistics |= own
        part = part_of_structure(structure, module, numbers)
        return self.walk.live(name, part, statistics, weights)

    @torch.no_grad()
    def _part(
        self, name: str, parts: Sequence[Structure], number: int, weights: dict[str, Tensor]
    ) -> LiveBlock:
        """The part with ``number``; the last one empties ``weights``, those of the block."""
        parameters = self.blocks.computable(weights)
        statistics = self.walk.observe(
            name, parts[number], parameters, parameters, first=number == 0
        )
        own = weights_of_part(parts, number, weights)
        del parameters
        if number == len(parts) - 1:
            weights.clear()
        return self.walk.live(name, parts[number], statistics, own)
