"""Reads ``qplug.json``, the record of a run in the folder that it wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qplug.api.events import RaisedBlock
from qplug.api.scheme import QuantArgs, Scheme
from qplug.calibration.ranges import InputRange
from qplug.errors import QplugError
from qplug.files.json_text import read_json
from qplug.files.typed import Typed
from qplug.output.origins import identity
from qplug.recipe.recipe import Recipe

T = TypeVar("T")

MANIFEST = "qplug.json"

#: The key of the blocks that ``--on-stop raise`` raised, and of the recipe that was asked for.
RAISED = "raised"

#: The version of the format of ``qplug.json``. Older files have no version, but the same format.
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The contents of the ``qplug.json`` of a folder.

    ``recipe`` is a ``Recipe.to_dict``. By name of the linear: ``schemes``, ``errors``, ``losses``,
    ``inputs`` (the range of its inputs in the float model, and in the quantized model) and
    ``clips``. The last three exist only for linears that calibration data measured. ``rewritten``
    names tensors that an algorithm rewrote, ``online`` linears whose inputs must be rotated as the
    model runs. ``kept_float`` says of linears that no kernel takes why they are float.
    ``experts`` are the numbers of tokens in the statistics of each expert, by layer. ``identity``
    is the name under which ``origins`` notes where the float model is. ``choice`` says what
    ``--scheme auto`` chose, as plain values of ``qplug.api.events.Choice``, and in ``asked`` the
    recipe that asked for it; it is empty for other schemes. ``raised`` are the blocks that
    ``--on-stop raise`` gave more bits; ``asked`` is the recipe without them, empty if there are
    none.
    """

    model: str
    backend: str
    algorithms: tuple[str, ...]
    versions: Mapping[str, str]
    schemes: Mapping[str, Scheme]
    errors: Mapping[str, float]
    rewritten: frozenset[str]
    kv_cache: QuantArgs | None
    online: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, tuple[InputRange, InputRange]] = field(default_factory=dict)
    clips: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kept_float: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    identity: str = ""
    choice: Mapping[str, Any] = field(default_factory=dict)
    raised: tuple[RaisedBlock, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of ``folder``; None if qplug did not write the folder.

    Raises QplugError if the file exists but is damaged, or if another version of qplug wrote it.
    """
    if not os.path.lexists(folder / MANIFEST):
        return None
    record = Typed(str(folder / MANIFEST), read_json(folder / MANIFEST, within=folder))
    if (version := record.get("version")) is not None and version.value != VERSION:
        raise QplugError(
            f"{folder / MANIFEST}: has format {ascii(version.value)[:40]}, but this qplug reads "
            f"{VERSION}; install the qplug that wrote the folder"
        )
    schemes = [_read(Scheme.from_dict, scheme) for scheme in record.need("schemes").items()]
    layers = record.need("layers").mapping()
    recipe = record.need("recipe")
    cache, online = recipe.get("kv_cache"), record.get("online")
    kept, experts = record.get("kept_float"), record.get("experts")
    choice, raised = record.get("choice"), record.get(RAISED)
    _read(Recipe.from_dict, recipe)
    losses = {name: layer.get("loss") for name, layer in layers.items()}
    inputs = {name: layer.get("inputs") for name, layer in layers.items()}
    clips = {name: layer.get("clips") for name, layer in layers.items()}
    return Manifest(
        model=record.need("model").text(),
        backend=recipe.need("backend").text(),
        algorithms=recipe.need("algorithms").texts(),
        versions={name: v.text() for name, v in record.need("versions").mapping().items()},
        schemes={
            n: schemes[layer.need("scheme").whole(0, len(schemes) - 1)]
            for n, layer in layers.items()
        },
        errors={name: layer.need("error").number() for name, layer in layers.items()},
        rewritten=frozenset(record.need("rewritten").texts()),
        kv_cache=None if cache is None else _read(QuantArgs.from_dict, cache),
        online=() if online is None else online.texts(),
        recipe=recipe.value,
        losses={name: loss.number() for name, loss in losses.items() if loss is not None},
        inputs={
            name: (_range(both.need("before")), _range(both.need("after")))
            for name, both in inputs.items()
            if both is not None
        },
        clips={
            name: tuple(count.whole(0, 1 << 62) for count in counts.items())
            for name, counts in clips.items()
            if counts is not None
        },
        notes=record.need("notes").texts(),
        experts={
            name: tuple(count.whole(0, 1 << 62) for count in counts.items())
            for name, counts in (experts.mapping() if experts else {}).items()
        },
        identity=identity(record.value),
        choice={} if choice is None else _plain_mapping(choice),
        raised=() if raised is None else tuple(map(read_raised, raised.need("blocks").items())),
        asked={} if raised is None else _plain_mapping(raised.need("asked")),
        kept_float={} if kept is None else {n: why.text() for n, why in kept.mapping().items()},
    )


def _read(from_dict: Callable[[dict[str, Any]], T], plain: Typed) -> T:
    """The object that ``from_dict`` makes of ``plain``; names the place of what does not fit."""
    plain.mapping()
    try:
        return from_dict(plain.value)
    except (QplugError, KeyError, TypeError, ValueError) as error:
        reason = f"lacks or does not know {error}" if isinstance(error, KeyError) else error
        raise QplugError(f"{plain.where}: is damaged: {reason}") from error


def _plain_mapping(plain: Typed) -> dict[str, Any]:
    """Returns a mapping as JSON has it."""
    return {name: value.value for name, value in plain.mapping().items()}


def read_raised(plain: Typed) -> RaisedBlock:
    """Returns the block of which ``plain`` is the ``asdict``. Raises QplugError if it is not."""
    schemes, distances = plain.need("schemes").texts(), [*plain.need("distances").items()]
    if not 2 <= len(schemes) == len(distances):
        raise QplugError(f"{plain.where}: must have a distance for each of two schemes or more")
    return RaisedBlock(
        plain.need("name").text(),
        schemes,
        tuple(None if each.value is None else each.number() for each in distances),
        plain.need("limit").number(),
    )


def _range(plain: Typed) -> InputRange:
    numbers = [number.number() for number in plain.items()]
    if len(numbers) != 3:
        raise QplugError(f"{plain.where}: must be three numbers")
    return InputRange.from_list(numbers)
