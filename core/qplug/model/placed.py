"""Modules and parameters of a block, registered under the names that a checkpoint gives them.

The code of the block goes on to find them by its own names: what is moved stays an attribute of the
module that it was moved out of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qplug.checkpoint.names import split_name
from qplug.model.block_proxy import BlockProxy
from qplug.model.computed import compute_attribute

#: A parameter that lies in a tensor on disk: its module, its name there, and where it lies.
_Place = tuple[nn.Module, str, Tensor]


class Placement:
    """The places of the parts of ``block`` on disk, all paths relative to the block."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._modules: dict[str, str] = {}
        self._parameters: list[tuple[nn.Module, str, str, bool]] = []
        self._parts: list[tuple[nn.Module, str, Sequence[tuple[str, Tensor]]]] = []
        self._several: list[tuple[nn.Module, str, Sequence[str], int]] = []
        self._of_rows: dict[str, dict[str, tuple[tuple[int, ...], list[_Place]]]] = {}
        self._of_elements: list[tuple[str, tuple[int, ...], list[_Place]]] = []

    def module(self, path: str, on_disk: str) -> None:
        """The module at ``path``, with its parameters, goes to ``on_disk``."""
        self._modules[path] = on_disk

    def parameter(self, path: str, on_disk: str, *, turned: bool = False) -> None:
        """The parameter ``path`` goes to ``on_disk``.

        ``turned``: whether its last two axes are the other way round there.
        """
        owner, local = split_name(path)
        self._parameters.append((self._block.get_submodule(owner), local, on_disk, turned))

    def parts(self, path: str, parts: Sequence[tuple[str, Tensor]]) -> None:
        """The parameter ``path`` goes to several places, as in ``_part_parameter``."""
        owner, local = split_name(path)
        self._parts.append((self._block.get_submodule(owner), local, parts))

    def several(self, path: str, on_disk: Sequence[str], axis: int) -> None:
        """The parameter ``path`` goes to the tensors ``on_disk``, of equal size along ``axis``."""
        owner, local = split_name(path)
        self._several.append((self._block.get_submodule(owner), local, on_disk, axis))

    def joined(
        self,
        on_disk: str,
        shape: tuple[int, ...],
        places: Mapping[str, Tensor],
        *,
        by_rows: bool,
    ) -> None:
        """Several parameters go to one tensor ``on_disk`` of ``shape``.

        ``places``: by parameter, int64: the rows there that it has, if ``by_rows``, and all of them
        are weights, or biases, of linears; else the place of each element in the flat tensor, in
        the shape of the parameter.
        """
        found = []
        for path, each in places.items():
            owner, local = split_name(path)
            found.append((self._block.get_submodule(owner), local, each))
        if not by_rows:
            self._of_elements.append((on_disk, shape, found))
            return
        module, local = split_name(on_disk)
        self._of_rows.setdefault(module, {})[local] = shape, found

    def carry_out(self) -> None:
        """Moves everything to its place."""
        block = self._block
        renamed = _renamed(self._modules)
        apart = [
            (block.get_submodule(path), on_disk)
            for path, on_disk in self._modules.items()
            if path and path not in renamed
        ]
        # The deepest come first, while their parents still go by their old names.
        for path in sorted(renamed, key=lambda path: -path.count(".")):
            _rename_module(block, path, self._modules[path])
        for module, on_disk in sorted(apart, key=lambda pair: pair[1].count(".")):
            if not _move_module(block, module, on_disk):
                for local in [*module._parameters]:
                    self._parameters.append((module, local, f"{on_disk}.{local}", False))
        for module, local, on_disk, turned in self._parameters:
            _move_parameter(block, module, local, on_disk, turned=turned)
        for module, local, names, axis in self._several:
            _cut_parameter(block, module, local, names, axis)
        self._carry_out_parts()
        for on_disk, tensors in self._of_rows.items():
            _join_linears(block, on_disk, tensors)
        for on_disk, shape, places in self._of_elements:
            _join_parameters(block, on_disk, shape, places)

    def _carry_out_parts(self) -> None:
        block = self._block
        of_linears: dict[nn.Linear, dict[str, Sequence[tuple[str, Tensor]]]] = {}
        for module, local, parts in self._parts:
            if isinstance(module, nn.Linear):
                of_linears.setdefault(module, {})[local] = parts
            else:
                _part_parameter(block, module, local, parts)
        for linear, of_linear in of_linears.items():
            if all(p is None or local in of_linear for local, p in linear._parameters.items()):
                _part_linear(block, linear, of_linear)
                continue
            for local, parts in of_linear.items():
                _part_parameter(block, linear, local, parts)


