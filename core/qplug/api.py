"""The contracts that plugins are written against.

Importing this module is cheap: torch is named in annotations only. What stands here, in
``qplug.numerics``, ``qplug.clipping``, ``qplug.hadamard``, ``qplug.laid_out``, ``qplug.learning``,
``qplug.limits``, ``qplug.rotation``, ``qplug.stored_scales``, ``qplug.straight_through``,
``qplug.turning``, ``qplug.windows`` and ``qplug.hub_text`` is public;
everything else in ``qplug`` may change without notice.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from qplug.scheme import QuantArgs, Scheme

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from qplug.checkpoint import Checkpoint
    from qplug.safetensors_file import StoredTensor

P = TypeVar("P")
T = TypeVar("T")
R = TypeVar("R")
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


# --- a float model, rewritten before it is quantized ---------------------------------------------


@dataclass(frozen=True)
class StreamNorm:
    """A norm of the residual stream that linears read, and nothing else.

    It multiplies by ``offset`` (0, or 1 in Gemma) plus the tensor ``weight``, and adds ``bias``.
    ``readers`` are the tensors that read it.
    """

    weight: str
    bias: str | None
    offset: float
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Facing:
    """One axis of a tensor is the residual stream: it writes into it, or reads a norm of it.

    ``axis`` is counted from 0. ``norm`` is the norm that is read; None for what writes: embeddings,
    output projections and their biases. ``bias`` takes an offset of what is read, if there is one.
    """

    axis: int
    norm: str | None
    bias: str | None = None


@dataclass(frozen=True)
class Heads:
    """Values that only meet one projection, so that each head can be turned.

    ``rows: [heads, size]`` (int64) are the rows of the tensor ``values`` (and places of its bias)
    that make a head; the columns of ``output`` are heads of the same ``size``, one after another.
    """

    values: str
    bias: str | None
    rows: Tensor
    output: str
    size: int


@dataclass(frozen=True)
class Stream:
    """What faces the residual stream of a model, by the names of tensors on disk.

    ``centred`` tells whether norms subtract the mean. ``copies`` are tensors that have to be made
    of others, by name, because the head is tied to the embedding: rewriting one would change both.
    """

    width: int
    centred: bool
    norms: Mapping[str, StreamNorm]
    tensors: Mapping[str, Facing]
    heads: tuple[Heads, ...]
    copies: Mapping[str, str]


@dataclass(frozen=True)
class FloatModel:
    """A checkpoint to be rewritten. ``tensors`` are those that it holds, by name.

    ``learned`` is what ``Algorithm.learn`` gave; None while nothing has been learned.
    """

    view: ModelView
    tensors: Mapping[str, TensorSpec]
    stream: Stream
    learned: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Rewrite:
    """How a tensor is made of tensors of the checkpoint.

    ``make`` takes the tensors named in ``sources``, in float32, and gives the new one in float32;
    it is shaped like the first, and stored in its dtype. ``by_row``: row ``r`` of the result needs
    row ``r`` of the first source and no other, so that a large one is made a few rows at a time.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor]
    by_row: bool = False


@dataclass(frozen=True)
class Preparation:
    """A float model rewritten so that it computes what it did before.

    ``rewrites`` are by name; names that the checkpoint lacks are added. ``config`` are fields of
    config.json with other values. ``online`` are linears whose inputs are multiplied by the
    Hadamard matrix of their width (``qplug.hadamard.transform``) as the model runs: no engine does.
    """

    rewrites: Mapping[str, Rewrite]
    config: Mapping[str, Any] = field(default_factory=dict)
    online: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class WholeModel(ABC):
    """The float model, all of it in memory, as a preparation would have it compute.

    For what is to be learned of the model as a whole. Activations are kept of one block at a time.
    """

    #: Batches of calibration samples that there are.
    count: int
    #: Where it is computed.
    device: torch.device

    @abstractmethod
    def loss(self, made: Preparation, batch: int, *, weights: bool = False) -> Tensor:
        """How far what the model predicts is from what the float one does: float32 ``[]``.

        The mean divergence ``KL(float || rounded)`` of the next token, in nats, over the real
        tokens of batch ``batch``. The model is rewritten by ``made``, and the inputs of its linears
        are rounded as their scheme says; with ``weights`` these are too, to nearest. It computes in
        float32, but for what ``torch.autocast`` around it takes to another dtype. Gradients reach
        whatever the rewrites are made of, straight through the rounding and through the peaks that
        scales are made of.
        """


