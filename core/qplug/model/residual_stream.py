"""What faces the residual stream of a model, found by trial on a small random copy.

No architecture is named. Hide one direction ``u`` of the stream from all norms: a tensor writes
into the stream if a change along ``u`` then changes no logit. Hide ``u`` from what a norm gives: a
tensor reads that norm if a change along ``u`` then changes no logit. Either must change them
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qplug.api import Facing, Heads, Stream, StreamNorm, TensorSpec
from qplug.checkpoint.names import block_of
from qplug.errors import QplugError
from qplug.model.hooks import hooked
from qplug.model.input_groups import Before, find_groups, is_norm
from qplug.model.small_copy import Place, SmallCopy, place_of

#: What a hidden change may do to the logits, relative to what it does when it is seen.
_RTOL = 1e-3


@dataclass(frozen=True)
class _Values:
    """A projection and the rows of the linear behind it, by the names of parameters in memory.

    ``rows`` says how to find them: ``all``, as many as the projection is ``wide``, the ``rest``
    that two others leave, or every ``third`` run of ``size``.
    """

    made: str
    output: str
    rows: str
    size: int


class Faces:
    """What faces the stream of ``copy``; ``stream`` tells it of the copy, or of the whole model."""

    def __init__(self, copy: SmallCopy) -> None:
        """Raises QplugError if a norm does what is not known."""
        self.copy = copy
        self._model: nn.Module = copy.model
        width = copy.width
        self._norms = {
            name: module
            for name, module in self._model.named_modules()
            if is_norm(module) and module.get_parameter("weight").shape == (width,)
        }
        hidden = torch.randn(width, generator=torch.Generator().manual_seed(1))
        self._hidden = hidden / hidden.norm()  # the direction u
        self._found = dict(self._find())
        self.read = {norm for _, norm in self._found.values() if norm is not None}
        self.offsets = {name: _offset(name, self._norms[name], width) for name in self.read}
        centred = {
            _centres(self._norms[name], self.offsets[name], width) for name in sorted(self.read)
        }
        if len(centred) > 1:
            raise QplugError("some norms of this model subtract the mean, and some do not")
        self.centred = centred == {True}
        self.values = tuple(self._find_values())

    @property
    def unread(self) -> tuple[str, ...]:
        """Norms as wide as the stream that no linear reads."""
        return tuple(name for name in self._norms if name not in self.read)

    # --- who writes, who reads -------------------------------------------------------------------

    def _find(self) -> Iterator[tuple[str, tuple[int, str | None]]]:
        """The axis of each parameter that faces the stream, and the norm that it reads."""
        own = {
            f"{name}.{local}"
            for name, norm in self._norms.items()
            for local, _ in norm.named_parameters(recurse=False)
        }
        sights: dict[str | None, Tensor] = {}
        for norm in (None, *self._norms):
            with self._hiding(norm):
                sights[norm] = self._logits()
        plain = self._logits()
        for name, parameter in self._model.named_parameters():
            if name in own:
                continue
            for axis in range(parameter.ndim - 1, max(parameter.ndim - 3, -1), -1):
                if parameter.shape[axis] != self.copy.width:
                    continue
                with self._changed(parameter, axis):
                    effect = (self._logits() - plain).norm()
                    norm = self._hidden_by(sights, effect) if effect > 0 else _NOT
                if norm is not _NOT:
                    yield name, (axis, norm)
                    break

    def _hidden_by(self, sights: Mapping[str | None, Tensor], effect: Tensor) -> Any:
        """The norm that must hide ``u`` so that a change is not seen; None if all must."""
        for norm, sight in sights.items():
            with self._hiding(norm):
                if (self._logits() - sight).norm() <= _RTOL * effect:
                    return norm
        return _NOT

    def _logits(self) -> Tensor:
        return self.copy.run().logits

    @contextmanager
    def _hiding(self, norm: str | None) -> Iterator[None]:
        """Direction ``u`` is taken from what ``norm`` gives; None: from what all are given."""
        u = self._hidden
        if norm is None:
            handles = [
                module.register_forward_pre_hook(
                    lambda module, inputs: (_without(inputs[0], u), *inputs[1:])
                )
                for module in self._norms.values()
            ]
        else:
            handles = [
                self._norms[norm].register_forward_hook(
                    lambda module, inputs, output: _without(output, u)
                )
            ]
        with hooked(handles):
            yield

    @contextmanager
    def _changed(self, parameter: nn.Parameter, axis: int) -> Iterator[None]:
        """Random multiples of ``u`` are added along ``axis``."""
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
                before = group.before
                if before is None or before.kind != "rows" or len(group.linears) != 1:
                    continue
                output = f"{block}.{group.linears[0]}.weight"
                made = f"{block}.{before.module}.weight"
                if self._found.get(output, _NOT)[1] is None and made in self._found:
                    found = self._turnable(made, output, before)
                    if found is not None:
                        yield found

    def _turnable(self, made: str, output: str, before: Before) -> _Values | None:
        """The largest heads that can be turned by any rotation without a change of the logits."""
        parameters = dict(self._model.named_parameters())
        values, projection = parameters[made], parameters[output]
        bias = parameters.get(f"{made.removesuffix('weight')}bias")
        touched = [values, projection, *([bias] if bias is not None else [])]
        kept = [parameter.detach().clone() for parameter in touched]
        plain = self._logits()
        distinct = len(torch.unique(before.rows))
        generator = torch.Generator().manual_seed(3)
        for size in range(distinct, 1, -1):
            if distinct % size:
                continue
            for kind in ("all", "wide", "rest", "third"):
                rows = value_rows(kind, size, values.shape[0], projection.shape[1])
                if rows is None or rows.numel() != distinct:
                    continue
                turn = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
                _turn_heads(
                    projection.data.T, torch.arange(projection.shape[1]).view(-1, size), turn
                )
                alone = self._logits()
                _turn_heads(values.data, rows, turn)
                if bias is not None:
                    _turn_heads(bias.data[:, None], rows, turn)
                both = self._logits()
                for parameter, old in zip(touched, kept, strict=True):
                    parameter.data.copy_(old)
                if (both - plain).norm() <= _RTOL * (alone - plain).norm():
                    return _Values(made, output, kind, size)
        return None

    # --- told ------------------------------------------------------------------------------------

    def stream(
        self,
        tensors: Mapping[str, TensorSpec],
        blocks: Sequence[str],
        kinds: Sequence[int],
        width: int,
        *,
        tied: bool,
    ) -> Stream:
        """What faces the stream of a model that holds ``tensors``, with ``blocks`` of ``kinds``.

        ``tied``: whether the head is the embedding. Raises QplugError if a tensor has not the shape
        that it should have.
        """
        by_place: dict[Place, tuple[int, str | None]] = {}
        for parameter, (axis, norm) in self._found.items():
            for name, there in self.copy.on_disk(parameter, axis):
                by_place[self.copy.place(name)] = there, norm
        copies = self._copies() if tied else {}
        shapes = {name: spec.shape for name, spec in tensors.items()}
        shapes |= {name: shapes[source] for name, source in copies.items()}
        blocks, kinds = tuple(blocks), tuple(kinds)

        def near(block: int | None, parameter: str) -> str:
            """The tensor that ``parameter`` of the copy is, in block ``block`` of the model."""
            ((name, _),) = self.copy.on_disk(parameter)
            kind, _ = self.copy.place(name)
            return name if kind is None else blocks[block] + name[len(self.copy.blocks[kind]) :]  # type: ignore[index]

        facing: dict[str, Facing] = {}
        readers: dict[tuple[str, str], list[str]] = {}
        for name, shape in shapes.items():
            kind, local = place_of(name, blocks, kinds)
            if (kind, local) not in by_place:
                continue
            axis, norm = by_place[kind, local]
            if shape[axis] != width:
                raise QplugError(f"{name}: is {list(shape)}; its axis {axis} should be {width}")
            block = None if kind is None else block_of(name, blocks)
            if block is None and norm is not None and norm.startswith(tuple(self.copy.blocks)):
                raise QplugError(
                    f"{name}: reads {norm}, a norm within a block: the stream of this model is "
                    "what norms make, and cannot be rewritten"
                )
            bias = f"{name.removesuffix('weight')}bias"
            has_bias = norm is not None and bias in shapes and bias != name
            told = None if norm is None else near(block, f"{norm}.weight").removesuffix(".weight")
            facing[name] = Facing(axis, told, bias if has_bias else None)
            if told is not None and norm is not None:
                readers.setdefault((told, norm), []).append(name)
        norms = {
            told: StreamNorm(
                weight=f"{told}.weight",
                bias=f"{told}.bias" if f"{told}.bias" in shapes else None,
                offset=self.offsets[norm],
                readers=tuple(names),
            )
            for (told, norm), names in readers.items()
        }
        heads = []
        for found in self.values:
            kind, _ = self.copy.place(found.made)
            for block in (number for number, of in enumerate(kinds) if of == kind):
                made, output = near(block, found.made), near(block, found.output)
                rows = value_rows(found.rows, found.size, shapes[made][0], shapes[output][1])
                if rows is None:
                    raise QplugError(f"{made}: {list(shapes[made])} has no heads of {found.size}")
                bias = f"{made.removesuffix('weight')}bias"
                heads.append(
                    Heads(made, bias if bias in shapes else None, rows, output, found.size)
                )
        return Stream(width, self.centred, norms, facing, tuple(heads), copies)

    def _copies(self) -> dict[str, str]:
        """The tensor of the head, and that of the embedding, of which it is to be made."""
        model: Any = self._model
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        head = named[id(model.get_output_embeddings().weight)]
        words = named[id(model.get_input_embeddings().weight)]
        ((head_name, _),) = self.copy.on_disk(head)
        ((words_name, _),) = self.copy.on_disk(words)
        return {head_name: words_name}


#: Stands for no norm and not the stream either.
_NOT: Any = ("nothing", "nothing")


def value_rows(kind: str, size: int, out: int, width: int) -> Tensor | None:
    """The rows of heads of ``size``, int64 ``[heads, size]``, in a weight of ``out`` rows.

    ``width`` is that of the projection that reads them. None if they do not fit.
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
    """Replace each head, rows ``[heads, size]`` of ``matrix``, by ``turnᵀ`` times it."""
    matrix[rows] = turn.T @ matrix[rows]


