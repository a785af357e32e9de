"""The experts of a layer as linears of each expert, called like the fused module of transformers.

Engines and algorithms know linears of each expert; transformers has one module with tensors of
three axes for all experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qplug.checkpoint.names import module_of, split_name
from qplug.model.expert_layout import Layout


class Experts(nn.Module):
    """The experts of a layer, by number; called like the fused module that it replaces.

    ``readers``: the names of an expert's linears that read tokens. ``last``: the name of its output
    linear. ``gathers``: whether it is given the tokens of the layer, of which each expert reads
    some; else each expert has a copy of the tokens of its own, zero for tokens that it is not
    given. ``rows[e]``: the tokens that expert ``e`` was given in the last pass, int64, ascending.
    ``sees_all``: whether experts that gather compute all tokens, of which the output has those that
    were routed to them.
    """

    def __init__(self, fused: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.readers = tuple(part.linear for part in layout.readers)
        self.last, self.gathers = layout.last.linear, layout.gathers
        self.rows: tuple[Tensor, ...] = ()
        self.sees_all = False
        self.__dict__["_fused"] = fused  # not registered: the linears have its parameters
        self.__dict__["_layout"] = layout
        parameters = dict(fused.named_parameters(recurse=False))
        for number in range(layout.count):
            expert = nn.Module()
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
        for name in parameters:
            fused._parameters[name] = None

    def forward(
        self, tokens: Tensor, chosen: Tensor | None = None, shares: Tensor | None = None
    ) -> Tensor:
        """``tokens: [tokens, width]``; ``chosen``, ``shares``: ``[tokens, experts of a token]``.

        Without ``chosen``, ``tokens`` has a copy of all tokens for each expert.
        """
        if chosen is None or shares is None:
            return self._of_copies(tokens)
        per_token = chosen.shape[-1]
        order = torch.argsort(chosen.flatten(), stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self._modules)).tolist()
        places = order.split(counts)[: len(self._modules)]
        routed = tuple(place // per_token for place in places)
        self.rows = routed
        if self.sees_all:
            self.rows = (torch.arange(len(tokens), device=tokens.device),) * len(routed)
        outputs = torch.zeros(
            len(order), tokens.shape[-1], dtype=tokens.dtype, device=tokens.device
        )
        for expert, place, rows in zip(self.children(), places, routed, strict=True):
            if self.sees_all:
                outputs[place] = self._output(expert, tokens)[rows]
            elif len(rows):
                outputs[place] = self._output(expert, tokens[rows])
        weighted = outputs.unflatten(0, (-1, per_token)) * shares.unsqueeze(-1)
        mixed: Tensor = weighted.sum(1).to(tokens.dtype)
        return mixed

    def _of_copies(self, tokens: Tensor) -> Tensor:
        copies = tokens.unflatten(0, (len(self._modules), -1))
        self.rows = tuple(copy.any(-1).nonzero().flatten() for copy in copies)
        outputs = torch.zeros_like(copies)
        for number, (expert, rows) in enumerate(zip(self.children(), self.rows, strict=True)):
            if len(rows):
                outputs[number, rows] = self._output(expert, copies[number, rows])
        return outputs.flatten(0, 1)

    def _output(self, expert: nn.Module, x: Tensor) -> Tensor:
        layout: Layout = self.__dict__["_layout"]
        inner = layout.inner(
            self.__dict__["_fused"], [expert.get_submodule(name)(x) for name in self.readers]
        )
        output: Tensor = expert.get_submodule(self.last)(inner)
        return output


@contextmanager
def seeing_all(block: nn.Module) -> Iterator[None]:
    """Within it, every expert of ``block`` computes all tokens of its layer."""
    layers = [part for part in block.modules() if isinstance(part, Experts)]
    for layer in layers:
        layer.sees_all = True
    try:
        yield
    finally:
        for layer in layers:
            layer.sees_all = False


def rows_of(block: nn.Module, path: str) -> Tensor | None:
    """The tokens that the linear at ``path`` reads in the current pass, int64; None if all."""
    parent, number = split_name(module_of(path))
    experts = block.get_submodule(parent)
    return experts.rows[int(number)] if isinstance(experts, Experts) else None


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
