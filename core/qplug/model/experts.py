"""The experts of a layer as linears of each expert, called like the fused module of transformers.

Engines and algorithms know linears of each expert; transformers has one module with tensors of
three axes for all experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from qplug.checkpoint.names import module_of, split_name
from qplug.model.expert_layout import Layout
from qplug.numerics.alike import together


@dataclass(frozen=True, eq=False)
class Given:
    """What the experts of a layer were given in one pass, or in several that were joined.

    ``source: [n, in]`` has the tensors that experts read. Entry ``i`` says that the expert
    ``expert[i]`` read row ``row[i]`` of it, which belongs to the token ``token[i]`` of the passes;
    int64, each expert's tokens ascending.
    """

    source: Tensor
    expert: Tensor
    row: Tensor
    token: Tensor

    @classmethod
    def joined(cls, passes: Sequence[Given], before: Sequence[int]) -> Given:
        """All ``passes`` as one; ``before``: the number of tokens before each of them."""
        rows, places, first = [], [], 0
        for given, start in zip(passes, before, strict=True):
            rows.append(given.row + first)
            places.append(given.token + start)
            first += len(given.source)
        return cls(
            torch.cat([given.source for given in passes]),
            torch.cat([given.expert for given in passes]),
            torch.cat(rows),
            torch.cat(places),
        )

    def by_expert(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The rows and the tokens of each of ``count`` experts, int64."""
        order = torch.argsort(self.expert, stable=True)
        counts = torch.bincount(self.expert, minlength=count).tolist()
        rows = self.row[order].split(counts)[:count]
        return [*zip(rows, self.token[order].split(counts)[:count], strict=True)]


class Expert(nn.Module):
    """The linears of one expert, under the names that a checkpoint gives them."""

    def __init__(self, readers: Sequence[str], last: str, inner: Callable[..., Tensor]) -> None:
        """``inner`` makes what the linear ``last`` reads of the outputs of ``readers``."""
        super().__init__()
        self._readers, self._last, self._inner = readers, last, inner

    def forward(self, x: Tensor) -> Tensor:
        """``x: [tokens, width]``."""
        outputs = [self._modules[name](x) for name in self._readers]  # type: ignore[misc]
        output: Tensor = self._modules[self._last](self._inner(outputs))  # type: ignore[misc]
        return output


