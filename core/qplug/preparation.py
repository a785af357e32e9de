"""The first stage of a run: algorithms rewrite the float model, and it is tried that they may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qplug.api import Algorithm, Exporter, FloatModel, ModelView, Preparation, TensorSpec
from qplug.checkpoint import Checkpoint
from qplug.errors import QplugError
from qplug.rewriting import apply, rewritten
from qplug.skeleton import load_config, natural_order
from qplug.small_copy import SmallCopy, place_of
from qplug.stream import Faces

#: How far the logits of a rewritten copy may be from what they were, in float32.
_RTOL = 1e-4


@dataclass(frozen=True)
class Prepared:
    """A model as algorithms rewrote it: a checkpoint to read from, and its skeleton.

    ``online`` are the linears whose inputs are to be rotated as it runs.
    """

    checkpoint: Checkpoint
    view: ModelView
    online: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def prepare(
    algorithms: Sequence[Algorithm[Any]],
    source: Checkpoint,
    view: ModelView,
    exporter: Exporter[Any],
    *,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Prepared:
    """What ``algorithms`` make of ``source``, one after the other. No weight is read.

    Tensors are made on ``device`` as they are read.

    Each is tried on a small random copy first. Raises QplugError if that would compute anything
    else, or if ``exporter`` cannot tell an engine to do what they ask for.
    """
    prepared = Prepared(source, view)
    if not algorithms:
        return prepared
    config = load_config(source.folder, trust_remote_code=trust_remote_code)
    copy = SmallCopy(config, source.folder, trust_remote_code)
    faces = Faces(copy)
    tied = bool(view.config.get("tie_word_embeddings", config.tie_word_embeddings))
    width = config.get_text_config().hidden_size
    for algorithm in algorithms:
        specs = {name: held.spec for name, held in prepared.checkpoint.tensors.items()}
        stream = faces.stream(specs, view.blocks, copy.kinds, width, tied=tied)
        made = algorithm.prepare(FloatModel(prepared.view, specs, stream))
        _refuse_offline(algorithm, made, exporter)
        _try(algorithm, copy, faces, prepared.view, tied=tied)
        tied = bool(made.config.get("tie_word_embeddings", tied))
        checkpoint = rewritten(prepared.checkpoint, made, device)
        prepared = Prepared(
            checkpoint,
            _seen(checkpoint, prepared.view, made),
            prepared.online + made.online,
            prepared.notes + made.notes,
        )
    return prepared


def _seen(checkpoint: Checkpoint, view: ModelView, made: Preparation) -> ModelView:
    """The skeleton of the rewritten checkpoint: a head that was tied is a linear of its own."""
    linears = dict(view.linears)
    for tensor in made.rewrites:
        name, _, local = tensor.rpartition(".")
        shape = checkpoint.tensors[tensor].spec.shape
        if local == "weight" and name == view.head and len(shape) == 2:
            linears[name] = (shape[0], shape[1])
    ordered = {name: linears[name] for name in natural_order(linears)}
    return replace(view, config=checkpoint.config, linears=ordered)


def _refuse_offline(
    algorithm: Algorithm[Any], made: Preparation, exporter: Exporter[Any]
) -> None:
    if made.online and not exporter.rotates_online:
        raise QplugError(
            f"{exporter.name}: does not rotate the inputs of linears as the model runs, which "
            f"{algorithm.name} is asked for; that can be measured with --backend fake"
        )


def _try(
    algorithm: Algorithm[Any], copy: SmallCopy, faces: Faces, view: ModelView, *, tied: bool
) -> None:
    """Raises QplugError if the rewritten copy computes other logits."""
    tensors = copy.tensors()
    specs = {n: TensorSpec("float32", tuple(value.shape)) for n, value in tensors.items()}
    stream = faces.stream(specs, copy.blocks, range(len(copy.blocks)), copy.width, tied=tied)
    tensors |= {head: tensors[words].clone() for head, words in stream.copies.items()}
    made = algorithm.prepare(FloatModel(_view_of(copy, view, specs), specs, stream))
    copy.fill(tensors)
    before = copy.run()
    copy.fill(apply(made, tensors))
    after = copy.run(made.online)
    copy.fill(tensors)
    if _distance(before.logits, after.logits) <= _RTOL:
        return
    for kind, (one, other) in enumerate(zip(before.hidden, after.hidden, strict=True)):
        # The angles between tokens stay as they are in any basis.
        if not _distance(one @ one.T, other @ other.T) <= _RTOL:
            block, inner = view.blocks[copy.first[kind]], copy.blocks[kind]
            norms = [n.removeprefix(f"{inner}.") for n in faces.unread if n.startswith(inner)]
            why = f": no linear reads what {norms[0]} gives" if norms else ""
            raise QplugError(f"{algorithm.name}: {block}: cannot be turned{why}")
    raise QplugError(f"{algorithm.name}: the head cannot be turned, or the norm before it")


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())


def _view_of(copy: SmallCopy, view: ModelView, specs: dict[str, TensorSpec]) -> ModelView:
    """The skeleton of ``copy``, as far as it is that of ``view``."""
    kinds = copy.kinds
    quantizable = {place_of(f"{name}.weight", view.blocks, kinds) for name in view.quantizable}
    linears = {
        name.removesuffix(".weight"): (spec.shape[0], spec.shape[1])
        for name, spec in specs.items()
        if name.endswith(".weight") and len(spec.shape) == 2
    }
    return replace(
        view,
        dtype="float32",
        linears=linears,
        quantizable=frozenset(n for n in linears if copy.place(f"{n}.weight") in quantizable),
        blocks=copy.blocks,
    )
