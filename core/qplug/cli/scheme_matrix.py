"""The matrix of ``qplug schemes``: a row for each scheme, a column for each backend and device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qplug.api import Capability
from qplug.api.gpus import DEVICES, GENERATIONS
from qplug.api.scheme import PRESETS
from qplug.cli.printing import Piece, say, say_pieces

#: The widest line.
WIDTH = 100

#: What a cell shows, its colour, and what it means.
YES, EMULATED, NO, UNKNOWN = "Y", "e", "-", " "
_COLOURS = {YES: "green", EMULATED: "yellow", NO: "red"}
_LEGEND = (
    (YES, "an engine serves it"),
    (EMULATED, "it loads, but inputs are not rounded: memory is saved, no arithmetic"),
    (NO, "no engine serves it"),
    (UNKNOWN, "not known"),
)

_NAME = max(map(len, PRESETS))
_SHORT = {device: GENERATIONS.get(device, device)[:2] for device in DEVICES} | {"cpu": "CPU"}
_CELLS = " ".join(f"{_SHORT[device]:<2}" for device in DEVICES)
_GAP = "  "


def print_matrix(tables: Mapping[str, Sequence[Capability]]) -> None:
    """Prints what ``tables``, rows of kernels by backend, serve; then a legend.

    Backends without rows are left out. Backends that do not fit beside the others follow below.
    """
    names = [name for name, rows in tables.items() if rows]
    fitting = (WIDTH - _NAME) // len(_GAP + _CELLS)
    for start in range(0, len(names), fitting):
        part = names[start : start + fitting]
        heads = [f"{name:<{len(_CELLS)}}" for name in part]
        say(_GAP.join([" " * _NAME, *heads]).rstrip())
        say(_GAP.join([" " * _NAME, *[_CELLS] * len(part)]).rstrip())
        for scheme in PRESETS:
            pieces = [Piece(f"{scheme:<{_NAME}}", "bold")]
            for name in part:
                cells = [cell(tables[name], scheme, device) for device in DEVICES]
                pieces.append(Piece(_GAP))
                for found in cells:  # each is as wide as "CPU", or "Am" and a space
                    pieces += [Piece(found, _COLOURS.get(found, "")), Piece("  ")]
            say_pieces(pieces)
        say("")
    for sign, meaning in _LEGEND:
        name = "blank" if sign == UNKNOWN else sign
        say_pieces([Piece(f"{name:<5}", _COLOURS.get(sign, "")), Piece(f"  {meaning}")])
    devices = ", ".join(f"{_SHORT[d]} {GENERATIONS[d]} ({d})" for d in DEVICES if d != "cpu")
    say(devices)


def cell(rows: Sequence[Capability], scheme: str, device: str) -> str:
    """Returns the sign for ``scheme`` on ``device``: the best that one of ``rows`` says."""
    found = [row for row in rows if row.scheme == scheme and device in row.devices]
    if any(row.served and not row.emulated for row in found):
        return YES
    if any(row.served for row in found):
        return EMULATED
    return NO if found else UNKNOWN