def _renamed(modules: Mapping[str, str]) -> set[str]:
    """The paths among ``modules`` whose every part has one name on disk, in all of these paths.

    ``modules``: paths on disk by path in memory.
    """
    names: dict[str, set[str]] = {}
    prefixes: dict[str, list[str]] = {}
    for path, on_disk in modules.items():
        if path and path.count(".") == on_disk.count("."):
            old, new = path.split("."), on_disk.split(".")
            prefixes[path] = [".".join(old[: end + 1]) for end in range(len(old))]
            for end, prefix in enumerate(prefixes[path]):
                names.setdefault(prefix, set()).add(".".join(new[: end + 1]))
    return {
        path for path, parts in prefixes.items() if all(len(names[part]) == 1 for part in parts)
    }


def _rename_module(block: nn.Module, path: str, on_disk: str) -> None:
    """Registers the modules of ``block`` along ``path`` under their names ``on_disk``.

    Both paths have the same depth. A module whose name is taken keeps its own.
    """
    old, new = path.split("."), on_disk.split(".")
    for depth, (before, after) in enumerate(zip(old, new, strict=True)):
        parent = block.get_submodule(".".join(new[:depth]))
        if after in parent._modules or before not in parent._modules:
            continue
        parent.__dict__[before] = parent._modules[before]  # the model's code uses the old name
        renamed = [(after if name == before else name, m) for name, m in parent._modules.items()]
        parent._modules.clear()
        parent._modules.update(renamed)


def _move_module(block: nn.Module, module: nn.Module, on_disk: str) -> bool:
    """Registers ``module``, which lies in ``block``, at the path ``on_disk``.

    Returns whether it lies there now: False if another module does.
    """
    before = next(path for path, part in block.named_modules() if part is module)
    if before == on_disk:
        return True
    parent, local = split_name(before)
    owner = block.get_submodule(parent)
    if on_disk.startswith(f"{before}."):  # the name of a module that has this one alone
        owner._modules[local] = _Around(module)
        parent, new = split_name(on_disk)
        _container(block, parent)._modules[new] = module
        return True
    del owner._modules[local]
    parent, new = split_name(on_disk)
    place = _container(block, parent)
    if new in place._modules:
        owner._modules[local] = module
        return False
    owner.__dict__[local] = module
    place._modules[new] = module
    return True


def _move_parameter(
    block: nn.Module, owner: nn.Module, local: str, on_disk: str, *, turned: bool
) -> None:
    """Registers the parameter ``local`` of ``owner``, which lies in ``block``, as ``on_disk``.

    ``turned``: with its last two axes the other way round.
    """
    path, new = split_name(on_disk)
    place, parameter = _container(block, path), owner._parameters[local]
    if parameter is None or (place is owner and new == local and not turned):
        return
    if turned:
        parameter = nn.Parameter(parameter.mT, requires_grad=parameter.requires_grad)
        # Not as an attribute: on disk it may go by the very name that is computed.
        _compute(owner, local, lambda: _mT(place._parameters[new]))
    else:
        _compute(owner, local, lambda: getattr(place, new))
    place._parameters[new] = parameter


def _mT(parameter: Tensor | None) -> Tensor:
    assert parameter is not None
    return parameter.mT


def _part_parameter(
    block: nn.Module, owner: nn.Module, local: str, parts: Sequence[tuple[str, Tensor]]
) -> None:
    """Registers parts in the place of the parameter ``local`` of ``owner``, which joins them.

    ``parts``: the name of each part relative to ``block``, and its values in the shape that it has
    on disk. The parameter holds the elements of all parts, in order.
    """
    parameter = owner._parameters[local]
    assert parameter is not None
    places = []
    for on_disk, values in parts:
        path, new = split_name(on_disk)
        places.append((_container(block, path), new))
        places[-1][0]._parameters[new] = nn.Parameter(values, requires_grad=False)
    shape = parameter.shape

    def join() -> Tensor:
        values = [getattr(place, name).flatten() for place, name in places]
        return torch.cat(values).view(shape)

    _compute(owner, local, join)


def _cut_parameter(
    block: nn.Module, owner: nn.Module, local: str, on_disk: Sequence[str], axis: int
) -> None:
    """Registers the parts of the parameter ``local`` of ``owner``, of equal size along ``axis``."""
    parameter = owner._parameters[local]
    assert parameter is not None
    places = []
    for name, values in zip(on_disk, parameter.chunk(len(on_disk), axis), strict=True):
        path, new = split_name(name)
        places.append((_container(block, path), new))
        places[-1][0]._parameters[new] = nn.Parameter(values, requires_grad=False)
    _compute(owner, local, lambda: torch.cat([getattr(*place) for place in places], axis))


