"""A decoder block as algorithms see it: its linears, and statistics of their inputs."""

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
    """A weight as codes, not packed: the only data that algorithms pass to exporters.

    ``codes``: ``[out, in]``; int8 if symmetric, uint8 counted from 0 if asymmetric, or the float
    dtype. ``scale``: float32 ``args.scale_shape``, positive, exactly representable in
    ``args.scale_dtype``. ``zero``: uint8, shaped like ``scale``, for asymmetric codes only. The
    weight is ``(codes - zero) * scale``.

    The run fills in the next two. ``input_scale``: float32 ``[1]``, the scale under which the
    linear's input is rounded, if the scheme stores one. ``global_scale``: float32 ``[1]``, a power
    of two, if ``args.two_level``; then ``scale / global_scale`` is exact in ``args.scale_dtype``.
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
    ``args``: how the weight is stored. ``activations``: how its input is rounded, None if it is
    not.

    ``scale`` and ``zero``, shaped as in ``QuantizedWeight``, are set by an algorithm that chooses
    them (AWQ's clips); the algorithm that computes codes uses them. Where they are None,
    ``qplug.numerics.scale_of`` gives scales that cover the weight. ``input_scale``: float32
    ``[1]``, for static inputs; an algorithm may set it, else the run's observer does once no scale
    moves any more. ``global_scale``: float32 ``[1]``, for scales with two levels; the run sets it
    before codes are computed, to one value for all linears that the engine merges.
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
    """Linears of a block that read one tensor ``x: [tokens, in]``, and the statistics of ``x``.

    All statistics are float32, over all calibration tokens. ``gram``: the sum of ``xᵀx``, ``[in,
    in]``. ``mean``, ``mean_abs``, ``low``, ``high``: the mean of ``x`` and of ``|x|``, the least
    and the greatest ``x`` of each channel, ``[in]``. ``sample``: some of the tokens, ``[rows,
    in]``, from all over the calibration data. ``lows``, ``highs``: ``low`` and ``high`` of each
    calibration window, ``[windows, in]``; None unless a linear of the group has static inputs.
    ``tokens``: the number of tokens; if it is 0, all statistics are zero.

    ``scalable``: whether ``Block.smooth`` can move scale out of ``x``. ``shiftable``: whether
    ``Block.shift`` can move an offset out of it. ``after_norm``: whether a norm makes ``x``.

    ``by_expert``: if experts are among ``linears``, a group for each of them, with the statistics
    of the tokens that were routed to it; no scale can be moved out of these groups. ``experts``:
    the name of a layer's experts if the reader is inside one of them; such groups follow one
    another, and compute side by side.

    ``drift``, ``[in, in]``, and ``total_shift``, ``[in]``, are there if an algorithm
    ``needs_drift`` and blocks get their inputs from quantized blocks: the sums of ``xᵀ(y - x)`` and
    of ``y - x``, where ``y`` is the same tensor in the float model.
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
    total_shift: Tensor | None = None
    lows: Tensor | None = None
    highs: Tensor | None = None
    experts: str | None = None
    by_expert: tuple[InputGroup, ...] = ()

    @property
    def width(self) -> int:
        """The number of channels of the input."""
        return len(self.mean)

    @property
    def by_tokens(self) -> tuple[InputGroup, ...]:
        """The group divided into groups whose linears see the same tokens.

        Without experts that is the group itself. Use these groups to judge a linear by its inputs;
        scale can only be moved for the whole group at once.
        """
        if not self.by_expert:
            return (self,)
        of_experts = {id(linear) for group in self.by_expert for linear in group.linears}
        rest = tuple(linear for linear in self.linears if id(linear) not in of_experts)
        return (*((replace(self, linears=rest, by_expert=()),) if rest else ()), *self.by_expert)


@dataclass(frozen=True, eq=False)
class Batch:
    """Some calibration samples at a block: ``[samples, tokens, width]``, on the run's device.

    ``inputs`` enter the block; they come from quantized blocks if the run propagates through these.
    ``target``: the output to aim at. ``real``, bool ``[samples, tokens]``, is false for padding and
    for tokens that ``--mask`` leaves out; None if there are none. ``tokens``: the number of real
    tokens, over all processes.
    """

    inputs: Tensor
    target: Tensor
    real: Tensor | None
    tokens: int

    def error(self, output: Tensor) -> Tensor:
        """``||output - target||² / (tokens * width)`` over the real tokens: float32 ``[]``.

        The sum over all processes is the mean square error.
        """
        squares = (output.float() - self.target.float()).square()
        if self.real is not None:
            squares = squares * self.real[..., None]
        return squares.sum() / max(1, self.tokens * output.shape[-1])


#: The target of a reconstruction. "model": the block's output in the float model. "block": the
#: float block's output for the quantized block's inputs. "both": their mean, whose gradient is that
#: of the two errors summed.
Aim = Literal["model", "block", "both"]


