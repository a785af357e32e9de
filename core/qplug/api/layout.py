"""Has a folder just the tensors that an exporter lays out? (Public: for ``Exporter.check``.)

And does a kernel take them, with scales that make sense: what loaders of any format ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qplug.api import Exporter, ModelView, Problem
from qplug.api.limits import Target, shape_problem
from qplug.api.scheme import Scheme
from qplug.api.tensors import FLOAT_DTYPES

if TYPE_CHECKING:
    from qplug.api.tensors import Checkpoint


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
            if spec.dtype != wanted.dtype and not {spec.dtype, wanted.dtype} <= {*FLOAT_DTYPES}:
                yield Problem("dtype", name, f"{local} is {spec.dtype}, not {wanted.dtype}")
        for local in sorted(found.keys() - layout.keys()):
            yield Problem("unexpected", name, f"{local} does not belong to {schemes[name].name}")


def loading_problems(
    folder: Checkpoint,
    model: ModelView,
    schemes: Mapping[str, Scheme],
    exporter: Exporter[Any],
    *,
    scales: Sequence[str],
    fused: Iterable[Sequence[str]] = (),
) -> Iterator[Problem]:
    """``layout_problems``, and what else a loader holds against linears in ``schemes``.

    No kernel of ``exporter.capabilities`` takes one; of a group in ``fused``, which engines merge,
    not all are in ``schemes``; a tensor that ``scales`` names, such as ``weight_scale``, is not
    positive and finite (asked where the layout is right).
    """
    found = list(layout_problems(folder, model, schemes, exporter))
    yield from found
    for group in fused:
        if len({name in schemes for name in group}) > 1:
            yield Problem("fused", ", ".join(group[:3]), "are merged, but not all are quantized")
    broken = {problem.where for problem in found}
    for name, scheme in schemes.items():
        sentence = shape_problem(exporter.capabilities(), name, model, scheme, Target())
        if sentence is not None:
            yield Problem("kernel", name, sentence)
        for local in scales if name not in broken else ():
            values = folder.read(f"{name}.{local}").float()
            if not (values.isfinite() & (values > 0)).all():
                yield Problem("scale", name, f"{local}: one is zero, negative, or not finite")


def _float_problems(name: str, found: Mapping[str, Any]) -> Iterator[Problem]:
    for local, spec in sorted(found.items()):
        if local != "weight" or spec.dtype not in FLOAT_DTYPES:
            yield Problem(
                "ignore", name, f"config.json says it is float, but {local} is {spec.dtype}"
            )
