"""What kernels cannot take, read from an engine's table of capabilities (public).

Under tensor parallelism every process loads a part of each weight, and its kernel sees that part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from qplug.api.capability import NEWEST, Capability
from qplug.api.gpus import Column, named_column
from qplug.api.model import ModelView
from qplug.api.params import Param
from qplug.api.scheme import Scheme

# Engines split most weights by rows, which make outputs. These are split by columns; those of the
# second table are whole in every process.
_BY_COLUMNS = ("o_proj", "down_proj", "w2", "out_proj", "fc2", "dense_4h_to_h", "c_proj")
_WHOLE = ("q_a_proj", "kv_a_proj_with_mqa", "gate", "router", "shared_expert_gate")
_OF_KEYS_AND_VALUES = ("k_proj", "v_proj")


@dataclass(frozen=True)
class Target:
    """Where a folder is to be served: options of backends that have an engine.

    Raises QplugError if ``gpu`` is no device that is known.
    """

    gpu: Annotated[
        str, Param("Check for this device: H100, 4090, sm90, cpu; any: for whichever takes it.")
    ] = "any"
    tp: Annotated[int, Param("Processes that share each layer (tensor parallelism).", 1)] = 1
    engine: Annotated[
        str, Param("The version of the engine, such as 0.26; newest: the newest with a table.")
    ] = NEWEST

    def __post_init__(self) -> None:
        """Checks ``gpu``."""
        assert self.column

    @cached_property
    def column(self) -> Column:
        """The column of engines' tables for ``gpu``; its device is ``any`` for any."""
        return Column("any") if self.gpu == "any" else named_column(self.gpu)


def rows_for(table: Sequence[Capability], scheme: str, gpu: str = "any") -> list[Capability]:
    """The rows of ``table`` that tell of ``scheme`` on ``gpu``."""
    return [row for row in table if row.scheme == scheme and gpu in ("any", *row.devices)]


def beyond_limits(
    table: Sequence[Capability],
    model: ModelView,
    schemes: Mapping[str, Scheme],
    target: Target | None = None,
) -> str | None:
    """A sentence that names the first linear that no row of ``table`` takes; None if all fit."""
    if not table:
        return None
    target = target or Target()
    for name, scheme in schemes.items():
        sentence = shape_problem(table, name, model, scheme, target)
        if sentence is not None:
            return f"{name}: {sentence}"
    return None


def too_narrow(
    table: Sequence[Capability],
    model: ModelView,
    schemes: Mapping[str, Scheme],
    target: Target | None = None,
) -> dict[str, str]:
    """Returns why no kernel takes the shape of a linear, by name of the linear.

    A linear whose scheme or group size no kernel in ``table`` runs, whatever the shape, is left
    out: the shape is not the reason.
    """
    target = target or Target()
    narrow = {}
    for name, scheme in schemes.items():
        size = scheme.weights.group_size or -1
        rows = [
            row
            for row in rows_for(table, scheme.name, target.column.device)
            if row.served and (not row.group_sizes or size in row.group_sizes)
        ]
        found = [row_problem(row, name, model, scheme, target.tp) for row in rows]
        if found and None not in found:
            narrow[name] = str(found[0])
    return narrow


def shape_problem(
    table: Sequence[Capability], name: str, model: ModelView, scheme: Scheme, target: Target
) -> str | None:
    """Why no kernel in ``table`` runs the linear ``name`` of ``model`` under ``scheme``.

    If there are several reasons, it is that of the first kernel that runs the scheme at all.
    """
    rows = rows_for(table, scheme.name, target.column.device)
    if not rows:
        where = "" if target.gpu == "any" else f" on {target.gpu}"
        return f"no kernel for {scheme.name} is known{where}"
    served = [row for row in rows if row.served]
    found = [row_problem(row, name, model, scheme, target.tp) for row in served or rows]
    return None if None in found else found[0]


def row_problem(
    row: Capability, name: str, model: ModelView, scheme: Scheme, tp: int = 1
) -> str | None:
    """Why the kernel of ``row`` does not take a linear's part in each of ``tp`` processes."""
    if not row.served:
        return row.kernel
    size = scheme.weights.group_size
    if row.group_sizes and (size or -1) not in row.group_sizes:
        sizes = ", ".join(str(size) for size in row.group_sizes)
        return f"{row.kernel} takes groups of {sizes}, not {size or -1}"
    shape = shard_shape(name, model.linears[name], model.config, tp)
    if isinstance(shape, str):
        return shape
    share = f" in each of {tp} processes" if tp > 1 else ""
    for side, width, multiple in zip(
        ("out", "in"), shape, (row.out_multiple, row.in_multiple), strict=True
    ):
        if width % multiple:
            return (
                f"{row.kernel} needs {side}_features in multiples of {multiple}, not {width}{share}"
            )
    if size is not None and shape[1] % size:
        return f"groups of {size} do not divide in_features, {shape[1]}{share}"
    return None


def shard_shape(
    name: str, shape: tuple[int, int], config: Mapping[str, Any], tp: int
) -> tuple[int, int] | str:
    """The shape (out, in) of the part of a weight that each of ``tp`` processes has.

    ``config``: that of the model. A sentence if it cannot be split so.
    """
    local, (out, width) = name.rpartition(".")[2], shape
    if tp == 1 or local in _WHOLE:
        return shape
    if local in _OF_KEYS_AND_VALUES:
        # Of fewer heads than processes each has a copy.
        heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or tp
        tp = min(tp, heads) if isinstance(heads, int) and heads > 0 else tp
    by_columns = local in _BY_COLUMNS
    side = width if by_columns else out
    if side % tp:
        return f"{'in' if by_columns else 'out'}_features, {side}, cannot be split in {tp}"
    return (out, width // tp) if by_columns else (out // tp, width)
