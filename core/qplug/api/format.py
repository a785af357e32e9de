"""What a format is: how quantized weights are stored, and how they are read back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qplug.api.block import QuantizedWeight
from qplug.api.groups import dequantize
from qplug.api.layout import Problem, Stacked, layout_problems
from qplug.api.model import ModelView
from qplug.api.scheme import QuantArgs, Scheme
from qplug.api.tensors import Checkpoint, StoredTensor, TensorSpec
from qplug.errors import QplugError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class SingleFile(ABC):
    """The one file that replaces safetensors files, for engines that read such a file."""

    #: Its name in the folder, such as ``model.gguf``.
    name: ClassVar[str]

    def refuses(self, folder: Path) -> str | None:
        """Why the other files of the float model in ``folder`` cannot be stored; None if they can.

        A file that contains the tokenizer refuses tokenizers that it has no place for. The run
        asks before it reads any weight.
        """
        return None

    @abstractmethod
    def write(
        self, finished: Checkpoint, model: ModelView, schemes: Mapping[str, Scheme], path: Path
    ) -> None:
        """Write ``path`` from all tensors of a run, packed ones and float ones.

        Read them one by one: together they may exceed the memory. ``finished.folder`` has
        config.json and the tokenizer too. The run removes the safetensors files afterwards.
        """

    @abstractmethod
    def read(self, path: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
        """The tensors in a ``path`` that ``write`` wrote, by the names that ``write`` was given.

        ``config``: config.json. Raises QplugError if the file is not sound.
        """


class Format(ABC):
    """How the weights of a folder are stored: names, dtypes and shapes, and ``config.json``.

    A format is a constant: exporters share one object, and methods depend on arguments alone. It
    knows no engine: an ``Engine`` says what loads the folder and what its kernels take.
    """

    #: The ``quant_method`` in the ``quantization_config`` of folders in this format.
    quant_method: ClassVar[str | None] = None
    #: Whether ``unpack`` returns the very codes and scales that ``pack`` was given.
    is_lossless: ClassVar[bool] = True
    #: Whether it stores float weights, as algorithms transformed them: nothing is quantized then,
    #: and nobody calls ``layout``, ``pack`` and ``unpack``.
    stores_float: ClassVar[bool] = False
    #: The one file that replaces safetensors files; None if the format has no such file.
    single_file: ClassVar[SingleFile | None] = None
    #: The local names of scales, which must be positive and finite in a sound folder.
    scales: ClassVar[tuple[str, ...]] = ()

    # --- what it can hold ------------------------------------------------------------------------

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        """Why the format has no place for these linears, as a sentence; None if it has.

        ``schemes``: by linear, of those that are to be quantized. The run asks before it reads any
        weight.
        """
        return None

    def refuses_cache(self, cache: QuantArgs) -> str | None:
        """Why the scales of a KV cache cannot be stored, as a sentence; None if they can.

        They are stored as ``k_scale`` and ``v_scale`` of each attention module, float32 ``[1]``.
        """
        return f"has no place for the scales of a KV cache in {cache.dtype}"

    def scale_dtype(self, scheme: Scheme, model_dtype: str) -> str:
        """The dtype in which the scales of weights are stored.

        Engines hold the scales of weight-only schemes in the model's dtype; rounding them before
        the codes are computed makes the codes nearest under the scale that will be used.
        """
        return model_dtype if scheme.activations is None else "float32"

    # --- one weight ------------------------------------------------------------------------------

    @abstractmethod
    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        """The tensors that ``pack`` makes of a weight ``shape`` (out, in), by local name."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        """The tensors to store, by local name (``weight_packed``). Pure: ``weight`` is not changed.

        ``dtype``: of the model's float tensors.
        """

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """The exact inverse of ``pack``."""

    def dequantize(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """The float32 weight ``[out, in]`` that stored tensors stand for."""
        return dequantize(self.unpack(tensors, scheme))

    def input_scale(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor | None:
        """The scale of static inputs, float32 ``[1]``; None if ``tensors`` have none.

        ``tensors``: of one linear, by local name; at least those named ``input_*``.
        """
        stored = tensors.get("input_scale")
        return None if stored is None else stored.float().reshape(1)

    # --- experts in one tensor -------------------------------------------------------------------

    def stacked(self, tensors: Collection[str]) -> dict[str, Stacked]:
        """The tensors that the format stores for the experts of a layer together, by name.

        ``tensors``: the names of all tensors of a folder, as ``layout`` and the float model give
        them to each linear. The run computes linears as usual, and joins their tensors.
        """
        return {}

    def unstacked(self, tensors: Mapping[str, TensorSpec]) -> dict[str, Stacked]:
        """The inverse of ``stacked``, for the tensors that a folder stores."""
        return {}

    # --- config.json -----------------------------------------------------------------------------

    def config(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any] | None:
        """``quantization_config`` for config.json; None writes none."""
        return None

    def with_cache(self, config: dict[str, Any] | None, cache: QuantArgs) -> dict[str, Any] | None:
        """``quantization_config`` with an entry for the KV cache."""
        return config

    def read_schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        """The scheme of each linear that a ``quantization_config`` quantizes, by linear.

        Raises QplugError for a config that engines refuse, or that is another format's.
        """
        raise QplugError("a folder with a quantization_config is another backend's")

    def read_cache(self, config: Mapping[str, Any]) -> QuantArgs | None:
        """How a ``quantization_config`` stores the KV cache; None if it stays float."""
        return None

    def quantizes_experts(self, config: Mapping[str, Any], name: str) -> bool:
        """Whether a ``quantization_config`` makes engines build experts with codes.

        ``name`` is the engines' name of all experts of a layer: ``model.layers.0.mlp.experts``.
        """
        return False

    # --- a folder --------------------------------------------------------------------------------

    def stored_shapes(self, folder: Checkpoint) -> dict[str, tuple[int, int]]:
        """The linears that ``folder`` holds as codes, with the shapes (out, in) they unpack to.

        Linears whose codes have the name and the shape of the float weight may be left out.
        """
        return {}

    def check_folder(self, folder: Checkpoint, model: ModelView) -> Iterator[Problem]:
        """The rules of the format that ``folder`` breaks.

        By default: each linear has the tensors of ``layout``, and sound ``scales``.
        """
        config = folder.config.get("quantization_config")
        if config is not None:
            schemes = self.read_schemes(config, model)
            yield from layout_problems(folder, model, schemes, self, scales=self.scales)
        elif self.quant_method is not None:
            yield Problem("format", "config.json", "has no quantization_config")