class Reconstruction(ABC):
    """A block that can be computed with other parameters, to learn to compute like the float one.

    Parameters go by full name (``model.layers.0.mlp.up_proj.weight``). All results are
    differentiable functions of ``values``, and no method changes the block.
    """

    #: The number of batches in a pass over the data, the same in every process.
    steps: int

    @property
    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The current float32 parameters of the block, as earlier algorithms left them.

        They are the block's own tensors: do not change them in place.
        """

    @abstractmethod
    def batches(self, aim: Aim = "model", among: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yields this process's part of each batch: of all ``steps``, or of those in ``among``.

        If the process has no part of a batch, it gets a batch without real tokens.
        """

    @abstractmethod
    def compute(
        self, values: Mapping[str, Tensor], batch: Batch, *, rounding: bool = True
    ) -> Tensor:
        """The output of the block for ``batch.inputs``, ``[samples, tokens, width]``.

        Parameters missing in ``values`` are the block's own. ``rounding`` rounds the inputs of
        linears as their schemes say, with straight-through gradients. Computes in float32, unless
        ``torch.autocast`` is active.
        """

    @abstractmethod
    def smoothed(
        self, values: Mapping[str, Tensor], group: InputGroup, scale: Tensor
    ) -> dict[str, Tensor]:
        """All parameters after ``Block.smooth(group, scale)``, computed from all ``values``.

        ``scale: [in]``, as ``Block.shared`` returns it.
        """

    @abstractmethod
    def shifted(
        self, values: Mapping[str, Tensor], group: InputGroup, offset: Tensor
    ) -> dict[str, Tensor]:
        """All parameters after ``Block.shift(group, offset)``, computed from all ``values``."""

    @abstractmethod
    def total(self, tensors: Sequence[Tensor]) -> None:
        """Replace gradients or errors in place by their sums over all processes."""


@dataclass(eq=False)
class Block:
    """Weights that are quantized together: a decoder block, or one linear of a data-free run.

    ``groups`` are in the order in which the block computes; a data-free run has none. Append
    messages for the user to ``notes``. ``originals``: the weights before ``replace``, by linear,
    scaled since as the new weights were. ``reconstruction`` is there if an algorithm of the run has
    ``learns_blocks``. ``processes``: how many share the work of ``spread``.
    """

    name: str
    linears: tuple[Linear, ...]
    groups: tuple[InputGroup, ...] = ()
    notes: list[str] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    reconstruction: Reconstruction | None = None
    processes: int = 1

    def shared(self, group: InputGroup, per_channel: Tensor) -> Tensor:
        """``per_channel: [in]``, averaged over channels that can only be scaled together.

        Heads that share values (grouped-query attention) share their scales.
        """
        raise NotImplementedError

    def smooth(self, group: InputGroup, scale: Tensor) -> None:
        """Divide channel ``c`` of the group's input by ``scale[c]``, without changing the output.

        The producer of the input (a norm, or rows of a linear) is divided, the columns of the
        group's linears are multiplied, and the group's statistics are updated. ``scale: [in]``,
        positive. Raises ValueError if ``group.scalable`` is false.
        """
        raise NotImplementedError

    def shift(self, group: InputGroup, offset: Tensor) -> None:
        """Subtract ``offset: [in]`` from the group's input, without changing the output.

        The bias of the norm before takes the offset, and the biases of the group's linears undo it.
        Raises ValueError if ``group.shiftable`` is false.
        """
        raise NotImplementedError

    def replace(self, linear: Linear, weight: Tensor) -> None:
        """Use another ``weight: [out, in]`` for ``linear``, which computes other outputs (MagR).

        Scales chosen for the old weight are dropped. Reported errors stay relative to the old
        weight. Raises ValueError if the shape differs.
        """
        if weight.shape != linear.weight.shape:
            was, new = list(linear.weight.shape), list(weight.shape)
            raise ValueError(f"{linear.name} is {was}, but its replacement is {new}")
        self.originals.setdefault(linear.name, linear.weight)
        linear.weight = weight.to(linear.weight.dtype)
        linear.scale = linear.zero = None

    def original(self, linear: Linear) -> Tensor:
        """The weight of ``linear`` in the float block."""
        return self.originals.get(linear.name, linear.weight)

    def use_codes(self, codes: Mapping[str, QuantizedWeight]) -> None:
        """From now on, compute the linears in ``codes`` with these (true-sequential GPTQ).

        The statistics of groups with other linears are gathered again: a pass over the data.
        """
        raise NotImplementedError

    def spread(
        self,
        items: Sequence[T],
        work: Callable[[T], R],
        cost: Callable[[T], float] | None = None,
    ) -> list[R]:
        """``work(item)`` for all items, in order; each of several processes does a part.

        Every process gets all results, so ``work`` must have no side effects, and must return
        values that pickle takes, tensors included. ``cost``: the expected time of an item in any
        unit, by which the work is divided. All processes must make the same call.
        """
        return [work(item) for item in items]
