"""The tensors by which the towers of a model, for pictures and sound, write the residual stream.

``ModelView.towers`` says what they are: from the table ``known_towers``, or from a plugin. What a
plugin says is held to a small copy of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from qplug.api import Stream, StreamAxis, TensorSpec, Towers
from qplug.checkpoint.names import is_within, split_name
from qplug.errors import QplugError
from qplug.model.beside_text import beside_text
from qplug.model.input_groups import is_norm
from qplug.model.small_copy import SmallCopy

#: The axis along which modules write what they return, in their weight.
_WRITTEN = {nn.Linear: 0, nn.Embedding: 1}


def unknown_parts(parts: Sequence[str], towers: Sequence[Towers]) -> tuple[str, ...]:
    """The ``parts``, names in memory, of which ``towers`` say nothing."""
    known = {part for row in towers for part in row.parts}
    return tuple(part for part in parts if split_name(part)[1] not in known)


def tower_faults(towers: Sequence[Towers], copy: SmallCopy) -> Iterator[str]:
    """Yields what does not hold of ``towers`` in ``copy``, a small copy of the model.

    Each of their parts is one that text does not pass, each pattern has parameters in them, and
    these are weights and biases that can be rotated.
    """
    silent = beside_text(copy)
    names = dict.fromkeys(split_name(part)[1] for part in silent)
    parameters = dict(copy.model.named_parameters())
    for row in towers:
        for part in row.parts:
            if part not in names:
                beside = ", ".join(names) or "none"
                yield f"{part} is no part that text passes by; such parts are: {beside}"
        inside = [part for part in silent if split_name(part)[1] in row.parts]
        writers = {pattern: _matching(pattern, parameters) for pattern in row.writers}
        written = {name for found in writers.values() for name in found}
        for pattern, found in writers.items():
            if not found:
                yield f"no parameter matches {pattern}"
            for name in found:
                if not any(name == part or is_within(part, name) for part in inside):
                    yield f"{pattern} matches {name}, which is in none of {', '.join(row.parts)}"
                yield from _faults_of(name, row.axis, copy.model, written)


def _faults_of(name: str, axis: int, model: nn.Module, written: set[str]) -> Iterator[str]:
    """Yields why the parameter ``name`` does not write along ``axis``, as do those ``written``."""
    path, local = split_name(name)
    module, shape = model.get_submodule(path), model.get_parameter(name).shape
    if is_norm(module):
        yield f"{name} belongs to a norm, which cannot be rotated"
    if len(shape) > 1 and not 0 <= axis < len(shape):
        yield f"{name} is {list(shape)} in a small copy, and has no axis {axis}"
    for kind, right in _WRITTEN.items():
        if isinstance(module, kind) and local == "weight" and axis != right:
            yield f"{name} writes along axis {right}, not {axis}, in {kind.__name__}"
    bias = f"{path}.bias"
    has_bias = local == "weight" and getattr(module, "bias", None) is not None
    if has_bias and bias not in written:
        yield f"{bias} is added to what {name} writes, so it must be a writer, too"


def with_towers(
    stream: Stream, towers: Iterable[Towers], copy: SmallCopy, tensors: Mapping[str, TensorSpec]
) -> Stream:
    """``stream`` with what ``towers`` write of the ``tensors`` of a model.

    ``copy`` tells the names on disk, and has all of the model's towers. Raises QplugError if a
    tensor has another shape than ``towers`` say, or if the checkpoint lacks it.
    """
    found = dict(stream.tensors)
    parameters = dict(copy.model.named_parameters())
    axes = {
        name: row.axis
        for row in towers
        for pattern in row.writers
        for name in _matching(pattern, parameters)
    }
    for parameter, axis in sorted(axes.items()):
        axis_in_memory = axis if parameters[parameter].ndim > 1 else 0
        for name, axis_on_disk in copy.on_disk(parameter, axis_in_memory):
            spec = tensors.get(name)
            if spec is None or spec.shape[axis_on_disk] != stream.width:
                shape = "missing" if spec is None else list(spec.shape)
                raise QplugError(
                    f"{name}: is {shape}; it writes the residual stream, so its axis "
                    f"{axis_on_disk} should be {stream.width}"
                )
            found[name] = StreamAxis(axis_on_disk, None)
    return replace(stream, tensors=found)


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The ``names`` that match ``pattern``: ``*`` is anything, ``#`` the last number of a list."""
    parts = {"*": ".*", "#": r"(\d+)"}
    wanted = re.compile("".join(parts.get(mark) or re.escape(mark) for mark in pattern))
    found = {name: match for name in names if (match := wanted.fullmatch(name))}
    if "#" not in pattern:
        return list(found)
    last: dict[str, int] = {}
    for name, match in found.items():
        before = name[: match.start(1)]
        last[before] = max(int(match[1]), last.get(before, 0))
    return [n for n, match in found.items() if int(match[1]) == last[n[: match.start(1)]]]
