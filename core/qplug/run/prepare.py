"""The first stage of a run: algorithms rewrite the float model, and it is tried that they may."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from qplug.api import Algorithm, FloatModel, ModelView, Preparation, TensorSpec
from qplug.api.tensors import Checkpoint
from qplug.checkpoint.names import is_within, natural_order, relative_name, split_name
from qplug.checkpoint.rewritten import apply, rewritten
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.hollow import load_config
from qplug.model.residual_stream import StreamFinder
from qplug.model.small_copy import SmallCopy, place_of
from qplug.output.manifest import read_manifest
from qplug.run.stages import Stages

if TYPE_CHECKING:
    from torch import Tensor

#: What an algorithm learns on the model that a checkpoint is.
Learn = Callable[[Algorithm[Any], FloatModel, Checkpoint], "Mapping[str, Tensor]"]

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
    stages: Stages,
    source: Checkpoint,
    view: ModelView,
    session: Session,
    *,
    learn: Learn | None = None,
) -> Prepared:
    """What the algorithms of ``stages`` make of ``source``, one after the other.

    Tensors are made on the session's device as they are read. Without ``learn``, no weight is read
    yet, and each algorithm is tried on a small random copy of the model. Raises QplugError if the
    copy would compute anything else, or if the exporter cannot store what the algorithm asks for.
    With ``learn`` these checks have been made; algorithms that learn do so, names and shapes stay.
    """
    manifest = read_manifest(source.folder)
    prepared = Prepared(source, view, manifest.online if manifest else ())
    _check_online(prepared.online, stages)
    if not stages.preparing:
        return prepared
    if prepared.online:
        raise QplugError(
            f"{source.folder}: inputs of its linears are rotated as it runs, so "
            f"{stages.preparing[0].name} cannot rewrite it"
        )
    with _one_thread() if learn is None else nullcontext():
        return _prepare(stages, prepared, session, learn)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices of a small copy are done before other threads have woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    tied = bool(view.config.get("tie_word_embeddings", config.tie_word_embeddings))
    width = config.get_text_config().hidden_size
    for algorithm in stages.preparing:
        specs = {name: held.spec for name, held in prepared.checkpoint.tensors.items()}
        stream = finder.stream(specs, view.blocks, copy.kinds, width, tied=tied)
        model = FloatModel(prepared.view, specs, stream)
        if learn is not None and algorithm.learns_rewrite():
            model = replace(model, learned=learn(algorithm, model, prepared.checkpoint))
        made = stages.prepare(algorithm, model)
        if learn is None:
            _check_online(made.online, stages)
            _try_on(copy, finder, stages, algorithm, prepared.view, view.blocks, tied=tied)
        tied = bool(made.config.get("tie_word_embeddings", tied))
        checkpoint = rewritten(prepared.checkpoint, made, session.device)
        prepared = Prepared(
            checkpoint,
            _seen(checkpoint, prepared.view, made),
            prepared.online + made.online,
            prepared.notes + made.notes,
        )
    return prepared


def _check_online(online: Sequence[str], stages: Stages) -> None:
    engine = stages.exporter.engine
    if online and engine is not None and not engine.rotates_online:
        raise QplugError(
            f"{stages.exporter.name}: does not rotate the inputs of linears as the model runs, "
            f"as those of {online[0]} are to be; it can be measured with --backend fake"
        )


def _seen(checkpoint: Checkpoint, view: ModelView, made: Preparation) -> ModelView:
    """The skeleton of the rewritten checkpoint: a head that was tied is a linear of its own."""
    linears = dict(view.linears)
    for tensor in made.rewrites:
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
    """Try ``algorithm`` on ``copy`` of a model with ``view`` and ``blocks``."""
    small = copy.tensors()
    stream = finder.stream(_specs(small), copy.blocks, _each(copy), copy.width, tied=tied)
    view_of_small = _view_of(copy, view, _specs(small))
    tried = stages.prepare(algorithm, FloatModel(view_of_small, _specs(small), stream))
    # What is tied in the model is two tensors in the copy.
    small |= {head: small[words].clone() for head, words in stream.copies.items()}
    _try(algorithm.name, tried, small, copy, finder, blocks)


def _try(
    name: str,
    made: Preparation,
    tensors: Mapping[str, Tensor],
    copy: SmallCopy,
    finder: StreamFinder,
    blocks: Sequence[str],
) -> None:
    """Raises QplugError if ``copy`` computes other logits with ``tensors`` as ``made`` makes them.

    ``blocks`` are those of the real model.
    """
    copy.fill(tensors)
    before = copy.run()
    copy.fill(apply(made, tensors))
    after = copy.run(made.online)
    copy.fill(tensors)
    if _distance(before.logits, after.logits) <= _RTOL:
        return
    outside = [norm for norm in finder.unread if not norm.startswith(copy.blocks)]
    for kind, (one, other) in enumerate(zip(before.hidden, after.hidden, strict=True)):
        # The angles between tokens stay as they are in any basis.
        if not _distance(one @ one.T, other @ other.T) <= _RTOL:
            block = copy.blocks[kind]
            inside = [relative_name(block, n) for n in finder.unread if is_within(block, n)]
            norms = " and ".join(inside or outside)
            why = f": no linear reads what comes of {norms}" if norms else ""
            raise QplugError(f"{name}: {blocks[copy.first[kind]]}: cannot be turned{why}")
    raise QplugError(f"{name}: the head cannot be turned, or the norm before it")


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec("float32", tuple(value.shape)) for name, value in tensors.items()}


def _each(copy: SmallCopy) -> range:
    """The kinds of the blocks of ``copy``: all different."""
    return range(len(copy.blocks))


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
