"""What an exporter is: a format, and what is known of the engine that loads it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qplug.api.block import QuantizedWeight
from qplug.api.component import Component, P
from qplug.api.groups import dequantize
from qplug.api.model import ModelView
from qplug.api.scheme import QuantArgs, Scheme
from qplug.api.tensors import Checkpoint, StoredTensor, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class Capability:
    """One row of what a backend serves: data, so that it can be printed and documented.

    ``scheme``: a preset's name. ``kernel``: what runs it, or why it does not run if ``served`` is
    false. ``group_sizes``: those the kernel takes, -1 for one scale a row; empty where the scheme
    has none to choose. ``out_multiple``, ``in_multiple``: what the sides of a weight, or of each
    process's part of it, must divide by. ``evidence``: ``run`` and where and when, or ``not
    run`` and what it was read from. ``engine``: with its version (``vLLM 0.26``). ``devices``: of
    ``qplug.api.limits.DEVICES``, those that the row tells of.
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
        return dequantize(self.unpack(tensors, scheme))

    def computed(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """The float32 weight ``[out, in]`` that the engine multiplies with: what readers take.

        It is what stored tensors stand for, unless a kernel rounds that once more.
        """
        return self.dequantize(tensors, scheme)

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

    def serve_warnings(
        self, schemes: Mapping[str, Scheme], cache: QuantArgs | None
    ) -> Sequence[str]:
        """What the engine gets wrong in silence on this machine, a sentence each.

        ``schemes``: of the linears of a folder; ``cache``: how it has keys and values stored, None
        if they stay float. ``qplug serve`` and ``qplug verify --engine`` tell the user.
        """
        return ()

    def check(self, folder: Checkpoint, model: ModelView) -> Iterator[Problem]:
        """The rules of the engine's loader that ``folder`` breaks."""
        return iter(())
