"""A decoder block as algorithms have it: weights, what they read, and the codes they become."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeVar

from qplug.api.scheme import QuantArgs

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes, not packed: the only thing that crosses from algorithms to exporters.

    ``codes``: ``[out, in]``; int8 if symmetric, uint8 counted from 0 if not, or the float dtype.
    ``scale``: ``args.scale_shape``, float32, positive, exactly representable in
    ``args.scale_dtype``. ``zero``: uint8, shaped like ``scale``, for asymmetric codes only.
    The weight meant is ``(codes - zero) * scale``. ``input_scale``: float32 ``[1]``, the scale
    under which the linear's input is rounded, where the scheme stores one; the run fills it in.
    ``global_scale``: float32 ``[1]``, a power of two, where ``args.two_level``: it is ``scale /
    global_scale`` then that is exact in ``args.scale_dtype``; the run fills it in too.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    args: QuantArgs
    input_scale: Tensor | None = None
    global_scale: Tensor | None = None


@dataclass(eq=False)
class Linear:
    """One weight to quantize.

    ``weight``: ``[out, in]``, float32 in a calibrated run, else in the dtype of the checkpoint.
    ``args``: how it is stored; ``activations``: how its input will be rounded, if it will.
    ``scale`` and ``zero`` are those that an algorithm chose (AWQ's clips): shaped as in
    ``QuantizedWeight``; whoever computes codes takes them, ``qplug.numerics.scale_of`` gives the
    covering ones where there are none. ``input_scale``: float32 ``[1]``, that of static inputs; an
    algorithm may choose it, else the run's observer does once all scales are moved.
    ``global_scale``: float32 ``[1]``, that of scales with two levels; the run fixes it before codes
    are computed, alike for linears that the engine merges (``qplug.numerics.global_scale_of``).
    """

    name: str
    weight: Tensor
    args: QuantArgs
    activations: QuantArgs | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    input_scale: Tensor | None = None
    global_scale: Tensor | None = None


@dataclass(eq=False)
class InputGroup:
    """Linears of a block that read one tensor, ``x: [tokens, in]``, and what is known of it.

    ``gram`` is the sum of ``xᵀx`` over all calibration tokens, float32 ``[in, in]``; ``mean``,
    ``mean_abs``, ``low`` and ``high`` are the mean of ``x`` and of ``|x|``, the least and the
    greatest ``x`` of each channel, float32 ``[in]``; ``sample: [some tokens, in]`` are some of the
    tokens, from all over the calibration data, float32. ``lows`` and ``highs`` are the ``low`` and
    ``high`` of each calibration window, float32 ``[windows, in]``; None unless a linear of the
    group has static inputs. ``scalable`` tells whether ``Block.smooth``
    can move scale out of this tensor, ``shiftable`` whether ``Block.shift`` can move an offset, and
    ``after_norm`` whether it is a norm that makes it. ``experts`` is the name of a layer's experts,
    where the reader is one of them; their groups follow one another, and compute side by side.

    Experts read some of the tokens: ``routed`` has a group for each expert among the linears, with
    what is known of the tokens that were routed to it. Those have no scale of their own to move. An
    expert may have seen none: ``tokens`` is 0 then, and all that is summed is zero.

    Where an algorithm ``needs_drift`` and blocks are fed by quantized ones: ``y`` being what the
    float model has in the place of ``x``, ``drift`` is the sum of ``xᵀ(y - x)``, float32 ``[in,
    in]``, and ``lag`` that of ``y - x``, ``[in]``.
    """

    linears: tuple[Linear, ...]
    gram: Tensor
    mean: Tensor
    mean_abs: Tensor
    low: Tensor
    high: Tensor
    sample: Tensor
    tokens: int
    scalable: bool
    shiftable: bool
    after_norm: bool
    drift: Tensor | None = None
    lag: Tensor | None = None
    lows: Tensor | None = None
    highs: Tensor | None = None
    experts: str | None = None
    routed: tuple[InputGroup, ...] = ()

    @property
    def parts(self) -> tuple[InputGroup, ...]:
        """The group in parts whose linears see the same tokens: itself, where there are no experts.

        Whoever judges a linear by what it reads takes these; scale is moved for all at once.
        """
        if not self.routed:
            return (self,)
        apart = {id(linear) for part in self.routed for linear in part.linears}
        rest = tuple(linear for linear in self.linears if id(linear) not in apart)
        return (*((replace(self, linears=rest, routed=()),) if rest else ()), *self.routed)


@dataclass(frozen=True, eq=False)
class Batch:
    """Some calibration samples at a block: ``[samples, tokens, width]``, on the run's device.

    ``inputs`` are what enters the block, of the quantized blocks before it if the run goes on
    through those. ``target`` is what shall leave it. ``real``, bool ``[samples, tokens]``, is false
    where a sample has ended, None if none has. ``tokens`` counts the real ones, those of the same
    batch in other processes too.
    """

    inputs: Tensor
    target: Tensor
    real: Tensor | None
    tokens: int

    def error(self, output: Tensor) -> Tensor:
        """``||output - target||² / (tokens * width)`` over the real tokens: float32 ``[]``.

        Summed over the processes it is the mean square.
        """
        squares = (output.float() - self.target.float()).square()
        if self.real is not None:
            squares = squares * self.real[..., None]
        return squares.sum() / max(1, self.tokens * output.shape[-1])


#: What shall leave a block: what does in the float ``model``, whose blocks before it are float too;
#: what the float ``block`` makes of the inputs that this one has; or the middle of ``both``, which
#: has the gradients of the sum of the errors to one and the other.
Aim = Literal["model", "block", "both"]


class Reconstruction(ABC):
    """A block that can be computed with other parameters, to learn what the float one does.

    Parameters are named in full (``model.layers.0.mlp.up_proj.weight``). All that is made of
    ``values`` here can be differentiated, and changes nothing.
    """

    #: Batches of a pass over the data, the same number in every process.
    steps: int

    @property
    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The float32 parameters of the block as they are now, earlier algorithms' work included.

        They are the block's own: not to be changed in place.
        """

    @abstractmethod
    def batches(self, aim: Aim = "model", among: Sequence[int] | None = None) -> Iterator[Batch]:
        """This process's part of each batch, of all ``steps`` or of those ``among`` them.

        Where it has none, one comes in which no token is real.
        """

    @abstractmethod
    def compute(
        self, values: Mapping[str, Tensor], batch: Batch, *, rounding: bool = True
    ) -> Tensor:
        """What the block makes of ``batch.inputs``: ``[samples, tokens, width]``.

        Parameters that ``values`` lacks are the block's own. With ``rounding``, the inputs of
        linears are rounded as their scheme says, and the gradient goes straight through. In
        float32, but for what ``torch.autocast`` around it takes to another dtype.
        """

    @abstractmethod
    def smoothed(
        self, values: Mapping[str, Tensor], group: InputGroup, scale: Tensor
    ) -> dict[str, Tensor]:
        """What ``Block.smooth`` would make of ``values``, those of all parameters.

        ``scale: [in]``, alike where ``Block.shared`` makes it so.
        """

    @abstractmethod
    def shifted(
        self, values: Mapping[str, Tensor], group: InputGroup, offset: Tensor
    ) -> dict[str, Tensor]:
        """What ``Block.shift`` would make of ``values``, those of all parameters."""

    @abstractmethod
    def total(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors in place by their sums over all processes: gradients, errors."""


@dataclass(eq=False)
class Block:
    """Weights that are quantized together: a decoder block, or one linear of a data-free run.

    ``groups`` are in the order in which the block computes; a data-free run has none. What an
    algorithm appends to ``notes`` is told to the user. ``originals``: the weights that ``replace``
    took the place of, by the name of the linear, scaled since as the new ones were.
    ``reconstruction`` is there where an algorithm of the run ``learns``.
    """

    name: str
    linears: tuple[Linear, ...]
    groups: tuple[InputGroup, ...] = ()
    notes: list[str] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    reconstruction: Reconstruction | None = None

    def shared(self, group: InputGroup, per_channel: Tensor) -> Tensor:
        """``per_channel: [in]``, averaged over channels that can only be scaled together.

        Heads that share values (grouped-query attention) share their scales.
        """
        raise NotImplementedError

    def smooth(self, group: InputGroup, scale: Tensor) -> None:
        """Divide channel ``c`` of the group's input by ``scale[c]``, without changing the output.

        The operation before (a norm, or rows of a linear) is divided, the columns of the group's
        linears are multiplied, and the group's statistics follow. ``scale: [in]``, positive.
        Raises ValueError if ``group.scalable`` is false.
        """
        raise NotImplementedError

    def shift(self, group: InputGroup, offset: Tensor) -> None:
        """Subtract ``offset: [in]`` from the group's input, without changing the output.

        The bias of the norm before takes it, and those of the group's linears give it back.
        Raises ValueError if ``group.shiftable`` is false.
        """
        raise NotImplementedError

    def replace(self, linear: Linear, weight: Tensor) -> None:
        """Go on with another ``weight: [out, in]``, which computes something else (MagR).

        Scales and clips that were chosen for the old one are dropped. Errors that are told to the
        user stay those against the old one, as the block would be without any quantization.
        """
        if weight.shape != linear.weight.shape:
            was, new = list(linear.weight.shape), list(weight.shape)
            raise ValueError(f"{linear.name} is {was}; what shall replace it is {new}")
        self.originals.setdefault(linear.name, linear.weight)
        linear.weight = weight.to(linear.weight.dtype)
        linear.scale = linear.zero = None

    def original(self, linear: Linear) -> Tensor:
        """The weight of ``linear`` that the float block has."""
        return self.originals.get(linear.name, linear.weight)

    def advance(self, codes: Mapping[str, QuantizedWeight]) -> None:
        """Let the linears in ``codes`` compute with them from now on (true-sequential GPTQ).

        The statistics of groups that have other linears are gathered anew: a pass over the data.
        """
        raise NotImplementedError

    def spread(
        self,
        items: Sequence[T],
        work: Callable[[T], R],
        cost: Callable[[T], float] | None = None,
    ) -> list[R]:
        """What ``work`` gives for each item, in order; of several processes each does a part.

        Every process is given all results, so ``work`` must change nothing but give back what it
        found: what pickle takes, with tensors in it. ``cost`` tells how long an item takes, in any
        unit, so that the parts are alike. All processes must call this alike.
        """
        return [work(item) for item in items]
