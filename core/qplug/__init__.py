"""qplug quantizes large language models for SGLang and vLLM; everything in it is a plugin.

What is importable from here, from ``qplug.numerics``, ``qplug.text``, ``qplug.testing`` and
``qplug.hookspecs`` is public; each lists its names in ``__all__``. All else may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qplug.api import (
    Aim,
    Algorithm,
    Batch,
    Block,
    BuiltFloat,
    Capability,
    Checkpoint,
    CodedTensor,
    Component,
    ComputedTensor,
    Conversation,
    Dataset,
    Engine,
    Exporter,
    FloatModel,
    Format,
    InputGroup,
    Linear,
    ModelView,
    NoParams,
    Preparation,
    Problem,
    QuantizedWeight,
    Reader,
    Reconstruction,
    Rewrite,
    Server,
    SingleFile,
    Split,
    Stacked,
    StoredTensor,
    Stream,
    StreamAxis,
    StreamNorm,
    Suggestion,
    TensorSpec,
    Tokenizer,
    Towers,
    ValueHeads,
    WholeModel,
)
from qplug.api.events import (
    BlockReport,
    Estimate,
    Quality,
    Result,
    RunPlan,
    RunStart,
    StageCost,
)
from qplug.api.gpus import DEVICES
from qplug.api.hookspecs import hookimpl
from qplug.api.layout import kernel_problems, layout_problems
from qplug.api.limits import Target, beyond_limits, shape_problem
from qplug.api.old_paths import forward_old_paths
from qplug.api.params import Param
from qplug.api.scheme import (
    E4M3_SCALES,
    E8M0_SCALES,
    FLOAT_MAX,
    FLOATS,
    PRESETS,
    QuantArgs,
    Scheme,
    preset,
)
from qplug.errors import PluginError, PluginWarning, QplugError

if TYPE_CHECKING:
    from qplug.checkpoint.open import open_checkpoint
    from qplug.checkpoint.tensor_file import FileTensor
    from qplug.evaluation.tasks import TaskRow, TaskScores, evaluate_tasks
    from qplug.model.tokenizer import load_tokenizer
    from qplug.reading.compare import Comparison, compare
    from qplug.reading.load import load
    from qplug.reading.perplexity import Evaluation, evaluate
    from qplug.reading.verify import Verification, verify
    from qplug.recipe.files import read_job
    from qplug.recipe.recipe import Export, Job, Measurement, Recipe
    from qplug.registry.registry import Registry
    from qplug.run.convert import convert
    from qplug.run.perform import perform
    from qplug.run.quantize import quantize

__version__ = "0.1.0"

__all__ = [
    "DEVICES",
    "E4M3_SCALES",
    "E8M0_SCALES",
    "FLOATS",
    "FLOAT_MAX",
    "PRESETS",
    "Aim",
    "Algorithm",
    "Batch",
    "Block",
    "BlockReport",
    "BuiltFloat",
    "Capability",
    "Checkpoint",
    "CodedTensor",
    "Comparison",
    "Component",
    "ComputedTensor",
    "Conversation",
    "Dataset",
    "Engine",
    "Estimate",
    "Evaluation",
    "Export",
    "Exporter",
    "FileTensor",
    "FloatModel",
    "Format",
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
    "Quality",
    "QuantArgs",
    "QuantizedWeight",
    "Reader",
    "Recipe",
    "Reconstruction",
    "Registry",
    "Result",
    "Rewrite",
    "RunPlan",
    "RunStart",
    "Scheme",
    "Server",
    "SingleFile",
    "Split",
    "Stacked",
    "StageCost",
    "StoredTensor",
    "Stream",
    "StreamAxis",
    "StreamNorm",
    "Suggestion",
    "Target",
    "TaskRow",
    "TaskScores",
    "TensorSpec",
    "Tokenizer",
    "Towers",
    "ValueHeads",
    "Verification",
    "WholeModel",
    "beyond_limits",
    "compare",
    "convert",
    "evaluate",
    "evaluate_tasks",
    "hookimpl",
    "kernel_problems",
    "layout_problems",
    "load",
    "load_tokenizer",
    "open_checkpoint",
    "perform",
    "preset",
    "quantize",
    "read_job",
    "shape_problem",
    "verify",
]

#: Names that plugins do not need, and the module of each: imported when first asked for.
_LAZY = {
    "Comparison": "qplug.reading.compare",
    "Evaluation": "qplug.reading.perplexity",
    "Export": "qplug.recipe.recipe",
    "FileTensor": "qplug.checkpoint.tensor_file",
    "Job": "qplug.recipe.recipe",
    "Measurement": "qplug.recipe.recipe",
    "Recipe": "qplug.recipe.recipe",
    "Registry": "qplug.registry.registry",
    "TaskRow": "qplug.evaluation.tasks",
    "TaskScores": "qplug.evaluation.tasks",
    "Verification": "qplug.reading.verify",
    "compare": "qplug.reading.compare",
    "convert": "qplug.run.convert",
    "evaluate": "qplug.reading.perplexity",
    "evaluate_tasks": "qplug.evaluation.tasks",
    "load": "qplug.reading.load",
    "load_tokenizer": "qplug.model.tokenizer",
    "open_checkpoint": "qplug.checkpoint.open",
    "perform": "qplug.run.perform",
    "quantize": "qplug.run.quantize",
    "read_job": "qplug.recipe.files",
    "verify": "qplug.reading.verify",
}


if not TYPE_CHECKING:  # a type checker would take any name for one of this module

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            from importlib import import_module

            return getattr(import_module(_LAZY[name]), name)
        raise AttributeError(f"module 'qplug' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


forward_old_paths()
