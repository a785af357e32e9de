"""What a run will write, known to the byte before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qplug.api import Exporter, ModelView, TensorSpec
from qplug.api.scheme import Scheme
from qplug.api.tensors import Checkpoint
from qplug.checkpoint.names import is_within, natural_order, split_name
from qplug.checkpoint.open import INDEX, SINGLE


@dataclass(frozen=True)
class Step:
    """What is read, worked on and written at one go: a linear, a block, or a tensor to copy.

    ``linears`` are quantized, by name; ``others`` are tensors that keep name, dtype and shape;
    ``cache_scales`` are the scales of a KV cache, which the source does not have. ``outputs`` are
    the tensors it writes, by their full names.
    """

    name: str
    linears: Mapping[str, Scheme]
    others: tuple[str, ...]
    outputs: Mapping[str, TensorSpec]
    cache_scales: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs.values())


@dataclass(frozen=True)
class Plan:
    """The steps in order, and the shard that each one writes to."""

    steps: tuple[Step, ...]
    shard_of: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(step.nbytes for step in self.steps)

    def shards(self) -> dict[str, dict[str, TensorSpec]]:
        """The tensors of each file."""
        files: dict[str, dict[str, TensorSpec]] = {}
        for step, file in zip(self.steps, self.shard_of, strict=True):
            files.setdefault(file, {}).update(step.outputs)
        return files

    def index(self) -> dict[str, object] | None:
        """What stands in the index file; None for a single shard, which needs none."""
        if set(self.shard_of) <= {SINGLE}:
            return None
        places = {name: file for file, tensors in self.shards().items() for name in tensors}
        return {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(places.items()))}


def make_plan(
    source: Checkpoint,
    model: ModelView,
    schemes: Mapping[str, Scheme],
    exporter: Exporter[object],
    *,
    shard_bytes: int,
    by_block: bool,
    cache_scales: Mapping[str, tuple[str, ...]] | None = None,
) -> Plan:
    """Lay out the run: every tensor of ``source`` in natural order, those in ``schemes`` packed.

    ``by_block`` makes a step of each decoder block, else every tensor is a step of its own, but for
    linears that are to share a global scale.
    ``cache_scales``: the full names of those of each block, float32 ``[1]``.
    """
    two_level = [name for name, scheme in schemes.items() if scheme.weights.two_level]
    first = {name: group[0] for group in exporter.merged(two_level) for name in group}
    steps: dict[str, Step] = {}
    for tensor in natural_order(source.tensors):
        name, local = split_name(tensor)
        scheme = schemes.get(name) if local == "weight" else None
        if scheme is None:
            step = Step(tensor, {}, (tensor,), {tensor: source.tensors[tensor].spec})
        else:
            packed = exporter.format.layout(model.linears[name], scheme, model.dtype)
            outputs = {f"{name}.{part}": spec for part, spec in packed.items()}
            step = Step(name, {name: scheme}, (), outputs)
        block = next((b for b in model.blocks if by_block and is_within(b, tensor)), None)
        key = first.get(step.name, step.name) if block is None else block
        steps[key] = _joined(key, steps[key], step) if key in steps else replace(step, name=key)
    for block, names in (cache_scales or {}).items():
        outputs = {**steps[block].outputs, **dict.fromkeys(names, TensorSpec("float32", (1,)))}
        steps[block] = replace(steps[block], outputs=outputs, cache_scales=names)
    return Plan(tuple(steps.values()), _assign_shards(list(steps.values()), shard_bytes))


def _joined(name: str, one: Step, other: Step) -> Step:
    return Step(
        name,
        {**one.linears, **other.linears},
        one.others + other.others,
        {**one.outputs, **other.outputs},
    )


def _assign_shards(steps: list[Step], limit: int) -> tuple[str, ...]:
    numbers, number, filled = [], 1, 0
    for step in steps:
        if filled and filled + step.nbytes > limit:
            number, filled = number + 1, 0
        filled += step.nbytes
        numbers.append(number)
    if number == 1:
        return (SINGLE,) * len(steps)
    stem = INDEX.partition(".")[0]
    return tuple(f"{stem}-{n:05d}-of-{number:05d}.safetensors" for n in numbers)
