"""Finds what decoder blocks can be raised to: schemes of more bits that the backend serves."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from qplug.api import Exporter, ModelView
from qplug.api.scheme import QuantArgs, Scheme
from qplug.checkpoint.names import block_of, relative_name
from qplug.choosing.candidates import candidates
from qplug.choosing.decisions import Decision, decisions

#: The scheme that takes the place of weights with fewer than 4 bits.
_FOUR_BITS = ("W4A16",)
#: The schemes of 8 bits that take the place of weights with fewer, the first one that is served.
_WIDER_FLOAT_INPUTS = ("W8A16", "FP8_DYNAMIC", "W8A8")
_WIDER_FP8_INPUTS = ("FP8_DYNAMIC", "W8A16", "W8A8")
_WIDER_INT8_INPUTS = ("W8A8", "W8A16", "FP8_DYNAMIC")

#: The schemes of a block's linears, by name; None stands for float weights.
Level: TypeAlias = Mapping[str, "Scheme | None"]


@dataclass(frozen=True)
class Ladder:
    """The levels to which each block can be raised, one after the other; a level is not empty.

    ``refusal`` says why a level that was tried is not among them; "" if there was none.
    """

    levels: Mapping[str, tuple[Level, ...]]
    refusal: str = ""


def find_ladder(
    assigned: Mapping[str, Scheme],
    served: Sequence[Scheme],
    view: ModelView,
    exporter: Exporter[Any],
    *,
    bound: Collection[str] = (),
) -> Ladder:
    """Returns the levels of all blocks of ``view``, whose linears have the schemes ``assigned``.

    A block goes to 4 bits if it has fewer, then to 8 bits in the scheme of ``served`` that is
    nearest to its own, then to float weights. Linears that engines merge, and all experts of a
    layer, take each level together. Linears in ``bound`` cannot be float. A level that the exporter
    refuses beside the schemes of all other blocks is left out.
    """
    return _Finder(assigned, served, view, exporter, bound).ladder()


class _Finder:
    def __init__(
        self,
        assigned: Mapping[str, Scheme],
        served: Sequence[Scheme],
        view: ModelView,
        exporter: Exporter[Any],
        bound: Collection[str],
    ) -> None:
        self._assigned, self._view, self._exporter, self._bound = assigned, view, exporter, bound
        inside = [name for name in assigned if block_of(f"{name}.", view.blocks) is not None]
        self._decisions: dict[str, list[Decision]] = {}
        found = decisions(inside, exporter)
        for decision in found:
            number = block_of(f"{decision.linears[0]}.", view.blocks)
            assert number is not None
            self._decisions.setdefault(view.blocks[number], []).append(decision)
        self._fitting = candidates(found, served, view, exporter, {})
        self._refused: dict[object, str | None] = {}

    def ladder(self) -> Ladder:
        levels = {block: tuple(self._levels(block)) for block in self._decisions}
        refusals = [sentence for sentence in self._refused.values() if sentence is not None]
        return Ladder(
            {b: each for b, each in levels.items() if each}, refusals[-1] if refusals else ""
        )

    def _levels(self, block: str) -> Iterator[Level]:
        """Yields the levels of ``block``, each with more bits than the one before."""
        now: dict[str, Scheme | None] = {
            name: self._assigned[name] for d in self._decisions[block] for name in d.linears
        }
        for bits in (4, 8):
            for place in range(len(_WIDER_FLOAT_INPUTS) if bits == 8 else 1):
                wider = {**now, **self._raised(block, bits, place)}
                if wider != now and self._is_served(block, wider):
                    yield wider
                    now = wider
                    break
        floats = {n: s if n in self._bound else None for n, s in now.items()}
        if floats != now and self._is_served(block, floats):
            yield floats

    def _raised(self, block: str, bits: int, place: int) -> dict[str, Scheme]:
        """The linears of ``block`` with fewer than ``bits`` bits, in schemes with as many.

        Of the schemes that a linear may get, it gets the one at ``place``, or the last.
        """
        raised: dict[str, Scheme] = {}
        for decision in self._decisions[block]:
            own = [self._assigned[name] for name in decision.linears]
            if all(scheme.weights.bits >= bits for scheme in own):
                continue
            names = _FOUR_BITS if bits == 4 else wider_schemes(own[0].activations)
            sized = (_of(name, own[0], self._fitting[decision]) for name in names)
            fitting = [scheme for scheme in sized if scheme is not None]
            if fitting:
                wider = fitting[min(place, len(fitting) - 1)]
                raised |= dict.fromkeys(decision.linears, wider)
        return raised

    def _is_served(self, block: str, level: Level) -> bool:
        """Whether the exporter takes ``block`` at ``level`` beside all others as they are.

        Blocks that are alike are asked for once.
        """
        view = self._view
        kind = tuple(
            (relative_name(block, name), view.linears[name], self._assigned[name], scheme)
            for name, scheme in level.items()
        )
        if kind not in self._refused:
            mixed = {n: s for n, s in {**self._assigned, **level}.items() if s is not None}
            self._refused[kind] = self._exporter.refuses(view, mixed) if mixed else "nothing"
        return self._refused[kind] is None


def wider_schemes(inputs: QuantArgs | None) -> tuple[str, ...]:
    """Returns the names of schemes of 8 bits that may take the place of one with these ``inputs``.

    The first changes least.
    """
    if inputs is None:
        return _WIDER_FLOAT_INPUTS
    return _WIDER_FP8_INPUTS if inputs.is_float else _WIDER_INT8_INPUTS


def _of(name: str, own: Scheme, fitting: Sequence[Scheme | None]) -> Scheme | None:
    """The scheme ``name`` among ``fitting``, if it can be with groups as in ``own``."""
    sizes = [scheme for scheme in fitting if scheme is not None and scheme.name == name]
    alike = [s for s in sizes if s.weights.group_size == own.weights.group_size]
    return next(iter([*alike, *sizes]), None)
