"""The tensors that write or read the residual stream, found by trial on a small random copy.

No architecture is named here. Hide one direction ``u`` of the stream from the inputs of all norms:
a tensor writes into the stream if changing it along ``u`` then changes no logit. Hide ``u`` from
the output of one norm: a tensor reads that norm if changing it along ``u`` then changes no logit.
In both cases the change must have an effect while ``u`` is not hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qplug.api import Stream, StreamAxis, StreamNorm, TensorSpec, ValueHeads
from qplug.checkpoint.names import block_of, module_of, relative_name
from qplug.errors import QplugError
from qplug.model.hooks import hooked
from qplug.model.input_groups import Producer, find_groups, is_norm
from qplug.model.small_copy import Place, SmallCopy, place_of

#: The largest effect of a hidden change on the logits, relative to its effect when not hidden.
_RTOL = 1e-3


@dataclass(frozen=True)
class _Values:
    """The values of attention and the projection that reads them, by names of parameters in memory.

    ``rows`` tells which rows of ``values`` make heads: ``all``, as many as the projection is
    ``wide``, the ``rest`` behind two other parts, or every ``third`` run of ``size`` rows.
    """

    values: str
    output: str
    rows: str
    size: int


class StreamFinder:
    """Finds the tensors of ``copy`` that write or read the stream; ``stream`` describes them."""

    def __init__(self, copy: SmallCopy) -> None:
        """Raises QplugError if a norm is of an unknown kind."""
        self.copy = copy
        self._model: nn.Module = copy.model
        width = copy.width
        self._norms = {
            name: module
            for name, module in self._model.named_modules()
            if is_norm(module) and _width(module) == (width,)
        }
        hidden = torch.randn(width, generator=torch.Generator().manual_seed(1))
        self._hidden = hidden / hidden.norm()  # the unit vector u
        #: The norms that text passes.
        self._passed: set[str] = set()
        #: The axis of each parameter that faces the stream, and the norm that it reads.
        self._facing = dict(self._find())
        self.read = {norm for _, norm in self._facing.values() if norm is not None}
        self.offsets = {name: _offset(name, self._norms[name], width) for name in self.read}
        centred = {
            _centres(self._norms[name], self.offsets[name], width) for name in sorted(self.read)
        }
        if len(centred) > 1:
            raise QplugError(
                "some norms of this model subtract the mean, and some do not; it cannot be rotated"
            )
        self.centred = centred == {True}
        self.values = tuple(self._find_values())

    @property
    def unread(self) -> tuple[str, ...]:
        """Norms as wide as the stream that text passes, and whose output no linear reads."""
        return tuple(n for n in self._norms if n in self._passed and n not in self.read)

    @property
    def embedding_apart(self) -> str | None:
        """The embedding's weight in memory, if more than norms read what it writes, or None."""
        name, weight = self._embedding()
        apart = weight.shape[-1] == self.copy.width and name not in self._facing
        return name if apart and self.read else None

    # --- writers and readers ----------------------------------------------------------------------

    def _find(self) -> Iterator[tuple[str, tuple[int, str | None]]]:
        """Yields each parameter that faces the stream, with its axis and the norm that it reads."""
        of_norms = {
            f"{name}.{local}"
            for name, norm in self._norms.items()
            for local, _ in norm.named_parameters(recurse=False)
        }
        hidden: dict[str | None, Tensor] = {}
        for norm in (None, *self._norms):
            with self._hiding(norm):
                hidden[norm] = self._logits()
        plain = self._logits()
        self._passed = {
            norm for norm, logits in hidden.items() if norm and not torch.equal(logits, plain)
        }
        inner = self._inner_norms(plain, hidden[None])
        hidden = {norm: logits for norm, logits in hidden.items() if norm not in inner}
        for name, parameter in self._model.named_parameters():
            if name in of_norms:
                continue
            for axis in range(parameter.ndim - 1, max(parameter.ndim - 3, -1), -1):
                if parameter.shape[axis] != self.copy.width:
                    continue
                with self._changed(parameter, axis):
                    effect = (self._logits() - plain).norm()
                    norm = self._hidden_by(hidden, effect) if effect > 0 else _NEITHER
                if norm is not _NEITHER:
                    yield name, (axis, norm)
                    break

    def _inner_norms(self, plain: Tensor, hidden: Tensor) -> set[str]:
        """The norms that do not read the stream, such as those of latent or attended values.

        A change of the embedding reaches them through other norms alone. ``plain``, ``hidden``: the
        logits, and those with ``u`` hidden from all norms. None are told if a change of the
        embedding reaches more than norms, or a single norm, whose output is the stream.
        """
        _, embedding = self._embedding()
        if embedding.shape[-1] != self.copy.width:
            return set()
        with self._changed(embedding, embedding.ndim - 1):
            effect = (self._logits() - plain).norm()
            with self._hiding(None):
                if not (self._logits() - hidden).norm() <= _RTOL * effect:
                    return set()
        inner = set()
        for norm in self._norms:
            others = [name for name in self._norms if name != norm]
            with self._hiding_from(others):
                without = self._logits()
                with self._changed(embedding, embedding.ndim - 1):
                    if (self._logits() - without).norm() <= _RTOL * effect:
                        inner.add(norm)
        return inner if len(self._passed - inner) > 1 else set()

    def _embedding(self) -> tuple[str, nn.Parameter]:
        """The name in memory of the embedding's weight, and the weight."""
        model: Any = self._model
        weight: nn.Parameter = model.get_input_embeddings().weight
        return next(n for n, p in model.named_parameters() if p is weight), weight

    def _hidden_by(self, hidden: Mapping[str | None, Tensor], effect: Tensor) -> Any:
        """The norm that must hide ``u`` so that the present change has no effect.

        None if all norms must. ``hidden``: logits without the change, by norm that hides ``u``.
        """
        for norm, logits in hidden.items():
            with self._hiding(norm):
                if (self._logits() - logits).norm() <= _RTOL * effect:
                    return norm
        return _NEITHER

    def _logits(self) -> Tensor:
        return self.copy.run().logits

    @contextmanager
    def _hiding(self, norm: str | None) -> Iterator[None]:
        """Within it, the output of ``norm`` (if None, the inputs of all norms) have no ``u``."""
        if norm is None:
            with self._hiding_from(self._norms):
                yield
            return
        handle = self._norms[norm].register_forward_hook(
            lambda module, inputs, output: _without(output, self._hidden)
        )
        with hooked([handle]):
            yield

    @contextmanager
    def _hiding_from(self, norms: Iterable[str]) -> Iterator[None]:
        """Within it, the inputs of ``norms`` have no ``u``."""
        handles = [
            self._norms[norm].register_forward_pre_hook(
                lambda module, inputs: (_without(inputs[0], self._hidden), *inputs[1:])
            )
            for norm in norms
        ]
        with hooked(handles):
            yield

    @contextmanager
    def _changed(self, parameter: nn.Parameter, axis: int) -> Iterator[None]:
        """Within it, random multiples of ``u`` are added to ``parameter`` along ``axis``."""
        kept = parameter.detach().clone()
        generator = torch.Generator().manual_seed(2)
        shape = [1 if a == axis else n for a, n in enumerate(parameter.shape)]
        amount = torch.randn(shape, generator=generator) * kept.norm() / kept.numel() ** 0.5
        along = [-1 if a == axis else 1 for a in range(parameter.ndim)]
        try:
            parameter.data.add_(amount * self._hidden.view(along) * self.copy.width**0.5)
            yield
        finally:
            parameter.data.copy_(kept)

    # --- values ----------------------------------------------------------------------------------

    def _find_values(self) -> Iterator[_Values]:
        for block in self.copy.blocks:
            module = self._model.get_submodule(block)
            for group in find_groups(module, self._logits):
                producer = group.producer
                if producer is None or producer.kind != "rows" or len(group.linears) != 1:
                    continue
                output = f"{block}.{group.linears[0]}.weight"
                values = f"{block}.{producer.module}.weight"
                writes = self._facing.get(output, _NEITHER)[1] is None
                if writes and values in self._facing:
                    heads = self._turnable(values, output, producer)
                    if heads is not None:
                        yield heads

    def _turnable(self, values: str, output: str, producer: Producer) -> _Values | None:
        """The largest heads that any rotation can turn without a change of the logits, or None."""
        parameters = dict(self._model.named_parameters())
        weight, projection = parameters[values], parameters[output]
        bias = parameters.get(f"{values.removesuffix('weight')}bias")
        touched = [weight, projection, *([bias] if bias is not None else [])]
        kept = [parameter.detach().clone() for parameter in touched]
        plain = self._logits()
        distinct = len(torch.unique(producer.rows))
        generator = torch.Generator().manual_seed(3)
        for size in range(distinct, 1, -1):
            if distinct % size:
                continue
            for kind in ("all", "wide", "rest", "third"):
                rows = value_rows(kind, size, weight.shape[0], projection.shape[1])
                if rows is None or rows.numel() != distinct:
                    continue
                turn = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
                columns = torch.arange(projection.shape[1]).view(-1, size)
                _turn_heads(projection.data.T, columns, turn)
                alone = self._logits()
                _turn_heads(weight.data, rows, turn)
                if bias is not None:
                    _turn_heads(bias.data[:, None], rows, turn)
                both = self._logits()
                for parameter, old in zip(touched, kept, strict=True):
                    parameter.data.copy_(old)
                if (both - plain).norm() <= _RTOL * (alone - plain).norm():
                    return _Values(values, output, kind, size)
        return None

    # --- for a model of any size -----------------------------------------------------------------

    def stream(
        self,
        tensors: Mapping[str, TensorSpec],
        blocks: Sequence[str],
        kinds: Sequence[int],
        width: int,
        *,
        tied: bool,
    ) -> Stream:
        """The stream of a model that holds ``tensors``, with ``blocks`` of ``kinds``.

        ``width``: of its residual stream. ``tied``: whether the head is the embedding. Raises
        QplugError if a tensor has a wrong shape, or reads a norm outside of its own block.
        """
        by_place: dict[Place, tuple[int, str | None]] = {}
        for parameter, (axis, norm) in self._facing.items():
            for name, axis_on_disk in self.copy.on_disk(parameter, axis):
                by_place[self.copy.place(name)] = axis_on_disk, norm
        copies = self._copies() if tied else {}
        shapes = {name: spec.shape for name, spec in tensors.items()}
        shapes |= {name: shapes[source] for name, source in copies.items()}
        blocks, kinds = tuple(blocks), tuple(kinds)
        axes: dict[str, StreamAxis] = {}
        readers: dict[tuple[str, str], list[str]] = {}
        for name, shape in shapes.items():
            place = place_of(name, blocks, kinds)
            if place not in by_place:
                continue
            axis, norm = by_place[place]
            if shape[axis] != width:
                raise QplugError(f"{name}: is {list(shape)}; its axis {axis} should be {width}")
            block = None if place[0] is None else block_of(name, blocks)
            if block is None and norm is not None and norm.startswith(tuple(self.copy.blocks)):
                raise QplugError(
                    f"{name}: reads {norm}, a norm within a block, so the residual stream of this "
                    "model is the output of norms, and cannot be rewritten"
                )
            bias = f"{name.removesuffix('weight')}bias"
            has_bias = norm is not None and bias in shapes and bias != name
            norm_name = None
            if norm is not None:
                norm_name = module_of(self._in_block(f"{norm}.weight", block, blocks))
                readers.setdefault((norm_name, norm), []).append(name)
            axes[name] = StreamAxis(axis, norm_name, bias if has_bias else None)
        missing = by_place.keys() - {place_of(name, blocks, kinds) for name in shapes}
        if missing:
            raise QplugError(
                f"{min(local for _, local in missing)}: writes the residual stream or reads it, "
                "and the checkpoint has no such tensor, so the model cannot be rewritten"
            )
        norms = {
            name: StreamNorm(
                weight=f"{name}.weight",
                bias=f"{name}.bias" if f"{name}.bias" in shapes else None,
                offset=self.offsets[norm],
                readers=tuple(tensors_of_norm),
            )
            for (name, norm), tensors_of_norm in readers.items()
        }
        heads = tuple(self._value_heads(shapes, blocks, kinds))
        return Stream(width, self.centred, norms, axes, heads, copies)

    def _value_heads(
        self, shapes: Mapping[str, tuple[int, ...]], blocks: Sequence[str], kinds: Sequence[int]
    ) -> Iterator[ValueHeads]:
        """The heads of all ``blocks``. Raises QplugError if a tensor does not divide into heads."""
        for found in self.values:
            kind, _ = self.copy.place(found.values)
            for block in (number for number, of in enumerate(kinds) if of == kind):
                values = self._in_block(found.values, block, blocks)
                output = self._in_block(found.output, block, blocks)
                rows = value_rows(found.rows, found.size, shapes[values][0], shapes[output][1])
                if rows is None:
                    raise QplugError(
                        f"{values}: {list(shapes[values])} has no heads of {found.size}"
                    )
                bias = f"{values.removesuffix('weight')}bias"
                yield ValueHeads(values, bias if bias in shapes else None, rows, output, found.size)

    def _in_block(self, parameter: str, block: int | None, blocks: Sequence[str]) -> str:
        """The tensor of the model that ``parameter`` of the copy stands for.

        ``block``: the block it is in, an index of ``blocks``; None outside of blocks.
        """
        ((name, _),) = self.copy.on_disk(parameter)
        kind, _ = self.copy.place(name)
        if kind is None:
            return name
        assert block is not None
        return f"{blocks[block]}.{relative_name(self.copy.stored_blocks[kind], name)}"

    def _copies(self) -> dict[str, str]:
        """The tensor of the embedding, by the tensor of the head, which becomes a copy of it."""
        model: Any = self._model
        output = model.get_output_embeddings()
        if output is None:  # a model that ranks has none, whatever its config says of tied words
            return {}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        head = names[id(output.weight)]
        embedding, _ = self._embedding()
        ((head_name, _),) = self.copy.on_disk(head)
        ((embedding_name, _),) = self.copy.on_disk(embedding)
        return {head_name: embedding_name}


