"""Has a folder the tensors that a format lays out, and does a kernel take them? (Public.)

For ``check_folder`` of formats and of engines: what loaders of any format ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qplug.api.capability import Capability
from qplug.api.limits import Target, shape_problem
from qplug.api.model import ModelView
from qplug.api.scheme import Scheme
from qplug.api.tensors import FLOAT_DTYPES

if TYPE_CHECKING:
    from qplug.api.format import Format
    from qplug.api.tensors import Checkpoint


#: Tensors of a linear that say nothing of its weight.
_NOT_OF_WEIGHTS = ("bias", "k_scale", "v_scale")


@dataclass(frozen=True)
class Stacked:
    """How a stored tensor is made of tensors of single experts: its first axis counts the experts.

    ``members[e]``: the names of the tensors of expert ``e``. Their rows follow one another in the
    stored tensor, or alternate if ``interleaved``.
    """

    members: tuple[tuple[str, ...], ...]
    interleaved: bool = False


@dataclass(frozen=True)
class Problem:
    """A rule of a format or of a loader that a folder breaks. ``check`` is the rule's name."""

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.message}"


def layout_problems(
    folder: Checkpoint,
    model: ModelView,
    schemes: Mapping[str, Scheme],
    format: Format,
    *,
    scales: Sequence[str] = (),
) -> Iterator[Problem]:
    """What is missing, too much, or of another dtype or shape, linear by linear.

    Linears in ``schemes`` have the tensors of ``format.layout``, others a float weight alone.
    Float tensors may be of any float dtype: loaders convert them. Tensors that ``scales`` names,
    such as ``weight_scale``, are positive and finite (asked of linears whose layout is right, and
    has them). A single number may have one axis or none: loaders reshape it. Scales of a KV cache
    that a linear has (``k_proj.k_scale``) are left to other rules.
    """
    held: dict[str, dict[str, Any]] = {name: {} for name in model.linears}
    for tensor, stored in folder.tensors.items():
        name, _, local = tensor.rpartition(".")
        if name in held and local not in _NOT_OF_WEIGHTS:
            held[name][local] = stored.spec
    right: list[str] = []
    for name, specs in held.items():
        if name not in schemes:
            yield from _float_problems(name, specs)
            continue
        layout = format.layout(model.linears[name], schemes[name], model.dtype)
        problems = [*_misplaced(name, specs, layout)]
        for local in sorted(specs.keys() - layout.keys()):
            sentence = f"{local} does not belong to {schemes[name].name}"
            problems.append(Problem("unexpected", name, sentence))
        yield from problems
        if not problems:
            right.append(name)
    for name in right:
        for local in scales:
            if local not in held[name]:
                continue
            values = folder.read(f"{name}.{local}").float()
            if not (values.isfinite() & (values > 0)).all():
                yield Problem("scale", name, f"{local}: one is zero, negative, or not finite")


def kernel_problems(
    model: ModelView, schemes: Mapping[str, Scheme], table: Sequence[Capability]
) -> Iterator[Problem]:
    """The linears that no kernel of ``table`` takes; none where the table is empty."""
    for name, scheme in schemes.items() if table else ():
        sentence = shape_problem(table, name, model, scheme, Target())
        if sentence is not None:
            yield Problem("kernel", name, sentence)


def _misplaced(name: str, specs: Mapping[str, Any], layout: Mapping[str, Any]) -> Iterator[Problem]:
    """The tensors of ``layout`` that are not there, or not in dtype and shape."""
    for local, wanted in layout.items():
        if local not in specs:
            yield Problem("missing", name, f"there is no {local}")
            continue
        spec = specs[local]
        if spec.shape != wanted.shape and not {spec.shape, wanted.shape} <= {(), (1,)}:
            yield Problem("shape", name, f"{local} is {list(spec.shape)}, not {list(wanted.shape)}")
        if spec.dtype != wanted.dtype and not {spec.dtype, wanted.dtype} <= {*FLOAT_DTYPES}:
            yield Problem("dtype", name, f"{local} is {spec.dtype}, not {wanted.dtype}")


def _float_problems(name: str, found: Mapping[str, Any]) -> Iterator[Problem]:
    for local, spec in sorted(found.items()):
        # Some routers have more float weights than one.
        if "scale" in local or spec.dtype not in FLOAT_DTYPES:
            yield Problem(
                "ignore", name, f"config.json says it is float, but {local} is {spec.dtype}"
            )
