"""qplug quantizes large language models for SGLang and vLLM; everything in it is a plugin.

What is importable from here, from ``qplug.numerics``, ``qplug.clipping``, ``qplug.hadamard``,
``qplug.laid_out``, ``qplug.learning``, ``qplug.limits``, ``qplug.rotation``,
``qplug.straight_through``, ``qplug.turning``, ``qplug.windows`` and ``qplug.hub_text`` is public.
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
from qplug.errors import PluginError, PluginWarning, QplugError
from qplug.events import BlockReport, Result
from qplug.hookspecs import hookimpl
from qplug.params import Param
from qplug.scheme import PRESETS, QuantArgs, Scheme, preset

if TYPE_CHECKING:
    from qplug.checkpoint import Checkpoint
    from qplug.comparison import compare
    from qplug.configs.job import Export, Job, Measurement
    from qplug.configs.reading import read_job
    from qplug.evaluation import evaluate
    from qplug.job_run import perform
    from qplug.reader import load, load_tokenizer
    from qplug.run import quantize
    from qplug.safetensors_file import StoredTensor
    from qplug.verification import verify

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
    "Checkpoint": "qplug.checkpoint",
    "Export": "qplug.configs.job",
    "Job": "qplug.configs.job",
    "Measurement": "qplug.configs.job",
    "compare": "qplug.comparison",
    "evaluate": "qplug.evaluation",
    "load": "qplug.reader",
    "load_tokenizer": "qplug.reader",
    "perform": "qplug.job_run",
    "quantize": "qplug.run",
    "StoredTensor": "qplug.safetensors_file",
    "read_job": "qplug.configs.reading",
    "verify": "qplug.verification",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qplug' has no attribute {name!r}")