# --- algorithms ----------------------------------------------------------------------------------


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


class Algorithm(Component[P]):
    """A way to quantize. Three stages; an algorithm fills in those it needs.

    ``needs_data`` says whether it reads ``block.groups``. An algorithm changes a block by
    ``block.smooth``, ``block.shift`` and ``block.replace``, and by choosing ``linear.scale`` and
    ``linear.zero``; it leaves tensors as they are. ``learns`` says whether it reads
    ``block.reconstruction``, for which what enters and what shall leave the block is kept; it
    ``needs_data`` then too, and so does one that defines ``learn``.
    """

    needs_data: ClassVar[bool] = False
    learns: ClassVar[bool] = False

    @property
    def needs_drift(self) -> bool:
        """Whether it reads ``InputGroup.drift``, for which the float model runs beside."""
        return False

    @property
    def settles(self) -> frozenset[str]:
        """What it chooses once for all, in words: ``the scales of inputs``.

        Two algorithms of a pipeline that settle the same are refused: the later would undo what the
        earlier chose. One that starts from what others chose, and goes on from there, settles none.
        """
        return frozenset()

    def refuses(self, schemes: Sequence[Scheme]) -> str | None:
        """A sentence that says why it makes no sense for a recipe with ``schemes``, or None.

        Asked before any work. ``schemes``: that of the model, then those of overrides.
        """
        return None

    def prepare(self, model: FloatModel) -> Preparation:
        """Rewrite the float model, tensor by tensor, without a change of what it computes.

        Also called for a small random copy of the model, on which what it gives is tried. With
        ``model.learned`` it rewrites the same tensors as without.
        """
        raise NotImplementedError

    def learn(self, model: FloatModel, whole: WholeModel) -> Mapping[str, Tensor]:
        """What ``prepare`` shall go by, learned on the calibration data: tensors, by any name.

        Called once in a run, by its first process, when all else has been checked; what it gives
        is kept with the unfinished output, and comes back as ``FloatModel.learned``.
        """
        raise NotImplementedError

    def transform(self, block: Block) -> None:
        """Move scale within a block, and choose clips, before codes are computed."""

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        """Codes for every linear of ``block``, by name."""
        raise NotImplementedError

    @classmethod
    def quantizes(cls) -> bool:
        """Whether this algorithm computes codes itself."""
        return cls.quantize is not Algorithm.quantize

    @classmethod
    def prepares(cls) -> bool:
        """Whether this algorithm rewrites the float model."""
        return cls.prepare is not Algorithm.prepare

    @classmethod
    def learns_whole(cls) -> bool:
        """Whether this algorithm learns on the whole float model how to rewrite it."""
        return cls.learn is not Algorithm.learn


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

        A window may be shorter, as a text may; what it is then filled up with enters no statistics.
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
    has none to choose. ``out_multiple``, ``in_multiple``: what the sides of a weight, or of each
    process's part of it, must divide by. ``evidence``: ``run`` and where and when, or ``not
    run`` and what it was read from. ``engine``: with its version (``vLLM 0.26``). ``devices``: of
    ``qplug.limits.DEVICES``, those that the row tells of.
    """

    scheme: str
    kernel: str
    served: bool = True
    group_sizes: tuple[int, ...] = ()
    out_multiple: int = 1
    in_multiple: int = 1
    evidence: str = ""
    engine: str = ""
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A rule of a backend's loader that a folder breaks. ``check`` is the rule's name."""

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.message}"


@dataclass(frozen=True)
class Server:
    """How an engine's server of OpenAI's API is started: ``python -m MODULE FOLDER_OPTION DIR``.

    ``package``: what can be imported where the engine is installed. ``brief``: options for a server
    that answers a few prompts and ends: it starts faster, and computes every token anew.
    """

    package: str
    module: str
    folder_option: str
    brief: tuple[str, ...] = ()


