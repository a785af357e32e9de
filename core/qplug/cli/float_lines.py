"""The lines about weights that stay float, as ``quantize`` and ``verify`` print them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qplug.checkpoint.names import kind_of

_SHOWN = 4


def float_lines(share: float, kinds: Mapping[str, float]) -> Iterator[str]:
    """Yields a line on the share of the weights in decoder blocks that is float; none for zero.

    ``kinds`` are the parts of ``share``, by name of the weights with a star for each number.
    """
    if not kinds:
        return
    largest = sorted(kinds, key=lambda kind: (-kinds[kind], kind))
    parts = [f"{kind} {_percent(kinds[kind])}" for kind in largest[:_SHOWN]]
    more = f", and {len(largest) - _SHOWN} more" if len(largest) > _SHOWN else ""
    yield f"float: {_percent(share)} of the weights in decoder blocks: {', '.join(parts)}{more}"


def kept_float_lines(kept: Mapping[str, str]) -> Iterator[str]:
    """Yields a line for each kind of linears that no kernel takes: name, number, and why.

    ``kept`` says why, by name of the linear.
    """
    kinds: dict[str, list[str]] = {}
    for name, sentence in kept.items():
        kinds.setdefault(kind_of(f"{name}.").removesuffix("."), []).append(sentence)
    for kind, reasons in kinds.items():
        count = "1 linear" if len(reasons) == 1 else f"{len(reasons)} linears"
        yield f"kept float: {kind} ({count}): {reasons[0]}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"
