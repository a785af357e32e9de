"""The first stage of a run: algorithms rewrite the float model, tested on a small copy first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qplug.api import (
    Algorithm,
    FloatModel,
    ModelView,
    Preparation,
    Stream,
    TensorSpec,
    Towers,
)
from qplug.api.tensors import Checkpoint
from qplug.checkpoint.names import is_within, natural_order, relative_name, split_name
from qplug.checkpoint.rewritten import apply, rewritten
from qplug.checkpoint.stacked import stacked_again
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.architectures import refuse_towers, with_other_weights
from qplug.model.beside_text import beside_text
from qplug.model.hollow import load_config
from qplug.model.residual_stream import StreamFinder
from qplug.model.small_copy import SmallCopy, place_of
from qplug.model.tower_writers import unknown_parts, with_towers
from qplug.numerics import one_thread
from qplug.output.manifest import read_manifest
from qplug.run.drafts import notes_on
from qplug.run.stages import Stages

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

#: A function that returns the tensors that an algorithm learns on the model of a checkpoint.
Learn = Callable[[Algorithm[Any], FloatModel, Checkpoint], "Mapping[str, Tensor]"]

#: The largest relative change of a small copy's logits by a rewrite, in float32.
_RTOL = 1e-4


@dataclass(frozen=True)
class Prepared:
    """A rewritten model: a checkpoint that computes rewritten tensors as they are read, its view.

    ``online`` are the names of the linears whose inputs must be rotated while the model runs.
    ``notes`` are messages of algorithms to the user.
    """

    checkpoint: Checkpoint
    view: ModelView
    online: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def prepare(
    stages: Stages,
    source: Checkpoint,
    view: ModelView,
    session: Session,
    *,
    learn: Learn | None = None,
) -> Prepared:
    """Returns ``source`` as the algorithms of ``stages`` rewrite it, one after the other.

    Rewritten tensors are computed on the session's device when they are read. Without ``learn`` no
    weight is read yet: each algorithm is tried on a small random copy of the model. Raises
    QplugError if the rewritten copy computes other logits, or if the exporter cannot store the
    rotations of the algorithm. With ``learn`` each algorithm that learns does so first. This does
    not change names and shapes, so that the checks of the call without ``learn`` are not repeated.
    """
    manifest = read_manifest(source.folder)
    near = stages.exporter.target.column.remark
    notes = (*filter(None, [near]), *notes_on(source, view, is_rewritten=bool(stages.preparing)))
    prepared = Prepared(source, view, manifest.online if manifest else (), notes)
    _check_online(prepared.online, stages)
    if not stages.preparing:
        return prepared
    if prepared.online:
        raise QplugError(
            f"{source.folder}: the inputs of its linears are rotated while the model runs, so "
            f"{stages.preparing[0].name} cannot rewrite it; use the original model"
        )
    # A small copy has small matrices, for which one thread is faster.
    with one_thread() if learn is None else nullcontext():
        return _prepare(stages, prepared, session, learn)


def _is_tied(plain: Mapping[str, Any], config: PreTrainedConfig) -> bool:
    """Returns whether the head is the embedding, by config.json and what transformers reads in it.

    A model of several parts may say it of the whole, of the part for text, or of both.
    """
    name = "tie_word_embeddings"
    whole = getattr(config, name, False)
    return bool(plain.get(name, getattr(config.get_text_config(), name, whole)))


def _prepare(
    stages: Stages,
    prepared: Prepared,
    session: Session,
    learn: Learn | None,
) -> Prepared:
    source, view = prepared.checkpoint, prepared.view
    trusted = session.trust_remote_code
    config = load_config(source.folder, trust_remote_code=trusted)
    copy = SmallCopy(config, source.folder, trusted)
    finder = StreamFinder(copy)
    if embedding := finder.embedding_apart:
        raise QplugError(
            f"{stages.preparing[0].name}: {embedding}: more than norms read what it writes, so the "
            "residual stream cannot be rotated; take an algorithm that leaves it as it is"
        )
    text = config.get_text_config()
    tied = _is_tied(view.config, config)
    width = text.hidden_size
    if learn is None:
        refuse_towers(source, session.registry, copy)
    for algorithm in stages.preparing:
        specs = {name: tensor.spec for name, tensor in prepared.checkpoint.tensors.items()}
        stream = finder.stream(specs, view.blocks, copy.kinds, width, tied=tied)
        stream = with_towers(stream, view.towers, copy, specs)
        model = FloatModel(prepared.view, specs, stream)
        if learn is not None and algorithm.learns_rewrite():
            model = replace(model, learned=learn(algorithm, model, prepared.checkpoint))
        preparation = stages.prepare(algorithm, model)
        if learn is None:
            _check_online(preparation.online, stages)
            _try_on(copy, finder, stages, algorithm, prepared.view, view.blocks, tied=tied)
            _refuse_other_writers(algorithm.name, copy, view.towers, preparation, stream)
        tied = bool(preparation.config.get("tie_word_embeddings", tied))
        checkpoint = rewritten(prepared.checkpoint, preparation, session.device)
        prepared = Prepared(
            checkpoint,
            _rewritten_view(checkpoint, prepared.view, preparation),
            prepared.online + preparation.online,
            prepared.notes + preparation.notes,
        )
    return prepared


def with_float_experts_stacked(prepared: Prepared, quantized: Collection[str]) -> Prepared:
    """Returns ``prepared`` with experts that are not ``quantized`` stacked as they are published.

    ``quantized``: names of linears.
    """
    checkpoint = stacked_again(prepared.checkpoint, quantized)
    if checkpoint.tensors.keys() == prepared.checkpoint.tensors.keys():
        return prepared
    view = prepared.view
    stay = {n: shape for n, shape in view.linears.items() if f"{n}.weight" in checkpoint.tensors}
    view = replace(view, linears=stay, quantizable=view.quantizable & stay.keys())
    return replace(prepared, checkpoint=checkpoint, view=with_other_weights(view, checkpoint))


def _check_online(online: Sequence[str], stages: Stages) -> None:
    """Raises QplugError if inputs must be rotated online and the engine does not support it."""
    if not online:
        return
    engine = stages.exporter.engine
    if engine is not None and not engine.rotates_online:
        raise QplugError(
            f"{stages.exporter.name}: does not rotate inputs of linears while the model runs, "
            f"which {online[0]} needs; measure such a model with --backend fake"
        )


def _rewritten_view(checkpoint: Checkpoint, view: ModelView, preparation: Preparation) -> ModelView:
    """Returns the view of the rewritten checkpoint, in which a head that was tied is a linear."""
    linears = dict(view.linears)
    for tensor in preparation.rewrites:
        name, local = split_name(tensor)
        shape = checkpoint.tensors[tensor].spec.shape
        if local == "weight" and name == view.head and len(shape) == 2:
            linears[name] = (shape[0], shape[1])
    ordered = {name: linears[name] for name in natural_order(linears)}
    return replace(view, config=checkpoint.config, linears=ordered)


def _try_on(
    copy: SmallCopy,
    finder: StreamFinder,
    stages: Stages,
    algorithm: Algorithm[Any],
    view: ModelView,
    blocks: Sequence[str],
    *,
    tied: bool,
) -> None:
    """Tries ``algorithm`` on ``copy``, a small copy of a model with ``view`` and ``blocks``."""
    small = copy.tensors()
    stream = finder.stream(_specs(small), copy.stored_blocks, _each(copy), copy.width, tied=tied)
    view_of_small = _view_of(copy, view, _specs(small))
    preparation = stages.prepare(algorithm, FloatModel(view_of_small, _specs(small), stream))
    # Tensors that are tied in the model are separate in the copy.
    small |= {head: small[embedding].clone() for head, embedding in stream.copies.items()}
    _check_logits(algorithm.name, preparation, small, copy, finder, blocks)


def _refuse_other_writers(
    name: str,
    copy: SmallCopy,
    towers: Sequence[Towers],
    preparation: Preparation,
    stream: Stream,
) -> None:
    """Raises QplugError if the stream is rewritten, and it is not known what parts write it too.

    Pictures and sounds enter the stream in the place of embeddings. ``towers``: what is known.
    """
    writers = {tensor for tensor, axis in stream.tensors.items() if axis.norm is None}
    if writers.isdisjoint(preparation.rewrites):
        return
    if others := unknown_parts(beside_text(copy), towers):
        verb = "write" if len(others) > 1 else "writes"
        raise QplugError(
            f"{name}: {' and '.join(others[:3])} {verb} what the decoder reads, too, and cannot be "
            "rotated with it; take an algorithm that leaves the residual stream as it is"
        )


def _check_logits(
    name: str,
    preparation: Preparation,
    tensors: Mapping[str, Tensor],
    copy: SmallCopy,
    finder: StreamFinder,
    blocks: Sequence[str],
) -> None:
    """Raises QplugError if ``copy`` computes other logits with its ``tensors`` rewritten.

    The error names the first block, of the ``blocks`` of the real model, that computes something
    else, and its norms that no linear reads. ``name`` is the algorithm's.
    """
    copy.fill(tensors)
    before = copy.run()
    copy.fill(apply(preparation, tensors))
    after = copy.run(preparation.online)
    copy.fill(tensors)
    if _distance(before.logits, after.logits) <= _RTOL:
        return
    outside = [norm for norm in finder.unread if not norm.startswith(copy.blocks)]
    for kind, (old, new) in enumerate(zip(before.hidden, after.hidden, strict=True)):
        # Inner products of tokens do not change under a rotation.
        if not _distance(old @ old.T, new @ new.T) <= _RTOL:
            block = copy.blocks[kind]
            inside = [relative_name(block, n) for n in finder.unread if is_within(block, n)]
            norms = " and ".join(inside or outside)
            why = (
                f"no linear reads the output of {norms}" if norms else "it computes otherwise then"
            )
            raise QplugError(
                f"{name}: {blocks[copy.first[kind]]}: cannot be rotated: {why}; take an algorithm "
                "that leaves the residual stream as it is"
            )
    raise QplugError(f"{name}: the head, or the norm before it, cannot be rotated")


def _distance(old: Tensor, new: Tensor) -> float:
    """Returns ``||new - old|| / ||old||``."""
    return float((old - new).norm() / old.norm())


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec("float32", tuple(value.shape)) for name, value in tensors.items()}


def _each(copy: SmallCopy) -> range:
    """Returns the kinds of the blocks of ``copy``, which are all different."""
    return range(len(copy.blocks))


def _view_of(copy: SmallCopy, view: ModelView, specs: dict[str, TensorSpec]) -> ModelView:
    """Returns ``view`` with the names and shapes of the small copy."""
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
        blocks=copy.stored_blocks,
    )
