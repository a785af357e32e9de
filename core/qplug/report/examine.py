"""Reads a quantized folder tensor by tensor and compares it with its float model, if there is one.

The result is plain data (``findings``), which a page shows.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qplug.api.groups import dequantize
from qplug.api.tensors import Checkpoint
from qplug.checkpoint.locate import as_word
from qplug.checkpoint.names import block_of, kind_of, module_of, relative_name, split_name
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.reading.folder import Folder, open_folder
from qplug.reading.verify import find_source, float_weight, relative_distance
from qplug.registry.registry import Registry
from qplug.registry.suggestions import better_algorithm
from qplug.report.findings import BINS_PER_OCTAVE, Bytes, Findings, Layer, Overview, Span
from qplug.report.remedies import more_bits
from qplug.report.worst import standing_out


def overview(folder: Folder, name: str) -> Overview:
    """Returns the facts about ``folder`` in its headers and its qplug.json; reads no weight.

    ``name`` is the folder as the user wrote it.
    """
    view, manifest, schemes = folder.view, folder.manifest, folder.schemes
    matrices = {n: prod(shape) for n, shape in view.linears.items()}
    tensors = folder.checkpoint.tensors
    rest = sum(prod(t.spec.shape) for n, t in tensors.items() if module_of(n) not in matrices)
    engine = folder.exporter.engine if folder.exporter else None
    serve = engine.serve_command if engine else None
    return Overview(
        folder=name,
        model=manifest.model if manifest else None,
        architecture=str((view.config.get("architectures") or ["unknown"])[0]),
        backend=folder.exporter.name if folder.exporter else None,
        schemes=Counter(scheme.name for scheme in schemes.values()),
        recipe=manifest.recipe if manifest else {},
        versions=manifest.versions if manifest else {},
        notes=(*(block.sentence for block in manifest.raised), *manifest.notes) if manifest else (),
        bytes=_bytes(folder.checkpoint, matrices, schemes),
        weights=sum(matrices[n] for n in schemes),
        linear_weights=sum(matrices.values()),
        parameters=sum(matrices.values()) + rest,
        errors=manifest.errors if manifest else {},
        losses=manifest.losses if manifest else {},
        experts=manifest.experts if manifest else {},
        serve=serve.format(shlex.quote(_served(name))) if serve else None,
        identity=manifest.identity if manifest else "",
        places={linear: _place(linear, view.blocks) for linear in schemes},
    )


def _served(name: str) -> str:
    """Returns the folder ``name`` as a word that is right in every folder."""
    return str(Path(name).resolve()) if os.path.lexists(name) else as_word(name)


def examine(
    name: str,
    registry: Registry,
    *,
    against: str | None = None,
    trust_remote_code: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> Findings:
    """Returns the findings on the folder ``name``, after reading all its quantized weights.

    Weights are read one at a time. ``against`` is the float model to compare with; by default the
    model that qplug.json names, if it can be found. ``watch`` is called after each weight with the
    numbers of weights read and of all. Raises QplugError if the folder cannot be opened, or if it
    is a float model that qplug did not write.
    """
    session = Session.alone(registry=registry, trust_remote_code=trust_remote_code)
    folder = open_folder(name, session)
    if folder.exporter is None:
        raise QplugError(f"{name}: is not quantized; there is nothing to report")
    summary = overview(folder, name)
    source_name, source = find_source(folder, against, session)
    layers: list[Layer] = []
    scales: Counter[int] = Counter()
    for done, linear in enumerate(folder.schemes, start=1):
        layer, counts = _examined(folder, linear, source)
        layers.append(layer)
        scales.update(counts)
        if watch is not None:
            watch(done, len(folder.schemes))
    return Findings(
        overview=summary,
        layers=tuple(layers),
        scales=dict(sorted(scales.items())),
        against=source_name,
        float_bytes=_bytes(source, folder.view.linears, folder.schemes) if source else None,
        calibrated=bool(summary.losses),
        options=more_bits(folder, [layer.name for layer in standing_out(layers)]),
        algorithm=_better_algorithm(folder, session.registry),
    )


def _better_algorithm(folder: Folder, registry: Registry) -> str | None:
    """Returns algorithms that lose less than those of the run, with the scheme of most linears."""
    if folder.manifest is None or not folder.schemes:
        return None
    ((scheme, _),) = Counter(folder.schemes.values()).most_common(1)
    return better_algorithm("+".join(folder.manifest.algorithms), scheme, registry)


def _bytes(
    checkpoint: Checkpoint, linears: Mapping[str, object], schemes: Mapping[str, object]
) -> Bytes:
    """Returns the bytes of quantized linears, other linears, and other tensors such as biases."""
    sums = [0, 0, 0]
    for tensor, stored in checkpoint.tensors.items():
        category = 0 if _is_of(tensor, schemes) else 1 if _is_of(tensor, linears) else 2
        sums[category] += stored.nbytes
    return Bytes(*sums)


def _is_of(tensor: str, linears: Mapping[str, object]) -> bool:
    """Returns whether a tensor belongs to the weight of a linear in ``linears``."""
    name, local = split_name(tensor)
    return name in linears and local != "bias"


def _examined(
    folder: Folder, name: str, source: Checkpoint | None
) -> tuple[Layer, Mapping[int, int]]:
    """Returns the findings on the linear ``name``, and its scales counted by size."""
    scheme, manifest = folder.schemes[name], folder.manifest
    assert folder.exporter is not None
    stored_as, packed = folder.exporter.format, folder.packed(name)
    with folder.unpacking(name):
        codes = stored_as.unpack(packed, scheme) if stored_as.is_lossless else None
        weight = stored_as.dequantize(packed, scheme) if codes is None else dequantize(codes)
    rewritten = manifest is not None and f"{name}.weight" in manifest.rewritten
    has_float = source is not None and (not rewritten or f"{name}.weight" in source.tensors)
    original = float_weight(source, name, weight.shape) if source and has_float else None
    block, kind = _place(name, folder.view.blocks)
    layer = Layer(
        name=name,
        block=block,
        kind=kind,
        shape=folder.view.linears[name],
        scheme=scheme.name,
        rewritten=rewritten,
        error=manifest.errors.get(name) if manifest else None,
        recomputed=(None if original is None or rewritten else relative_distance(weight, original)),
        loss=manifest.losses.get(name) if manifest else None,
        weights=(None if original is None else _span(original), _span(weight)),
        inputs=manifest.inputs.get(name) if manifest else None,
        clips=manifest.clips.get(name, ()) if manifest else (),
        scales=None if codes is None else _span(codes.scale),
        scale_count=0 if codes is None else codes.scale.numel(),
    )
    return layer, {} if codes is None else _counted(codes.scale)


def _place(name: str, blocks: tuple[str, ...]) -> tuple[int | None, str]:
    """Returns the number of a linear's block, None outside the blocks, and the linear's kind.

    The kind is the name within the block, with ``*`` in place of numbers.
    """
    number = block_of(name, blocks)
    return number, name if number is None else kind_of(relative_name(blocks[number], name))


def _span(values: Tensor) -> Span:
    low, high = torch.aminmax(values)
    return Span(low.item(), high.item())


def _counted(scale: Tensor) -> dict[int, int]:
    """Returns the number of scales by ``floor(log2(scale) * BINS_PER_OCTAVE)``."""
    bins = (scale.double().log2() * BINS_PER_OCTAVE).floor().long()
    numbers, counts = bins.unique(return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))
