"""What loaders of AWQ folders demand, read from the files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from qplug import Exporter, ModelView, Problem, Scheme
from qplug.laid_out import layout_problems
from qplug.limits import Target, shape_problem
from qplug_compressed_tensors.fusing import fused_groups

if TYPE_CHECKING:
    from qplug.checkpoint import Checkpoint


def problems(
    folder: Checkpoint, model: ModelView, schemes: Mapping[str, Scheme], exporter: Exporter[Any]
) -> Iterator[Problem]:
    """The rules that ``folder`` breaks; numbers are read where the layout is right."""
    found = list(layout_problems(folder, model, schemes, exporter))
    yield from found
    for group in fused_groups(model.linears):
        if len({name in schemes for name in group}) > 1:
            yield Problem("fused", ", ".join(group[:3]), "are merged, but not all are quantized")
    broken = {problem.where for problem in found}
    for name, scheme in schemes.items():
        sentence = shape_problem(exporter.capabilities(), name, model, scheme, Target())
        if sentence is not None:
            yield Problem("kernel", name, sentence)
        if name in broken:
            continue
        scales = folder.read(f"{name}.scales").float()
        if not (torch.isfinite(scales) & (scales > 0)).all():
            yield Problem("scale", name, "a scale is zero, negative, or not finite")
