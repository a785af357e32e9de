"""Shapes that an engine's kernels cannot take, read from a backend's table of capabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qplug import Capability, ModelView, QuantArgs, Scheme


def beyond_limits(
    table: Sequence[Capability], model: ModelView, schemes: Mapping[str, Scheme]
) -> str | None:
    """A sentence that names the first linear outside ``table``; None if all are inside it."""
    if not table:
        return None
    for name, scheme in schemes.items():
        sentence = shape_problem(table, model.linears[name], scheme)
        if sentence is not None:
            return f"{name}: {sentence}"
    return None


def shape_problem(
    table: Sequence[Capability], shape: tuple[int, int], scheme: Scheme
) -> str | None:
    """Why no kernel in ``table`` runs a weight of ``shape`` (out, in) under ``scheme``."""
    row = next((row for row in table if row.scheme == scheme.name), None)
    if row is None:
        return f"no kernel for {scheme.name} is known"
    if not row.served:
        return row.kernel
    if row.group_sizes and _group_size(scheme.weights) not in row.group_sizes:
        sizes = ", ".join(str(size) for size in row.group_sizes)
        return f"{row.kernel} takes groups of {sizes}, not {_group_size(scheme.weights)}"
    for side, width, multiple in zip(
        ("out", "in"), shape, (row.out_multiple, row.in_multiple), strict=True
    ):
        if width % multiple:
            return f"{row.kernel} needs {side}_features in multiples of {multiple}, not {width}"
    return None


def _group_size(args: QuantArgs) -> int:
    return args.group_size or -1
