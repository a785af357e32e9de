"""Has a folder just the tensors that an exporter lays out? (Public: for ``Exporter.check``.)"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qplug.api import Exporter, ModelView, Problem
from qplug.scheme import Scheme

if TYPE_CHECKING:
    from qplug.checkpoint import Checkpoint

_FLOATS = ("bfloat16", "float16", "float32")


def layout_problems(
    folder: Checkpoint, model: ModelView, schemes: Mapping[str, Scheme], exporter: Exporter[Any]
) -> Iterator[Problem]:
    """What is missing, too much, or of another dtype or shape, linear by linear.

    Linears in ``schemes`` have the tensors of ``exporter.layout``, others a float weight alone.
    Float tensors may be of any float dtype: loaders convert them.
    """
    held: dict[str, dict[str, Any]] = {name: {} for name in model.linears}
    for tensor, stored in folder.tensors.items():
        name, _, local = tensor.rpartition(".")
        if name in held and local != "bias":
            held[name][local] = stored.spec
    for name, found in held.items():
        if name not in schemes:
            yield from _float_problems(name, found)
            continue
        layout = exporter.layout(model.linears[name], schemes[name], model.dtype)
        for local, wanted in layout.items():
            if local not in found:
                yield Problem("missing", name, f"there is no {local}")
                continue
            spec = found[local]
            if spec.shape != wanted.shape:
                yield Problem(
                    "shape", name, f"{local} is {list(spec.shape)}, not {list(wanted.shape)}"
                )
            if spec.dtype != wanted.dtype and not {spec.dtype, wanted.dtype} <= {*_FLOATS}:
                yield Problem("dtype", name, f"{local} is {spec.dtype}, not {wanted.dtype}")
        for local in sorted(found.keys() - layout.keys()):
            yield Problem("unexpected", name, f"{local} does not belong to {schemes[name].name}")


def _float_problems(name: str, found: Mapping[str, Any]) -> Iterator[Problem]:
    for local, spec in sorted(found.items()):
        if local != "weight" or spec.dtype not in _FLOATS:
            yield Problem(
                "ignore", name, f"config.json says it is float, but {local} is {spec.dtype}"
            )
