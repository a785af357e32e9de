"""What a run will write, known to the byte before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qplug.api import Exporter, ModelView, TensorSpec
from qplug.checkpoint import INDEX, SINGLE, Checkpoint
from qplug.safetensors_file import spec_bytes
from qplug.scheme import Scheme
from qplug.skeleton import natural_order


@dataclass(frozen=True)
class Step:
    """What is read, worked on and written at one go: a linear to quantize, or a tensor to copy.

    ``outputs`` are the tensors it writes, by their full names.
    """

    name: str
    scheme: Scheme | None
    outputs: Mapping[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        return sum(spec_bytes(spec) for spec in self.outputs.values())


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
) -> Plan:
    """Lay out the run: every tensor of ``source`` in natural order, those in ``schemes`` packed."""
    steps = []
    for tensor in natural_order(source.tensors):
        name, _, local = tensor.rpartition(".")
        scheme = schemes.get(name) if local == "weight" else None
        if scheme is None:
            steps.append(Step(tensor, None, {tensor: source.tensors[tensor].spec}))
        else:
            packed = exporter.layout(model.linears[name], scheme, model.dtype)
            steps.append(Step(name, scheme, {f"{name}.{part}": s for part, s in packed.items()}))
    return Plan(tuple(steps), _assign_shards(steps, shard_bytes))


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
