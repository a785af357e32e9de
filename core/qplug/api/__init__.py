"""The contracts that plugins are written against, and the data that crosses them.

Importing this module is cheap: torch is named in annotations only. Plugins import these names from
``qplug``; ``qplug.api`` itself is private.
"""

from __future__ import annotations

from qplug.api.algorithm import Algorithm
from qplug.api.block import Aim, Batch, Block, InputGroup, Linear, QuantizedWeight, Reconstruction
from qplug.api.capability import Capability
from qplug.api.component import Component, NoParams
from qplug.api.dataset import Conversation, Dataset, Split, Tokenizer
from qplug.api.engine import Engine, Server
from qplug.api.exporter import Exporter
from qplug.api.float_model import (
    FloatModel,
    Preparation,
    Rewrite,
    Stream,
    StreamAxis,
    StreamNorm,
    ValueHeads,
    WholeModel,
)
from qplug.api.format import Format, SingleFile
from qplug.api.layout import Problem, Stacked
from qplug.api.model import BuiltFloat, ModelView, Towers
from qplug.api.reader import CodedTensor, Reader
from qplug.api.suggestion import Suggestion
from qplug.api.tensors import Checkpoint, ComputedTensor, StoredTensor, TensorSpec

__all__ = [
    "Aim",
    "Algorithm",
    "Batch",
    "Block",
    "BuiltFloat",
    "Capability",
    "Checkpoint",
    "CodedTensor",
    "Component",
    "ComputedTensor",
    "Conversation",
    "Dataset",
    "Engine",
    "Exporter",
    "FloatModel",
    "Format",
    "InputGroup",
    "Linear",
    "ModelView",
    "NoParams",
    "Preparation",
    "Problem",
    "QuantizedWeight",
    "Reader",
    "Reconstruction",
    "Rewrite",
    "Server",
    "SingleFile",
    "Split",
    "Stacked",
    "StoredTensor",
    "Stream",
    "StreamAxis",
    "StreamNorm",
    "Suggestion",
    "TensorSpec",
    "Tokenizer",
    "Towers",
    "ValueHeads",
    "WholeModel",
]