def _part_linear(
    block: nn.Module, linear: nn.Linear, parts: Mapping[str, Sequence[tuple[str, Tensor]]]
) -> None:
    """Registers linears of their own in the place of ``linear``, which joins their outputs.

    ``parts``: as for ``_part_parameter``, of the weight and of the bias.
    """
    linears = []
    for local, values_by_name in parts.items():
        for on_disk, values in values_by_name:
            path, new = split_name(on_disk)
            parent, last = split_name(path)
            place = _container(block, parent)
            if last not in place._modules:
                out, width = values.shape[0], linear.in_features
                place._modules[last] = nn.Linear(width, out, bias=False, device="meta")
            part = place.get_submodule(last)
            part._parameters[new] = nn.Parameter(values, requires_grad=False)
            if local == "weight":
                linears.append(part)
        linear._parameters[local] = None
    before = next(path for path, part in block.named_modules() if part is linear)
    parent, own = split_name(before)
    owner = block.get_submodule(parent)
    del owner._modules[own]
    owner.__dict__[own] = linear  # the model's code goes on to call it
    linear.__dict__["forward"] = lambda x: torch.cat([part(x) for part in linears], -1)


def _join_linears(
    block: nn.Module,
    on_disk: str,
    tensors: Mapping[str, tuple[tuple[int, ...], Sequence[_Place]]],
) -> None:
    """Registers one linear ``on_disk`` in the place of several, which take rows of its output.

    ``tensors``: the shape of its weight, and of its bias if it has one, and whose rows they are.
    """
    (out, width), of_weight = tensors["weight"]
    joined = nn.Linear(width, out, bias="bias" in tensors, device="meta")
    for local, (_, places) in tensors.items():
        old = places[0][0]._parameters[places[0][1]]
        assert old is not None
        empty = torch.empty_like(joined.get_parameter(local), dtype=old.dtype)
        joined._parameters[local] = nn.Parameter(empty, requires_grad=False)
    paths = {id(part): path for path, part in block.named_modules()}
    output = _JoinedOutput(joined, len(of_weight))
    for linear, _, rows in of_weight:
        parent, own = split_name(paths[id(linear)])
        owner = block.get_submodule(parent)
        del owner._modules[own]
        owner.__dict__[own] = linear  # the model's code goes on to call it
        linear._parameters.update(dict.fromkeys(linear._parameters))
        linear.__dict__["forward"] = partial(output.rows, own, rows)
    path, local = split_name(on_disk)
    _container(block, path)._modules[local] = joined


class _JoinedOutput:
    """What a linear returns, of which several others take rows; computed once for all of them."""

    def __init__(self, linear: nn.Linear, readers: int) -> None:
        """``readers``: how many take rows."""
        self._linear, self._readers = linear, readers
        self._taken = set[str]()
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def rows(self, reader: str, rows: Tensor, x: Tensor) -> Tensor:
        """``x: [..., in]``; returns ``[..., len(rows)]``. ``reader`` tells the others apart."""
        # Who reads once more reads in another pass, whose weights may be others.
        if self._output is None or self._input is not x or reader in self._taken:
            self._taken.clear()
            self._input, self._output = x, self._linear(x)
        first, last = int(rows[0]), int(rows[-1])
        if torch.equal(rows, torch.arange(first, last + 1)):
            output = self._output[..., first : last + 1]
        else:
            output = self._output[..., rows.to(x.device)]
        self._taken.add(reader)
        if len(self._taken) == self._readers:
            self._input = self._output = None
        return output


def _join_parameters(
    block: nn.Module, on_disk: str, shape: tuple[int, ...], places: Sequence[_Place]
) -> None:
    """Registers the parameter ``on_disk`` of ``shape``, of which others take their elements."""
    path, new = split_name(on_disk)
    place, (first, first_local, _) = _container(block, path), places[0]
    old = first._parameters[first_local]
    assert old is not None
    empty = torch.empty(shape, dtype=old.dtype, device="meta")
    for owner, local, elements in places:
        _compute(owner, local, partial(_elements, place, new, elements))
    place._parameters[new] = nn.Parameter(empty, requires_grad=False)


def _elements(place: nn.Module, name: str, elements: Tensor) -> Tensor:
    parameter = place._parameters[name]
    assert parameter is not None
    return parameter.flatten()[elements.to(parameter.device)]


class _Around(BlockProxy):
    """Stands where a module stood that now lies inside of it, and is called in its place."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["block"](*args, **kwargs)


def _container(block: nn.Module, path: str) -> nn.Module:
    """The module at ``path``; modules that are missing on the way are made, empty."""
    for name in path.split(".") if path else ():
        if name not in block._modules:
            block._modules[name] = nn.Module()
        following = block._modules[name]
        assert following is not None
        block = following
    return block


def _compute(module: nn.Module, local: str, compute: Callable[[], Tensor | None]) -> None:
    """Makes ``local`` an attribute of ``module`` that is computed, not a parameter of its own."""
    del module._parameters[local]
    compute_attribute(module, local, compute)
