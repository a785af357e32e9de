"""Statistics of what the linears of a block read, gathered while calibration tokens pass."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qplug.api.scheme import Scheme
from qplug.calibration.channels import Channels
from qplug.calibration.statistics import SeenTokens, Statistics, observe_side_by_side
from qplug.model.experts import (
    Given,
    expert_of,
    experts_in,
    given_to,
    multiplies_together,
    seeing_all,
    silent,
)
from qplug.model.hooks import hooked
from qplug.model.input_groups import GroupPaths

#: Tokens in the sample of a group. The experts of a layer divide that number, each has the least.
SAMPLE = 2048
_LEAST_OF_EXPERT = 64
#: Tokens of experts that a GPU computes together.
_TOGETHER = 1 << 16

#: Inputs in the float model by module path.
FloatInputs: TypeAlias = dict[str, Tensor]
#: What the experts of a layer were given in a pass, after the number of its batch.
Passed: TypeAlias = "tuple[int, Given]"


@dataclass(frozen=True)
class SampleQuota:
    """How the tokens of a sample are divided among batches and processes.

    ``batches``: the number of batches of each process; ``rank``: this process.
    """

    batches: Sequence[int]
    rank: int

    def of_sample(self, count: int) -> tuple[int, int]:
        """Rows that each batch gives to a sample of ``count``, and the most from this process."""
        per_batch = -(-count // sum(self.batches))
        return per_batch, max(0, count - per_batch * sum(self.batches[: self.rank]))


@dataclass(frozen=True)
class Seen:
    """A batch of ``windows``, each of ``length`` tokens.

    ``real`` and ``counted``, bool ``[windows, length]``, are false for padding, and for padding and
    all other tokens that sums leave out; None if there are none.
    """

    windows: int
    length: int
    real: Tensor | None
    counted: Tensor | None

    def tokens(self, device: torch.device) -> SeenTokens:
        """The same batch, token by token."""
        return SeenTokens.of(self.length, self.windows, self.real, self.counted, device)


@dataclass(frozen=True, eq=False)
class _Begin:
    """How the statistics of a linear of an expert begin, whose input has ``width`` channels."""

    width: int
    statistics: Callable[..., Statistics]


class Observation:
    """Gathers ``statistics`` of the input groups of one block, by the path of a reading module.

    A group is observed where its whole tensor is read, and at the first linear of each expert that
    reads some of its tokens. What experts are given is kept until the end, so that each expert
    computes all its tokens at once.
    """

    def __init__(
        self,
        block: nn.Module,
        structure: Sequence[GroupPaths],
        schemes: Mapping[str, Scheme],
        quota: SampleQuota,
        device: torch.device,
        *,
        with_drift: bool,
        all_experts: bool = False,
    ) -> None:
        """``schemes``: the scheme of each quantized linear, by path within the block."""
        self._block, self._all_experts = block, all_experts
        self._device = device
        self._sampled: dict[str, int] = {}  # rows that one call adds to a sample
        self.statistics: dict[str, Statistics] = {}
        #: What begins the statistics of the experts of a layer, by layer, number and path.
        self._of_experts: dict[str, dict[int, dict[str, _Begin]]] = {}
        self._layers = experts_in(block)
        own = quota.batches[quota.rank]
        for group in structure:
            quantized = [path for path in group.linears if path in schemes]
            if not quantized:
                continue
            linear = block.get_submodule(quantized[0])
            assert isinstance(linear, nn.Linear)
            start = partial(
                Statistics,
                linear.in_features,
                device,
                by_window=any(schemes[path].static_inputs for path in quantized),
                with_drift=with_drift,
            )
            of_experts = [linears[0] for linears in group.by_expert]
            if group.experts is None:
                self._sampled[group.at], room = quota.of_sample(SAMPLE)
                self.statistics[group.at] = start(room)
                kept = max(_LEAST_OF_EXPERT, SAMPLE // max(1, len(of_experts)))
            else:
                of_experts = [group.at]
                kept = max(_LEAST_OF_EXPERT, SAMPLE // len(self._layers[group.experts]))
            for path in of_experts:
                self._sampled[path] = quota.of_sample(kept)[0] * own
                # A process may see all tokens of an expert, or none.
                begin = partial(start, kept)
                expert = expert_of(block, path)
                assert expert is not None
                layer, number = expert
                of_layer = self._of_experts.setdefault(layer, {})
                of_layer.setdefault(number, {})[path] = _Begin(linear.in_features, begin)
        #: The paths at which whole tensors are read.
        self._whole = [*self.statistics]
        self._last = {group.experts for group in structure if group.is_last}
        self._passes: dict[str, list[Passed]] = {path: [] for path in self._of_experts}
        self._float_passes: dict[str, list[Passed]] = {path: [] for path in self._of_experts}
        self._given: dict[str, tuple[Given, Given | None]] = {}
        self._seen: list[SeenTokens] = []

    @contextmanager
    def recording_float(self, inputs: FloatInputs) -> Iterator[None]:
        """Within it, a pass of the float block puts what its linears read into ``inputs``."""

        def see(path: str, x: Tensor) -> None:
            inputs[path] = x

        def keep(path: str, given: Given) -> None:
            self._float_passes[path].append((len(self._seen), given))

        with self._seeing(see, keep):
            yield

    @contextmanager
    def gathering(self, seen: Seen, float_inputs: FloatInputs, *, stop: bool) -> Iterator[None]:
        """Within it, a pass of the block over ``seen`` adds what linears read to the statistics.

        ``float_inputs`` as ``recording_float`` left them. ``stop`` ends the pass once all inputs
        have been seen.
        """
        coming = {*self._whole, *self._of_experts}
        needless = [self._layers[path] for path in self._of_experts if path in self._last]

        def came(path: str) -> None:
            coming.discard(path)
            if stop and not coming:
                raise _SeenEnoughError

        def observe(path: str, x: Tensor) -> None:
            self.statistics[path].observe_windows(
                x,
                self._sampled[path],
                seen.length,
                seen.real,
                float_inputs.get(path),
                counted=seen.counted,
            )
            came(path)

        def keep(path: str, given: Given) -> None:
            self._passes[path].append((len(self._seen), given))
            came(path)

        try:
            # The output is not used if the pass is stopped; nor is that of the last experts.
            with self._seeing(observe, keep), silent(needless if stop else ()):
                yield
        except _SeenEnoughError as enough:
            # A reference to this exception would keep all tensors of the pass alive. From Python
            # 3.12 on its traceback also holds this frame, which holds the exception.
            traceback.clear_frames(enough.__traceback__)
            enough.__traceback__ = None
        self._seen.append(seen.tokens(self._device))

    def experts(
        self,
        parameters: Mapping[str, Tensor],
        float_parameters: Mapping[str, Tensor],
        numbers: Collection[int] | None = None,
    ) -> dict[str, Statistics]:
        """The statistics of experts, of which all are computed by default, by path.

        They are also added to ``statistics`` if all are computed. Call it after all batches.
        ``parameters`` and ``float_parameters`` are parameters of the whole block; the latter of the
        block whose passes ``recording_float`` saw. ``numbers`` chooses experts of each layer.
        """
        for layer, passes in self._passes.items():
            if passes:
                before = [0, *accumulate(batch.tokens for batch in self._seen)]
                in_float = self._float_passes[layer]
                of_float = _joined(in_float, before) if in_float else None
                self._given[layer] = _joined(passes, before), of_float
        found: dict[str, Statistics] = {}
        for layer, all_of_layer in self._of_experts.items():
            chosen = {n: b for n, b in all_of_layer.items() if numbers is None or n in numbers}
            found |= self._begun(chosen)
            if layer in self._given:
                self._add(layer, chosen, found, parameters, float_parameters)
        if numbers is None:
            self.statistics |= found
            self._given.clear()
        return found

    def _begun(self, experts: Mapping[int, Mapping[str, _Begin]]) -> dict[str, Statistics]:
        """Empty statistics; the sums of one width are together in memory."""
        widths = [begin.width for paths in experts.values() for begin in paths.values()]
        rooms = {
            width: iter(torch.zeros(widths.count(width), width, width, device=self._device))
            for width in {*widths}
        }
        channels = {
            width: Channels.of_no_rows(widths.count(width), width, self._device)
            for width in {*widths}
        }
        numbers = {width: count() for width in {*widths}}
        found = {}
        # All first linears come before all last ones, which may have the same width.
        for place in range(max((len(paths) for paths in experts.values()), default=0)):
            for paths in experts.values():
                for path, begin in [*paths.items()][place : place + 1]:
                    own = channels[begin.width].one(next(numbers[begin.width]))
                    found[path] = begin.statistics(room=next(rooms[begin.width]), channels=own)
        return found

    def _add(
        self,
        layer: str,
        chosen: Mapping[int, Mapping[str, _Begin]],
        statistics: Mapping[str, Statistics],
        parameters: Mapping[str, Tensor],
        float_parameters: Mapping[str, Tensor],
    ) -> None:
        """Adds what the ``chosen`` experts of ``layer`` read to their ``statistics``."""
        experts, seen = self._layers[layer], SeenTokens.joined(self._seen)
        given, of_float = self._given[layer]
        places = given.by_expert(len(experts))
        if of_float is None and self._goes_together(layer, chosen, statistics, parameters):
            self._add_together(layer, chosen, statistics, parameters, places)
            return
        float_places = None if of_float is None else of_float.by_expert(len(experts))
        for number, begun in chosen.items():
            expert, paths = experts.get_submodule(str(number)), [*begun]
            names = [
                (f"{name}.{local}", f"{layer}.{number}.{name}.{local}")
                for name in experts.linears
                for local in ("weight", "bias")
            ]
            rows, tokens = places[number]
            if not len(rows):
                continue
            in_float: dict[str, Tensor] = {}
            float_tokens: Tensor | None = None
            if of_float is not None and float_places is not None:
                float_rows, float_tokens = float_places[number]
                own = {n: float_parameters[full] for n, full in names if full in float_parameters}
                in_float = _inputs(self._block, paths, expert, own, of_float.source[float_rows])
            own = {n: parameters[full] for n, full in names if full in parameters}
            read = _inputs(self._block, paths, expert, own, given.source[rows])
            for path, x in read.items():
                statistics[path].observe_tokens(
                    x, tokens, seen, self._sampled[path], in_float.get(path), float_tokens
                )
                statistics[path].settle()

    def _goes_together(
        self,
        layer: str,
        chosen: Mapping[int, Mapping[str, _Begin]],
        statistics: Mapping[str, Statistics],
        parameters: Mapping[str, Tensor],
    ) -> bool:
        """Whether a GPU can compute several of the ``chosen`` experts of ``layer`` at once."""
        first = next(iter(chosen), None)
        if first is None or not multiplies_together(self._layers[layer], layer, parameters, first):
            return False
        paths = {number: [*begun] for number, begun in chosen.items()}
        names = {tuple(path.rpartition(".")[2] for path in own) for own in paths.values()}
        return (
            len(names) == 1
            and all(seen.real is None and seen.counted is None for seen in self._seen)
            and all(statistics[path].is_plain for own in paths.values() for path in own)
        )

    def _add_together(
        self,
        layer: str,
        chosen: Mapping[int, Mapping[str, _Begin]],
        statistics: Mapping[str, Statistics],
        parameters: Mapping[str, Tensor],
        places: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """``_add`` by one product for each linear of some experts, whose weights are together.

        ``places``: the rows and the tokens of each expert.
        """
        experts, (given, _) = self._layers[layer], self._given[layer]
        counts = {number: len(places[number][0]) for number in chosen}
        for numbers in _few_at_a_time(counts, _TOGETHER):
            own = [counts[number] for number in numbers]
            x = given.source[torch.cat([places[number][0] for number in numbers])]
            ends = torch.tensor([*accumulate(own)], device=x.device)
            # The n-th path of each expert: the same linear in all of them.
            for paths in zip(*(chosen[number] for number in numbers), strict=True):
                is_last = paths[0].rpartition(".")[2] == experts.last
                read = experts.read_by_last(x, ends, layer, parameters, numbers) if is_last else x
                seen_by = [statistics[path] for path in paths]
                sampled = [self._sampled[path] for path in paths]
                observe_side_by_side(seen_by, read, own, sampled)
                for each in seen_by:
                    each.settle()

    @contextmanager
    def _seeing(
        self, see: Callable[[str, Tensor], None], see_given: Callable[[str, Given], None]
    ) -> Iterator[None]:
        def show(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(path, inputs[0])

        handles = [
            self._block.get_submodule(path).register_forward_pre_hook(partial(show, path))
            for path in self._whole
        ]
        layers = {path: self._layers[path] for path in self._of_experts}
        all_tokens = seeing_all(layers) if self._all_experts else nullcontext()
        with hooked(handles), given_to(layers, see_given), all_tokens:
            yield


def _joined(passes: list[Passed], before: Sequence[int]) -> Given:
    """All ``passes`` as one, whose list is emptied; ``before``: the tokens before each batch."""
    joined = Given.joined([given for _, given in passes], [before[batch] for batch, _ in passes])
    passes.clear()
    return joined


def _few_at_a_time(counts: Mapping[int, int], most: int) -> Iterator[list[int]]:
    """Yields the keys of ``counts`` in lists whose counts add up to ``most``, or of one key."""
    few: list[int] = []
    total = 0
    for number, own in counts.items():
        if few and total + own > most:
            yield few
            few, total = [], 0
        few.append(number)
        total += own
    if few:
        yield few


def _inputs(
    block: nn.Module,
    paths: Sequence[str],
    expert: nn.Module,
    parameters: Mapping[str, Tensor],
    x: Tensor,
) -> dict[str, Tensor]:
    """What the linears of ``block`` at ``paths`` read, which belong to ``expert``, given ``x``."""
    read: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read[path] = inputs[0]
        if len(read) == len(paths):
            raise _SeenEnoughError

    handles = [
        block.get_submodule(path).register_forward_pre_hook(partial(keep, path)) for path in paths
    ]
    try:
        with hooked(handles):
            functional_call(expert, dict(parameters), (x,))
    except _SeenEnoughError as enough:
        traceback.clear_frames(enough.__traceback__)
        enough.__traceback__ = None
    return read


class _SeenEnoughError(Exception):
    """Ends a forward pass whose output is not used, once all inputs have been observed."""
