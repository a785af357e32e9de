"""The contracts that plugins are written against.

Importing this module is cheap: torch is named in annotations only. What stands here, in
``qplug.numerics``, ``qplug.numerics``, ``qplug.numerics``, ``qplug.api.layout``, ``qplug.numerics``,
``qplug.api.limits``, ``qplug.numerics``, ``qplug.numerics``, ``qplug.numerics``,
``qplug.numerics``, ``qplug.text`` and ``qplug.text`` is public;
everything else in ``qplug`` may change without notice.
"""

from __future__ import annotations

from qplug.api.algorithm import Algorithm
from qplug.api.block import Aim, Batch, Block, InputGroup, Linear, QuantizedWeight, Reconstruction
from qplug.api.component import Component, NoParams
from qplug.api.dataset import Dataset, Split, Tokenizer
from qplug.api.exporter import Capability, Exporter, Problem, Server
from qplug.api.float_model import (
    Facing,
    FloatModel,
    Heads,
    Preparation,
    Rewrite,
    Stream,
    StreamNorm,
    WholeModel,
)
from qplug.api.model import ModelView, TensorSpec

__all__ = [
    "Aim",
    "Algorithm",
    "Batch",
    "Block",
    "Capability",
    "Component",
    "Dataset",
    "Exporter",
    "Facing",
    "FloatModel",
    "Heads",
    "InputGroup",
    "Linear",
    "ModelView",
    "NoParams",
    "Preparation",
    "Problem",
    "QuantizedWeight",
    "Reconstruction",
    "Rewrite",
    "Server",
    "Split",
    "Stream",
    "StreamNorm",
    "TensorSpec",
    "Tokenizer",
    "WholeModel",
]
