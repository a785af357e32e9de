"""The contracts that plugins are written against.

Importing this module is cheap: torch is named in annotations only. What stands here, in
``qplug.numerics``, ``qplug.clipping``, ``qplug.windows`` and ``qplug.hub_text`` is public;
everything else in ``qplug`` may change without notice.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from qplug.scheme import QuantArgs, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from qplug.checkpoint import Checkpoint

P = TypeVar("P")
Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class NoParams:
    """For components that have nothing to choose."""


class Component(ABC, Generic[P]):
    """A named thing with typed parameters: what every plugin offers.

    ``name`` is what users type: lower case, hyphens. The first line of the class's docstring is
    its one-line description. ``Params`` is a frozen dataclass whose fields are annotated with
    ``Param``; it is the only way in for options, from the command line, YAML and Python alike.
    """

    name: ClassVar[str]
    Params: ClassVar[type] = NoParams

    def __init__(self, params: P) -> None:
        self.params = params

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]


# --- what is known of a model before any weight is read ------------------------------------------


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (torch's name for it, such as ``bfloat16``) and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelView:
    """The skeleton of a checkpoint: its configuration and its matrices, without their values.

    ``linears`` has every weight that multiplies activations, by module name (``model.layers.0.
    mlp.up_proj``), with its shape ``(out, in)``: decoder linears, experts one by one, routers, and
    the head if it is a tensor of its own. ``quantizable`` are those that are quantized unless the
    user says otherwise: neither head nor router. ``blocks`` are the decoder blocks in order.
    ``head`` is the module that makes the logits, also where it is tied to the embedding. ``dtype``
    is that of the float weights.
    """

    config: Mapping[str, Any]
    dtype: str
    linears: Mapping[str, tuple[int, int]]
    quantizable: frozenset[str]
    blocks: tuple[str, ...]
    head: str | None


# --- algorithms ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes, not packed: the only thing that crosses from algorithms to exporters.

    ``codes``: ``[out, in]``; int8 if symmetric, uint8 counted from 0 if not, or the float dtype.
    ``scale``: ``args.scale_shape``, float32, positive, exactly representable in
    ``args.scale_dtype``. ``zero``: uint8, shaped like ``scale``, for asymmetric codes only.
    The weight meant is ``(codes - zero) * scale``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    args: QuantArgs


@dataclass(eq=False)
class Linear:
    """One weight to quantize.

    ``weight``: ``[out, in]``, float32 in a calibrated run, else in the dtype of the checkpoint.
    ``args``: how it is stored; ``activations``: how its input will be rounded, if it will.
    ``scale`` and ``zero`` are those that an algorithm chose (AWQ's clips): shaped as in
    ``QuantizedWeight``; whoever computes codes takes them, ``qplug.numerics.scale_of`` gives the
    covering ones where there are none.
    """

    name: str
    weight: Tensor
    args: QuantArgs
    activations: QuantArgs | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None


@dataclass(eq=False)
class InputGroup:
    """Linears of a block that read one tensor, ``x: [tokens, in]``, and what is known of it.

    ``gram`` is the sum of ``xᵀx`` over all calibration tokens, float32 ``[in, in]``; ``mean``,
    ``mean_abs``, ``low`` and ``high`` are the mean of ``x`` and of ``|x|``, the least and the
    greatest ``x`` of each channel, float32 ``[in]``; ``sample: [some tokens, in]`` are some of the
    tokens, from all over the calibration data, float32. ``scalable`` tells whether ``Block.smooth``
    can move scale out of this tensor, ``shiftable`` whether ``Block.shift`` can move an offset, and
    ``after_norm`` whether it is a norm that makes it.
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


@dataclass(eq=False)
class Block:
    """Weights that are quantized together: a decoder block, or one linear of a data-free run.

    ``groups`` are in the order in which the block computes; a data-free run has none. What an
    algorithm appends to ``notes`` is told to the user.
    """

    name: str
    linears: tuple[Linear, ...]
    groups: tuple[InputGroup, ...] = ()
    notes: list[str] = field(default_factory=list)

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


class Algorithm(Component[P]):
    """A way to quantize. Two stages; an algorithm fills in those it needs.

    ``needs_data`` says whether it reads ``block.groups``. An algorithm changes a block by
    ``block.smooth``, and by choosing ``linear.scale`` and ``linear.zero``; it leaves tensors as
    they are.
    """

    needs_data: ClassVar[bool] = False

    def transform(self, block: Block) -> None:
        """Move scale within a block, and choose clips, before codes are computed."""

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        """Codes for every linear of ``block``, by name."""
        raise NotImplementedError

    @classmethod
    def quantizes(cls) -> bool:
        """Whether this algorithm computes codes itself."""
        return cls.quantize is not Algorithm.quantize


# --- datasets ------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """What datasets need of a tokenizer; those of transformers have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class Dataset(Component[P]):
    """Text, for calibration and for evaluation."""

    #: What stands between two documents when they are read as one text.
    separator: ClassVar[str] = "\n\n"

    @abstractmethod
    def documents(self, split: Split) -> Iterator[str]:
        """The documents, in an order that is always the same. Some may be empty.

        Raises QplugError, before the first document, if the text cannot be had.
        """

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int
    ) -> Iterator[Tensor]:
        """``count`` windows of ``length`` tokens for calibration, int64 ``[length]``.

        The same seed gives the same samples. The default joins all documents, tokenises once
        without special tokens, and draws windows at random.
        """
        from qplug.windows import random_windows

        return random_windows(self, tokenizer, length=length, count=count, seed=seed)