class Exporter(Component[P]):
    """A format that an engine loads. It packs codes; it never computes one."""

    #: The command that serves a folder, for the model card; ``{}`` stands for the folder.
    serve_command: ClassVar[str | None] = None
    #: How ``qplug serve`` starts the engine; None where this is the format of no one engine.
    server: ClassVar[Server | None] = None
    #: Whether ``unpack`` gives back the very codes.
    exact: ClassVar[bool] = True
    #: Whether what reads the folder can rotate the inputs of linears (``Preparation.online``).
    rotates_online: ClassVar[bool] = False
    #: Whether an engine computes with what is stored. Where none does, floats may be rounded as no
    #: engine rounds them (``use_qtorch``).
    served: ClassVar[bool] = True
    #: Whether it stores float weights, as algorithms transformed them: nothing is quantized then,
    #: and ``layout``, ``pack`` and ``unpack`` are never asked.
    stores_float: ClassVar[bool] = False
    #: The file that stands in the place of safetensors files, if the engine reads one
    #: (``model.gguf``): ``write`` makes it of them, and ``read`` tells of its tensors.
    file: ClassVar[str | None] = None
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

    def refuses_files(self, folder: Path) -> str | None:
        """A sentence that says why what lies beside the weights cannot be stored, or None.

        Asked as ``refuses``, of the folder of the float model: for formats that take its tokenizer
        in.
        """
        return None

    def write(
        self, finished: Checkpoint, model: ModelView, schemes: Mapping[str, Scheme], path: Path
    ) -> None:
        """Write ``path``, called ``file``, of all tensors of a run, packed ones and float ones.

        Read them one by one: together they may be more than memory. ``finished.folder`` has
        config.json and the tokenizer too. For those that have a ``file``; when this returns, the
        safetensors files are removed.
        """
        raise NotImplementedError

    def read(self, path: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
        """The tensors in a ``path`` that ``write`` wrote, by the names that they were given.

        Raises QplugError if the file is not sound. For those that have a ``file``.
        """
        raise NotImplementedError

    def scale_dtype(self, scheme: Scheme, model_dtype: str) -> str:
        """The dtype in which the scales of weights are stored.

        Engines hold the scales of weight-only schemes in the model's dtype; rounding them before
        the codes are computed makes the codes nearest under the scale that will be used.
        """
        return model_dtype if scheme.activations is None else "float32"

    def merged(self, names: Sequence[str]) -> list[list[str]]:
        """The groups of linears among ``names`` that the engine makes one matrix of.

        Where scales have two levels, those of a group get the same global scale.
        """
        return []

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

    def input_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The scale of static inputs, float32 ``[1]``, among stored tensors; None if it is not."""
        stored = tensors.get("input_scale")
        return None if stored is None else stored.float().reshape(1)

    @abstractmethod
    def config(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any] | None:
        """``quantization_config`` for config.json; None writes none."""

    def refuses_cache(self, cache: QuantArgs) -> str | None:
        """A sentence that says why the scales of a KV cache cannot be stored, or None.

        Stored they are as ``k_scale`` and ``v_scale`` of each attention module, float32 ``[1]``.
        """
        return f"has no place for the scales of a KV cache in {cache.dtype}"

    def with_cache(self, config: dict[str, Any] | None, cache: QuantArgs) -> dict[str, Any] | None:
        """``quantization_config`` with what it has to say of the KV cache."""
        return config

    def cache(self, config: Mapping[str, Any]) -> QuantArgs | None:
        """How the KV cache is stored by a ``quantization_config``; None if it stays float."""
        return None

    def stored(self, folder: Checkpoint) -> dict[str, tuple[int, int]]:
        """The linears that ``folder`` holds as codes, with the shapes (out, in) they unpack to."""
        return {}

    def schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        """What a ``quantization_config`` says of each linear, by the engine's own matching.

        Linears that stay float are left out. Raises QplugError for a config the engine refuses.
        """
        raise NotImplementedError

    def serve_arguments(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The options that the engine needs to serve a folder with this ``config.json``."""
        return ()

    def check(self, folder: Checkpoint, model: ModelView) -> Iterator[Problem]:
        """The rules of the engine's loader that ``folder`` breaks."""
        return iter(())
