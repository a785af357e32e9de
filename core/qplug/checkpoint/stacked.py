"""The weights of experts that a checkpoint stacks in one tensor of three axes, read one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qplug.api import Checkpoint, Format, Stacked, StoredTensor, TensorSpec
from qplug.checkpoint.names import module_of
from qplug.checkpoint.tensor_file import tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """The part of a stacked tensor that one linear of each expert has.

    A stacked tensor is ``[experts, rows, in]``, or ``[experts, in, rows]`` if ``transposed``, or
    ``[experts, rows]`` for biases. Its rows are divided among ``count`` linears of equal size: one
    after the other, or in turn if ``interleaved``. ``index`` is the place of the linear among them.
    """

    index: int = 0
    count: int = 1
    interleaved: bool = False
    transposed: bool = False

    def of(self, expert: Tensor) -> Tensor:
        """Returns the linear's ``weight: [out, in]`` or ``bias: [out]``, a view of ``expert``.

        ``expert`` is the part of the stacked tensor that belongs to one expert.
        """
        rows = expert.T if self.transposed and expert.ndim == 2 else expert
        if self.interleaved:
            return rows[self.index :: self.count]
        size = len(rows) // self.count
        return rows[self.index * size : (self.index + 1) * size]

    def shape(self, stacked: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the linear's tensor in a tensor of the shape ``stacked``."""
        rows, *rest = stacked[:0:-1] if self.transposed and len(stacked) == 3 else stacked[1:]
        return (rows // self.count, *rest)


@dataclass(frozen=True)
class CutTensor(StoredTensor):
    """The tensor of one linear of expert ``number``, cut from the stacked tensor ``source``.

    ``stacked``: the name of ``source`` in the checkpoint.
    """

    spec: TensorSpec
    source: StoredTensor
    stacked: str
    number: int
    cut: Cut

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.source.paths

    @property
    def location(self) -> str:
        return f"{self.source.location} {self.number} {self.cut}"

    def read(self) -> Tensor:
        expert = self.source.read_rows(slice(self.number, self.number + 1))[0]
        return self.cut.of(expert).contiguous()

    def chunks(self) -> Iterator[bytes]:
        yield bytes(tensor_bytes(self.read()))


def cut_tensor(source: StoredTensor, stacked: str, number: int, cut: Cut) -> CutTensor:
    """Returns the tensor of expert ``number`` that ``cut`` takes from the tensor ``stacked``."""
    spec = TensorSpec(source.spec.dtype, cut.shape(source.spec.shape))
    return CutTensor(spec, source, stacked, number, cut)


@dataclass(frozen=True)
class JoinedTensor(StoredTensor):
    """A stacked tensor of experts, joined of the tensors of their linears as it is read.

    ``parts``: these tensors, by expert and by their cut of the stacked tensor. ``spec``: of the
    stacked tensor.
    """

    spec: TensorSpec
    parts: Mapping[int, Mapping[Cut, StoredTensor]]

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(path for part in self.tensors() for path in part.paths))

    @property
    def location(self) -> str:
        return " ".join(part.location for part in self.tensors())

    def leaves(self) -> Iterator[StoredTensor]:
        for part in self.tensors():
            yield from part.leaves()

    def read(self) -> Tensor:
        import torch

        return torch.cat([*self._experts()])

    def chunks(self) -> Iterator[bytes]:
        import torch

        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        for expert in self._experts():
            yield bytes(tensor_bytes(expert.to(dtype).cpu()))

    def tensors(self) -> Iterator[StoredTensor]:
        """Yields the tensors that it is joined of."""
        for tensors in self.parts.values():
            yield from tensors.values()

    def _experts(self) -> Iterator[Tensor]:
        """Yields the part of each expert, with an axis of length 1 before the others."""
        for number, tensors in sorted(self.parts.items()):
            yield joined({number: {cut: part.read() for cut, part in tensors.items()}})


def stacked_again(checkpoint: Checkpoint, quantized: Collection[str]) -> Checkpoint:
    """Returns ``checkpoint`` with the stacked tensors of experts of which none is ``quantized``.

    Engines load float experts in the layout in which the model was published.
    """
    experts: dict[str, dict[str, CutTensor]] = {}  # by module of all experts of a layer
    for name, tensor in checkpoint.tensors.items():
        # That of a tensor that an algorithm rewrites is the first one that it is made of.
        if isinstance(cut := next(tensor.leaves()), CutTensor):
            experts.setdefault(module_of(module_of(module_of(name))), {})[name] = cut
    tensors = dict(checkpoint.tensors)
    for cuts in experts.values():
        if any(module_of(name) in quantized for name in cuts):
            continue
        parts: dict[str, dict[int, dict[Cut, StoredTensor]]] = {}
        for name, cut in cuts.items():
            parts.setdefault(cut.stacked, {}).setdefault(cut.number, {})[cut.cut] = tensors[name]
        for name, cut in cuts.items():
            tensor, whole = tensors.pop(name), tensors.get(cut.stacked)
            if tensor is not cut:
                tensors[cut.stacked] = JoinedTensor(cut.source.spec, parts[cut.stacked])
            elif whole is None:
                tensors[cut.stacked] = cut.source
    return replace(checkpoint, tensors=tensors)


def stack(stacked: Stacked, values: Mapping[str, Tensor]) -> Tensor:
    """Returns the stored tensor that ``stacked`` describes. ``values``: its members by name."""
    size = len(stacked.members[0])
    cuts = [Cut(index, size, stacked.interleaved) for index in range(size)]
    return joined(
        {
            number: {cut: values[name] for cut, name in zip(cuts, names, strict=True)}
            for number, names in enumerate(stacked.members)
        }
    )


def members(stored: StoredTensor, name: str, stacked: Stacked) -> Iterator[tuple[str, CutTensor]]:
    """Yields the tensors of single experts in the tensor ``stored`` called ``name``, by name."""
    for number, names in enumerate(stacked.members):
        for index, member in enumerate(names):
            cut = Cut(index, len(names), stacked.interleaved)
            yield member, cut_tensor(stored, name, number, cut)


def unstacked(checkpoint: Checkpoint, format: Format) -> Checkpoint:
    """Returns ``checkpoint`` with separate tensors of experts that ``format`` stores together."""
    specs = {name: tensor.spec for name, tensor in checkpoint.tensors.items()}
    tensors = dict(checkpoint.tensors)
    for name, stacked in format.unstacked(specs).items():
        tensors |= members(tensors.pop(name), name, stacked)
    return replace(checkpoint, tensors=tensors)


def stacked_spec(stacked: Stacked, specs: Mapping[str, TensorSpec]) -> TensorSpec:
    """Returns the dtype and shape of the stored tensor. ``specs``: of its members by name."""
    each = [specs[name] for name in stacked.members[0]]
    rows = sum(spec.shape[0] for spec in each)
    return TensorSpec(each[0].dtype, (len(stacked.members), rows, *each[0].shape[1:]))


def joined(parts: Mapping[int, Mapping[Cut, Tensor]]) -> Tensor:
    """Returns the stacked tensor of ``parts``: tensors of the linears by their cut, by expert."""
    import torch

    experts = []
    for _, tensors in sorted(parts.items()):
        cuts = sorted(tensors, key=lambda cut: cut.index)
        in_order = [tensors[cut] for cut in cuts]
        rows = (
            torch.stack(in_order, 1).flatten(0, 1) if cuts[0].interleaved else torch.cat(in_order)
        )
        experts.append(rows.T if cuts[0].transposed and rows.ndim == 2 else rows)
    return torch.stack(experts)