def _without(x: Tensor, direction: Tensor) -> Tensor:
    return x - (x @ direction)[..., None] * direction


def _offset(name: str, norm: nn.Module, width: int) -> float:
    """0 for a norm that multiplies by its weight, 1 for one that adds one to it before."""
    for offset in (0.0, 1.0):
        if not _unbiased(norm, -offset, _probe(width)).any():
            return offset
    raise QplugError(f"{name}: is a norm of a kind that is not known")


def _centres(norm: nn.Module, offset: float, width: int) -> bool:
    """Whether the mean of the input is subtracted."""
    x = _probe(width)
    one, other = (_unbiased(norm, 1 - offset, each) for each in (x, x + 1))
    return bool((one - other).norm() <= _RTOL * one.norm())


def _probe(width: int) -> Tensor:
    return torch.randn(1, 4, width, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def _unbiased(norm: nn.Module, weight: float, x: Tensor) -> Tensor:
    """What ``norm`` makes of ``x`` with the same weight everywhere and no bias."""
    kept = {local: part.detach().clone() for local, part in norm.named_parameters(recurse=False)}
    call: Callable[[Tensor], Tensor] = norm
    try:
        for local, part in norm.named_parameters(recurse=False):
            part.data.fill_(weight if local == "weight" else 0.0)
        return call(x)
    finally:
        for local, part in norm.named_parameters(recurse=False):
            part.data.copy_(kept[local])
