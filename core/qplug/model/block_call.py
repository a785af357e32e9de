"""The arguments of one call of a decoder block, and the hidden states in what the block returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.func import functional_call

from qplug.errors import QplugError

#: What a block returns: the hidden states, alone or first in a tuple or list.
Output: TypeAlias = Any


@dataclass(frozen=True, eq=False)
class BlockCall:
    """The arguments with which a model calls a block.

    ``place``: where the hidden states are among them, the number of a positional argument or the
    name of a keyword. Hidden states are ``[samples, tokens, width]`` in most models; some keep
    several streams, ``[streams, samples, tokens, width]`` or ``[samples, tokens, streams, width]``.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | str

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockCall:
        """The call with these arguments; its hidden states are the first floating-point tensor.

        Among keywords, one that is named for hidden states comes first. Raises QplugError if no
        argument is such a tensor.
        """
        named = sorted(kwargs.items(), key=lambda item: "hidden" not in item[0])
        places: list[tuple[int | str, Any]] = [*enumerate(args), *named]
        for place, value in places:
            if isinstance(value, Tensor) and value.is_floating_point():
                return cls(args, kwargs, place)
        raise QplugError(
            "this architecture calls its blocks without hidden states among the arguments, which "
            "qplug cannot follow; take an algorithm that needs no calibration data"
        )

    @property
    def hidden(self) -> Tensor:
        """The hidden states that enter the block."""
        value: Tensor = (
            self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]
        )
        return value

    def with_hidden(self, hidden: Tensor) -> BlockCall:
        """The same call with other hidden states."""
        if isinstance(self.place, str):
            return self.with_argument(self.place, hidden)
        args = (*self.args[: self.place], hidden, *self.args[self.place + 1 :])
        return BlockCall(args, self.kwargs, self.place)

    def with_argument(self, name: str, value: Any) -> BlockCall:
        """The same call with another argument of the keyword ``name``."""
        return BlockCall(self.args, {**self.kwargs, name: value}, self.place)

    def apart(self, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> BlockCall:
        """The same call with containers of its own, whose tensors ``change`` may replace.

        A block writes keys and values into containers that later blocks read. A pass whose output
        does not enter the next block must not write there.
        """
        args = tuple(_copied(value, change) for value in self.args)
        kwargs = {name: _copied(value, change) for name, value in self.kwargs.items()}
        return BlockCall(args, kwargs, self.place)

    def in_float32(self) -> BlockCall:
        """The same call for a pass in float32: also rotary tables, and masks that are added."""
        return self.apart(_in_float32)

    def others(self) -> Iterator[Tensor]:
        """Yields the tensors in all arguments besides the hidden states."""
        for place, value in [*enumerate(self.args), *self.kwargs.items()]:
            if place != self.place:
                yield from _tensors(value)

    def run(
        self, module: nn.Module, parameters: Mapping[str, Tensor], *, tied: bool = True
    ) -> Output:
        """Returns what the block ``module`` returns with ``parameters``, by relative name.

        ``tied``: whether parameters of the module may go by several names, of which one is given.
        Without, calls of a block of many experts cost half as much.
        """
        return functional_call(
            module, dict(parameters), self.args, dict(self.kwargs), tie_weights=tied
        )


def hidden_states(output: Output) -> Tensor:
    """The hidden states in the output of a block, which may be a tuple that starts with them."""
    return output if isinstance(output, Tensor) else output[0]


def converted(output: Output, change: Callable[[Tensor], Tensor]) -> Output:
    """The output of a block with its tensors replaced by ``change``."""
    return _copied(output, change)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _copied(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [_copied(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [_copied(part, change) for part in value]
    if isinstance(value, MutableMapping):
        own = copy(value)
        for key in [*own]:
            own[key] = _copied(own[key], change)
        return own
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