class Experts(nn.Module):
    """The experts of a layer, by number; called like the fused module that it replaces.

    ``readers``: the names of an expert's linears that read tokens. ``last``: the name of its output
    linear. ``on_given`` is called with what the experts are given, before they compute; None if
    nobody asks. ``sees_all``: whether ``on_given`` is told that each expert reads all tokens.
    ``is_silent``: whether zeros are returned in place of what experts compute.
    ``members``: the experts, in order.

    A caller of many passes may give the weights of all experts as one parameter for each linear,
    ``all_gate_proj: [experts, out, in]`` and so on, in place of the parameters of each expert.
    """

    def __init__(self, fused: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.readers = tuple(part.linear for part in layout.readers)
        self.last = layout.last.linear
        self.on_given: Callable[[Given], None] | None = None
        self.sees_all = False
        self.is_silent = False
        self.__dict__["_fused"] = fused  # not registered: the linears have its parameters
        self.__dict__["_layout"] = layout
        self._returns_others = layout.returns_others
        parameters = dict(fused.named_parameters(recurse=False))
        for number in range(layout.count):
            expert = Expert(self.readers, self.last, self._inner)
            for part in layout.parts:
                bias = parameters.get(f"{part.fused}_bias")
                expert.add_module(
                    part.linear,
                    _linear(
                        part.cut.of(parameters[part.fused][number]),
                        None if bias is None else part.cut.of(bias[number]),
                    ),
                )
            self.add_module(str(number), expert)
        self.members = tuple(self.children())
        for name in self.linears:
            self.register_parameter(f"all_{name}", None)
            self.register_parameter(f"all_{name}_bias", None)
        for name in parameters:
            fused._parameters[name] = None

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of an expert's linears."""
        return (*self.readers, self.last)

    def __len__(self) -> int:
        return len(self.members)

    def host(self, other: Experts, first: int) -> None:
        """Registers the experts of ``other`` here, from the number ``first`` on.

        A checkpoint has them in one place; they go on to compute in ``other`` alone.
        """
        for number, expert in enumerate(other.members, first):
            self.add_module(str(number), expert)

    def forward(
        self, tokens: Tensor, chosen: Tensor | None = None, shares: Tensor | None = None
    ) -> Tensor:
        """``tokens: [tokens, width]``; ``chosen``, ``shares``: ``[tokens, experts of a token]``.

        Without ``chosen``, ``tokens`` has a copy of all tokens for each expert.
        """
        if chosen is None or shares is None:
            return self._of_copies(tokens)
        per_token = chosen.shape[-1]
        flat = chosen.flatten()
        place = torch.arange(len(flat), device=flat.device) // per_token
        if self.on_given is not None:
            self.on_given(self._all(tokens) if self.sees_all else Given(tokens, flat, place, place))
        order = torch.argsort(flat, stable=True)
        # Not by bincount, which waits for the GPU.
        numbers = torch.arange(len(self), device=flat.device)
        ends = torch.searchsorted(flat[order], numbers, right=True)
        rows = tokens[place[order]]
        outputs = self._computed(rows, ends)
        if self._returns_others:
            outputs = torch.where((flat[order] < len(self)).unsqueeze(-1), outputs, rows)
        unsorted = torch.empty_like(outputs)
        unsorted[order] = outputs
        weighted = unsorted.unflatten(0, (-1, per_token)) * shares.unsqueeze(-1)
        mixed: Tensor = weighted.sum(1).to(tokens.dtype)
        return mixed

    def _all(self, tokens: Tensor) -> Given:
        place = torch.arange(len(tokens), device=tokens.device)
        expert = torch.arange(len(self), device=tokens.device)
        every = place.repeat(len(self))
        return Given(tokens, expert.repeat_interleave(len(tokens)), every, every)

    def _of_copies(self, tokens: Tensor) -> Tensor:
        copies = tokens.unflatten(0, (len(self), -1))
        given = copies.any(-1)
        expert, token = given.nonzero(as_tuple=True)
        rows = copies[given]
        if self.on_given is not None:
            self.on_given(Given(rows, expert, torch.arange(len(rows), device=rows.device), token))
        outputs = torch.zeros_like(copies)
        outputs[given] = self._computed(rows, given.sum(1).cumsum(0))
        return outputs.flatten(0, 1)

    def _computed(self, rows: Tensor, ends: Tensor) -> Tensor:
        """The outputs for ``rows: [n, width]``: first those of the first expert, and so on.

        ``ends``: where the rows of each expert end, int64. Rows beyond give zeros.
        """
        outputs = torch.zeros_like(rows)
        if self.is_silent:
            return outputs
        if self._parameters[f"all_{self.last}"] is not None:
            return self._grouped(rows, ends)
        start = 0
        for expert, end in zip(self.members, ends.tolist(), strict=True):
            if end > start:
                outputs[start:end] = _here(expert, rows[start:end])
            start = end
        return outputs

    def _grouped(self, rows: Tensor, ends: Tensor) -> Tensor:
        """``_computed`` as one product for each linear, with the weights of all experts."""
        expert = torch.searchsorted(ends, torch.arange(len(rows), device=rows.device), right=True)
        is_routed = (expert < len(self))[:, None]
        expert.clamp_(max=len(self) - 1)

        def product(x: Tensor, name: str) -> Tensor:
            weight, bias = self._parameters[f"all_{name}"], self._parameters[f"all_{name}_bias"]
            assert weight is not None
            return _grouped_product(x, weight, bias, ends, expert)

        inner = self._inner([product(rows, name) for name in self.readers])
        # The product leaves the memory of rows beyond the last expert as it was.
        return product(inner, self.last).masked_fill_(~is_routed, 0)

    def read_by_last(
        self,
        rows: Tensor,
        ends: Tensor,
        path: str,
        parameters: Mapping[str, Tensor],
        numbers: Sequence[int],
    ) -> Tensor:
        """What the last linears of the experts ``numbers`` read, given ``rows: [n, width]``.

        ``ends``, int64: where the rows of each expert end. ``parameters`` are those of a block
        with this layer at ``path``, which ``multiplies_together`` accepts.
        """

        def all_of(name: str, local: str) -> Tensor | None:
            own = [parameters.get(f"{path}.{number}.{name}.{local}") for number in numbers]
            there = [each for each in own if each is not None]
            return together(there) if there else None

        expert = torch.searchsorted(ends, torch.arange(len(rows), device=rows.device), right=True)
        outputs = []
        for name in self.readers:
            weight = all_of(name, "weight")
            assert weight is not None
            outputs.append(_grouped_product(rows, weight, all_of(name, "bias"), ends, expert))
        return self._inner(outputs)

    def _inner(self, outputs: list[Tensor]) -> Tensor:
        layout: Layout = self.__dict__["_layout"]
        return layout.inner(self.__dict__["_fused"], outputs)


@contextmanager
def given_to(layers: Mapping[str, Experts], see: Callable[[str, Given], None]) -> Iterator[None]:
    """Within it, ``see`` is called with the path of each of ``layers`` and what it is given."""
    for path, layer in layers.items():
        layer.on_given = lambda given, path=path: see(path, given)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.on_given = None


@contextmanager
def silent(layers: Iterable[Experts]) -> Iterator[None]:
    """Within it, ``layers`` return zeros and compute nothing."""
    quiet = [*layers]
    for layer in quiet:
        layer.is_silent = True
    try:
        yield
    finally:
        for layer in quiet:
            layer.is_silent = False


@contextmanager
def seeing_all(layers: Mapping[str, Experts]) -> Iterator[None]:
    """Within it, each expert of ``layers`` is said to be given all tokens of its layer."""
    for layer in layers.values():
        layer.sees_all = True
    try:
        yield
    finally:
        for layer in layers.values():
            layer.sees_all = False


def expert_of(block: nn.Module, path: str) -> tuple[str, int] | None:
    """The path of the experts of ``block`` and the number of the one whose linear is at ``path``.

    None if the module at ``path`` is no linear of an expert.
    """
    parent, number = split_name(module_of(path))
    if not number.isdigit():
        return None
    layer = block.get_submodule(parent)
    is_expert = isinstance(layer, Experts) and int(number) < len(layer)
    return (parent, int(number)) if is_expert else None


def alike_in(block: nn.Module) -> list[list[str]]:
    """The names of parameters of ``block`` that the experts of a layer have, one list for each."""
    return [
        [f"{path}.{number}.{name}.{local}" for number in range(len(layer))]
        for path, layer in experts_in(block).items()
        for name in layer.linears
        for local in ("weight", "bias")
    ]


def with_experts_together(block: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``parameters`` of ``block`` with the weights of the experts of a layer in one tensor each.

    Layers stay as they are that a GPU cannot compute by one product of all experts, or whose
    linears have hooks.
    """
    joined = dict(parameters)
    for path, layer in experts_in(block).items():
        if not multiplies_together(layer, path, parameters):
            continue
        for name in layer.linears:
            for local in ("weight", "bias"):
                names = [f"{path}.{number}.{name}.{local}" for number in range(len(layer))]
                if names[0] not in parameters:
                    continue
                whole = f"{path}.all_{name}" + ("" if local == "weight" else "_bias")
                joined[whole] = together([joined.pop(each) for each in names])
    return joined


def experts_in(block: nn.Module) -> dict[str, Experts]:
    """The experts of the layers of ``block``, by path."""
    return {path: part for path, part in block.named_modules() if isinstance(part, Experts)}


def multiplies_together(
    layer: Experts, path: str, parameters: Mapping[str, Tensor], number: int = 0
) -> bool:
    """Whether a GPU multiplies by the weights of all experts of ``layer`` at once.

    ``parameters`` are those of the block; ``number``: an expert whose parameters are there.
    """
    linears = [expert.get_submodule(name) for expert in layer.members for name in layer.linears]
    if any(linear._forward_pre_hooks or linear._forward_hooks for linear in linears):
        return False
    for name in layer.linears:
        weight = parameters.get(f"{path}.{number}.{name}.weight")
        if weight is None or weight.dtype != torch.bfloat16 or not weight.is_cuda:
            return False
        if any(size * weight.element_size() % 16 for size in weight.shape):
            return False
        if torch.cuda.get_device_capability(weight.device) < (8, 0):
            return False
    return hasattr(functional, "grouped_mm")


def _grouped_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, expert: Tensor
) -> Tensor:
    """``x: [n, in]`` times the weight of the expert of each row: ``[n, out]``.

    ``weight: [experts, out, in]``; ``bias: [experts, out]``. ``ends: [experts]`` says where the
    rows of each expert end, and ``expert: [n]`` which expert each row belongs to.
    """
    output = functional.grouped_mm(x, weight.transpose(1, 2), offs=ends.to(torch.int32))
    return output if bias is None else output + bias[expert]


def _here(expert: nn.Module, x: Tensor) -> Tensor:
    """What ``expert`` returns for ``x: [tokens, width]``, whose device may lack its weights.

    Experts that are too large for a GPU together come one after the other.
    """
    parameters = dict(expert.named_parameters())
    if all(parameter.device == x.device for parameter in parameters.values()):
        output: Tensor = expert(x)
        return output
    moved = {name: p.to(x.device, non_blocking=True) for name, p in parameters.items()}
    moved_output: Tensor = functional_call(expert, moved, (x,))
    return moved_output


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear that uses the memory of ``weight: [out, in]`` and ``bias: [out]``."""
    # Not by its own constructor, which draws values: a model has ten thousands of such linears.
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter(
        "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
    )
    return linear
