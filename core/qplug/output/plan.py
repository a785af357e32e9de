"""Plans the files of a run: every tensor, its size and its shard, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from qplug.api import Exporter, ModelView, Stacked, TensorSpec
from qplug.api.scheme import Scheme
from qplug.api.tensors import Checkpoint
from qplug.checkpoint.names import block_of, natural_order, split_name
from qplug.checkpoint.open import INDEX, SINGLE
from qplug.checkpoint.stacked import stacked_spec
from qplug.checkpoint.transposed import transposed_spec


@dataclass(frozen=True)
class Step:
    """A unit of work that is read, computed and written at once: a linear, a block, or a copy.

    ``linears`` are the schemes of the linears to quantize, by name. ``others`` are the names of
    tensors that keep name, dtype and shape. ``outputs`` are all tensors to write, by full name;
    tensors of single experts that the format joins are in ``stacks`` instead, which says of which
    an output is made. ``cache_scales`` are the full names of the scales of a KV cache, which the
    source does not have. ``transposed`` are the outputs that are stored as ``[in, out]``.
    """

    name: str
    linears: Mapping[str, Scheme]
    others: tuple[str, ...]
    outputs: Mapping[str, TensorSpec]
    cache_scales: tuple[str, ...] = ()
    stacks: Mapping[str, Stacked] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """The bytes of all outputs."""
        return sum(spec.nbytes for spec in self.outputs.values())

    def computed(self, output: str) -> TensorSpec:
        """Returns the dtype and the shape of ``output`` before it is transposed to be stored."""
        spec = self.outputs[output]
        return transposed_spec(spec) if output in self.transposed else spec


@dataclass(frozen=True)
class Plan:
    """The steps in order, and the file name of the shard that each step writes to."""

    steps: tuple[Step, ...]
    shard_of: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(step.nbytes for step in self.steps)

    def shards(self) -> dict[str, dict[str, TensorSpec]]:
        """Returns the tensors of each shard, by file name and full name."""
        files: dict[str, dict[str, TensorSpec]] = {}
        for step, file in zip(self.steps, self.shard_of, strict=True):
            files.setdefault(file, {}).update(step.outputs)
        return files

    def index(self) -> dict[str, object] | None:
        """Returns the content of the index file; None for a single shard, which has no index."""
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
    cache_scales: Mapping[str, Mapping[str, TensorSpec]] | None = None,
    like: Plan | None = None,
) -> Plan:
    """Returns the plan of a run over all tensors of ``source``, in natural order of their names.

    The linears in ``schemes`` are packed by ``exporter``, other tensors are copied. With
    ``by_block`` each decoder block is a step. Otherwise each tensor is a step, except that linears
    that must share a global scale are one step together. ``cache_scales`` are the scales of
    a KV cache by block, each by its full name. A shard has at most ``shard_bytes`` bytes, or a
    single step; with ``like``, a plan of the same source, steps have the shards of that plan.
    """
    two_level = [name for name, scheme in schemes.items() if scheme.weights.two_level]
    first = {name: group[0] for group in exporter.merged(two_level) for name in group}
    parts: dict[str, list[Step]] = {}  # of each step
    for tensor in natural_order(source.tensors):
        name, local = split_name(tensor)
        scheme = schemes.get(name) if local == "weight" else None
        if scheme is None:
            specs = {tensor: source.tensors[tensor].spec}
            step = _stored(Step(tensor, {}, (tensor,), specs), source)
        else:
            packed = exporter.format.layout(model.linears[name], scheme, model.dtype)
            outputs = {f"{name}.{part}": spec for part, spec in packed.items()}
            step = _stored(Step(name, {name: scheme}, (), outputs), source)
        number = block_of(tensor, model.blocks) if by_block else None
        key = first.get(step.name, step.name) if number is None else model.blocks[number]
        parts.setdefault(key, []).append(step)
    steps = {key: _joined(key, each) for key, each in parts.items()}
    steps = _with_stacks(steps, exporter)
    for block, scales in (cache_scales or {}).items():
        outputs = {**steps[block].outputs, **scales}
        steps[block] = replace(steps[block], outputs=outputs, cache_scales=tuple(scales))
    if like is not None:
        assert [*steps] == [step.name for step in like.steps]
        return Plan(tuple(steps.values()), like.shard_of)
    return Plan(tuple(steps.values()), _assign_shards(list(steps.values()), shard_bytes))


def _stored(step: Step, source: Checkpoint) -> Step:
    """Returns ``step``, whose matrices are stored ``[in, out]`` if the files of ``source`` are."""
    transposed = step.outputs.keys() & source.transposed
    turned = {name: transposed_spec(step.outputs[name]) for name in transposed}
    outputs = {**step.outputs, **turned}
    return replace(step, outputs=outputs, transposed=frozenset(transposed))


def _with_stacks(steps: dict[str, Step], exporter: Exporter[object]) -> dict[str, Step]:
    """Returns ``steps`` in which tensors that the format stores together are made by one step."""
    specs = {name: spec for step in steps.values() for name, spec in step.outputs.items()}
    stacks = exporter.format.stacked(specs)
    if not stacks:
        return steps
    key_of = {name: key for key, step in steps.items() for name in step.outputs}
    for stored, stacked in stacks.items():
        names = [name for of_expert in stacked.members for name in of_expert]
        keys = list(dict.fromkeys(key_of[name] for name in names))
        first = _joined(steps[keys[0]].name, [steps[keys[0]], *map(steps.pop, keys[1:])])
        key_of |= dict.fromkeys(first.outputs, keys[0])
        within = {*names}
        outputs = {name: spec for name, spec in first.outputs.items() if name not in within}
        outputs[stored] = stacked_spec(stacked, specs)
        steps[keys[0]] = replace(first, outputs=outputs, stacks={**first.stacks, stored: stacked})
        key_of |= dict.fromkeys(names, keys[0])
    return steps


def _joined(name: str, parts: Sequence[Step]) -> Step:
    """Returns a step called ``name`` that does the work of all ``parts``, in their order."""
    return Step(
        name,
        {linear: scheme for part in parts for linear, scheme in part.linears.items()},
        tuple(other for part in parts for other in part.others),
        {output: spec for part in parts for output, spec in part.outputs.items()},
        stacks={stored: stack for part in parts for stored, stack in part.stacks.items()},
        transposed=frozenset().union(*(part.transposed for part in parts)),
    )


def _assign_shards(steps: list[Step], limit: int) -> tuple[str, ...]:
    """Returns the file name of each step's shard; shards are filled in order up to ``limit``."""
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
