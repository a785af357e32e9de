"""qplug quantizes large language models for SGLang and vLLM; everything in it is a plugin.

What is importable from here, from ``qplug.numerics``, ``qplug.numerics``, ``qplug.numerics``,
``qplug.api.layout``, ``qplug.numerics``, ``qplug.api.limits``, ``qplug.numerics``,
``qplug.numerics``, ``qplug.numerics``, ``qplug.text`` and ``qplug.text`` is public.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qplug.api import (
    Algorithm,
    Batch,
    Block,
    Capability,
    Dataset,
    Exporter,
    Facing,
    FloatModel,
    Heads,
    InputGroup,
    Linear,
    ModelView,
    NoParams,
    Preparation,
    Problem,
    QuantizedWeight,
    Reconstruction,
    Rewrite,
    Server,
    Split,
    Stream,
    StreamNorm,
    TensorSpec,
    Tokenizer,
    WholeModel,
)
from qplug.api.events import BlockReport, Result
from qplug.api.hookspecs import hookimpl
from qplug.api.params import Param
from qplug.api.scheme import PRESETS, QuantArgs, Scheme, preset
from qplug.errors import PluginError, PluginWarning, QplugError

if TYPE_CHECKING:
    from qplug.checkpoint.open import Checkpoint
    from qplug.checkpoint.tensor_file import StoredTensor
    from qplug.reading.compare import compare
    from qplug.reading.folder import load, load_tokenizer
    from qplug.reading.perplexity import evaluate
    from qplug.reading.verify import verify
    from qplug.recipe.files import read_job
    from qplug.recipe.job import Export, Job, Measurement
    from qplug.run.perform import perform
    from qplug.run.quantize import quantize

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Algorithm",
    "Batch",
    "Block",
    "BlockReport",
    "Capability",
    "Checkpoint",
    "Dataset",
    "Export",
    "Exporter",
    "Facing",
    "FloatModel",
    "Heads",
    "InputGroup",
    "Job",
    "Linear",
    "Measurement",
    "ModelView",
    "NoParams",
    "Param",
    "PluginError",
    "PluginWarning",
    "Preparation",
    "Problem",
    "QplugError",
    "QuantArgs",
    "QuantizedWeight",
    "Reconstruction",
    "Result",
    "Rewrite",
    "Scheme",
    "Server",
    "Split",
    "StoredTensor",
    "Stream",
    "StreamNorm",
    "TensorSpec",
    "Tokenizer",
    "WholeModel",
    "compare",
    "evaluate",
    "hookimpl",
    "load",
    "load_tokenizer",
    "perform",
    "preset",
    "quantize",
    "read_job",
    "verify",
]

#: What plugins do not need, and the module that each lives in: imported when first asked for.
_LAZY = {
    "Checkpoint": "qplug.checkpoint.open",
    "Export": "qplug.recipe.job",
    "Job": "qplug.recipe.job",
    "Measurement": "qplug.recipe.job",
    "compare": "qplug.reading.compare",
    "evaluate": "qplug.reading.perplexity",
    "load": "qplug.reading.folder",
    "load_tokenizer": "qplug.reading.folder",
    "perform": "qplug.run.perform",
    "quantize": "qplug.run.quantize",
    "StoredTensor": "qplug.checkpoint.tensor_file",
    "read_job": "qplug.recipe.files",
    "verify": "qplug.reading.verify",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qplug' has no attribute {name!r}")
