"""Finds float tensors of a folder that are not finite, or overflow the dtype of the model."""

from __future__ import annotations

from qplug.api import Problem
from qplug.checkpoint.finite import Magnitudes
from qplug.checkpoint.names import module_of
from qplug.model.kv_cache import STORED_SCALES
from qplug.reading.folder import Folder


def not_finite(opened: Folder) -> list[Problem]:
    """Returns a problem for each float tensor with NaN, infinite or overflowing values.

    Tensors of quantized linears, and scales of a KV cache, are left to the rules of the format.
    """
    problems = []
    for name, tensor in opened.checkpoint.tensors.items():
        if module_of(name) in opened.schemes and not name.endswith(".bias"):
            continue
        if opened.kv_cache is not None and name.endswith(STORED_SCALES):
            continue
        magnitudes = Magnitudes(name, tensor.spec, opened.view.dtype)
        found = (magnitudes.problem(piece) for piece in tensor.chunks())
        sentence = next((sentence for sentence in found if sentence is not None), None)
        if sentence is not None:
            problems.append(Problem("values", name, sentence.partition(";")[0]))
    return problems
