"""What loaders of GPTQ folders demand, read from the files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from qplug import Exporter, ModelView, Problem, Scheme, loading_problems
from qplug_compressed_tensors.fusing import fused_groups
from qplug_compressed_tensors.packing import unpack_words

if TYPE_CHECKING:
    from qplug import Checkpoint


def problems(
    folder: Checkpoint, model: ModelView, schemes: Mapping[str, Scheme], exporter: Exporter[Any]
) -> Iterator[Problem]:
    """The rules that ``folder`` breaks; numbers are read where nothing else is wrong."""
    fused = fused_groups(model.linears)
    found = list(loading_problems(folder, model, schemes, exporter, scales=["scales"], fused=fused))
    yield from found
    broken = {problem.where for problem in found}
    for name, scheme in schemes.items():
        if name not in broken:
            yield from _numbers(folder, name, model.linears[name], scheme)


def _numbers(
    folder: Checkpoint, name: str, shape: tuple[int, int], scheme: Scheme
) -> Iterator[Problem]:
    """Columns are in order, and zero points where the kernels take them to be."""
    bits, size = scheme.weights.bits, scheme.weights.group_size or shape[1]
    if not torch.equal(folder.read(f"{name}.g_idx"), torch.arange(shape[1]).int() // size):
        yield Problem("g_idx", name, "its columns are reordered: engines refuse it (desc_act)")
    zeros = unpack_words(folder.read(f"{name}.qzeros"), bits, shape[0])
    if not (zeros == 2 ** (bits - 1) - 1).all():
        yield Problem("zero", name, "qzeros is not the middle code less one: kernels ignore it")