# --- exporters -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capability:
    """One row of what a backend serves: data, so that it can be printed and documented.

    ``scheme``: a preset's name. ``kernel``: what runs it, or why it does not run if ``served`` is
    false. ``group_sizes``: those the kernel takes, -1 for one scale a row; empty where the scheme
    has none to choose. ``out_multiple``, ``in_multiple``: what the sides of a weight must divide
    by. ``evidence``: where this was measured or read.
    """

    scheme: str
    kernel: str
    served: bool = True
    group_sizes: tuple[int, ...] = ()
    out_multiple: int = 1
    in_multiple: int = 1
    evidence: str = ""


@dataclass(frozen=True)
class Problem:
    """A rule of a backend's loader that a folder breaks. ``check`` is the rule's name."""

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.message}"


class Exporter(Component[P]):
    """A format that an engine loads. It packs codes; it never computes one."""

    #: The command that serves a folder, for the model card; ``{}`` stands for the folder.
    serve_command: ClassVar[str | None] = None
    #: Whether ``unpack`` gives back the very codes.
    exact: ClassVar[bool] = True
    #: Whether it stores float weights, as algorithms transformed them: nothing is quantized then,
    #: and ``layout``, ``pack`` and ``unpack`` are never asked.
    stores_float: ClassVar[bool] = False
    #: The ``quant_method`` of folders that this exporter reads though qplug did not write them.
    quant_method: ClassVar[str | None] = None

    @classmethod
    def capabilities(cls) -> Sequence[Capability]:
        """What the engine serves and what it does not."""
        return ()

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        """A sentence that says why this model cannot be served so, or None.

        Asked before any weight is read. ``schemes``: of the linears that are to be quantized.
        """
        return None

    def scale_dtype(self, scheme: Scheme, model_dtype: str) -> str:
        """The dtype in which the scales of weights are stored.

        Engines hold the scales of weight-only schemes in the model's dtype; rounding them before
        the codes are computed makes the codes nearest under the scale that will be used.
        """
        return model_dtype if scheme.activations is None else "float32"

    @abstractmethod
    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        """The tensors that ``pack`` gives for a weight ``shape`` (out, in), by local name."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        """The tensors to store, by local name (``weight_packed``). Pure; ``weight`` stays as is.

        ``dtype``: that of the model's float tensors.
        """

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """The exact inverse of ``pack``."""

    def dequantize(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """The float32 weight ``[out, in]`` that stored tensors stand for."""
        from qplug.numerics import dequantize

        return dequantize(self.unpack(tensors, scheme))

    @abstractmethod
    def config(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any] | None:
        """``quantization_config`` for config.json; None writes none."""

    def stored(self, folder: Checkpoint) -> dict[str, tuple[int, int]]:
        """The linears that ``folder`` holds as codes, with the shapes (out, in) they unpack to."""
        return {}

    def schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        """What a ``quantization_config`` says of each linear, by the engine's own matching.

        Linears that stay float are left out. Raises QplugError for a config the engine refuses.
        """
        raise NotImplementedError

    def check(self, folder: Checkpoint, model: ModelView) -> Iterator[Problem]:
        """The rules of the engine's loader that ``folder`` breaks."""
        return iter(())