#: Sentinel: the parameter neither writes the stream nor reads a norm.
_NEITHER: Any = ("nothing", "nothing")


def value_rows(kind: str, size: int, out: int, width: int) -> Tensor | None:
    """The rows of heads of ``size``, int64 ``[heads, size]``, in a weight of ``out`` rows.

    ``kind``: as ``_Values.rows``; ``width``: columns of the projection that reads the heads. None
    if no such heads fit.
    """
    if kind == "third":
        if out != 3 * width or width % size:
            return None
        return torch.arange(out).view(-1, 3, size)[:, 2]
    count = {"all": out, "wide": width, "rest": (out - width) // 2}[kind]
    if not 0 < count <= out or count % size or width % count:
        return None
    return torch.arange(out - count, out).view(-1, size)


def _turn_heads(matrix: Tensor, rows: Tensor, turn: Tensor) -> None:
    """Multiply each head, rows ``[heads, size]`` of ``matrix``, by ``turnᵀ`` from the left."""
    matrix[rows] = turn.T @ matrix[rows]


def _without(x: Tensor, direction: Tensor) -> Tensor:
    """``x: [..., width]`` without its part along the unit vector ``direction``."""
    return x - (x @ direction)[..., None] * direction


def _width(norm: nn.Module) -> tuple[int, ...] | None:
    """The shape of the parameter by which ``norm`` multiplies; some have a buffer of ones alone."""
    weight = dict(norm.named_parameters(recurse=False)).get("weight")
    return None if weight is None else tuple(weight.shape)


def _offset(name: str, norm: nn.Module, width: int) -> float:
    """0 for a norm that multiplies by its weight, 1 for a norm that multiplies by 1 + weight."""
    for offset in (0.0, 1.0):
        if not _unbiased(norm, -offset, _probe(width)).any():
            return offset
    raise QplugError(f"{name}: is a norm of an unknown kind, so the model cannot be rotated")


def _centres(norm: nn.Module, offset: float, width: int) -> bool:
    """Whether the norm subtracts the mean of its input."""
    x = _probe(width)
    plain, raised = (_unbiased(norm, 1 - offset, values) for values in (x, x + 1))
    return bool((plain - raised).norm() <= _RTOL * plain.norm())


def _probe(width: int) -> Tensor:
    return torch.randn(1, 4, width, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def _unbiased(norm: nn.Module, weight: float, x: Tensor) -> Tensor:
    """The output of ``norm`` for ``x`` with ``weight`` in each channel and no bias."""
    kept = {local: part.detach().clone() for local, part in norm.named_parameters(recurse=False)}
    call: Callable[[Tensor], Tensor] = norm
    try:
        for local, part in norm.named_parameters(recurse=False):
            part.data.fill_(weight if local == "weight" else 0.0)
        return call(x)
    finally:
        for local, part in norm.named_parameters(recurse=False):
            part.data.copy_(kept[local])
