"""The work of a run in numbers: shapes of the linears of each block, bytes, and tokens."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from qplug.api import ModelView
from qplug.api.algorithm import Effort
from qplug.api.tensors import Checkpoint
from qplug.calibration.samples import Samples
from qplug.checkpoint.config_file import experts_of_a_token, text_config
from qplug.checkpoint.names import block_of, kind_of, module_of, relative_name, within
from qplug.output.plan import Plan

#: The experts of a token where config.json does not state their number.
_DEFAULT_EXPERTS = 8


@dataclass(frozen=True)
class Readers:
    """Linears that read one tensor of ``width`` channels, and have ``rows`` rows together.

    There are ``count`` such sets. If they are experts, each of them reads ``share`` of the tokens.
    """

    width: int
    rows: int
    count: int = 1
    share: float = 1.0
    experts: bool = False

    @property
    def weights(self) -> int:
        """The number of weights in all sets."""
        return self.width * self.rows * self.count


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor of ``width`` channels: the number of all of their weights.

    ``is_float``: whether all of them stay float.
    """

    weights: int
    width: int
    is_float: bool


@dataclass(frozen=True)
class BlockWork:
    """A decoder block, whose quantized linears are in ``readers``; ``linears`` is their number.

    ``others`` is the number of float weights. ``read`` are the bytes of the block in the source,
    ``written`` those in the result. ``groups`` are the input groups of the block, also of linears
    that stay float; they are empty for a block with experts.
    """

    readers: tuple[Readers, ...]
    others: int
    read: int
    written: int
    linears: int
    groups: tuple[Group, ...] = ()

    @property
    def weights(self) -> int:
        """The number of weights to quantize."""
        return sum(one.weights for one in self.readers)


@dataclass(frozen=True)
class Workload:
    """A run: its blocks in order, and the bytes ``outside`` of them, which are read and written.

    ``efforts`` are what the algorithms spend their time on. ``tokens`` are all calibration tokens,
    0 for a run without data; ``by_group``: whether input groups may be quantized one after another;
    ``width`` is the width of the residual stream. ``largest`` is the
    number of weights that a run without data rounds at once.
    """

    blocks: tuple[BlockWork, ...]
    outside: int
    efforts: frozenset[Effort]
    tokens: int
    width: int
    largest: int
    by_group: bool = False

    @property
    def weights(self) -> int:
        """The number of weights to quantize."""
        return sum(block.weights for block in self.blocks)


def readers(shapes: Mapping[str, tuple[int, int]], experts_of_a_token: int) -> tuple[Readers, ...]:
    """The linears of a block by what they read; ``shapes``: ``(out, in)`` by name in the block.

    Which linears read one tensor is known only after a trial with weights. This takes the linears
    of one module and of one width for such a set, and one linear of a module for a set of its own
    if all have the same width: its output linear.
    """
    modules: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, shape in shapes.items():
        modules[module_of(name)].append(shape)
    alike = Counter(
        (kind_of(f"{module}."), tuple(sorted(linears))) for module, linears in modules.items()
    )
    found = []
    for (kind, linears), count in alike.items():
        experts = "experts.*." in f".{kind}"
        share = min(1.0, experts_of_a_token / count) if experts else 1.0
        for width, rows in _sets(linears):
            found.append(Readers(width, rows, count, share, experts))
    return tuple(found)


def _sets(linears: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The width and the rows of each set of the ``linears`` of one module."""
    named = {str(number): shape for number, shape in enumerate(linears)}
    return [
        (named[names[0]][1], sum(named[name][0] for name in names)) for names in _by_input(named)
    ]


def _by_input(linears: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """The names of the ``linears`` of one module that read one tensor, for each tensor.

    Of two that may be the output linear, it is the first by name: ``o_proj``, not ``q_proj``. Both
    have the same shape.
    """
    by_width: dict[int, list[str]] = defaultdict(list)
    for name, (_, width) in linears.items():
        by_width[width].append(name)
    if len(by_width) == 1:
        ((width, names),) = by_width.items()
        if len(names) > 1:
            own = min((n for n in names if linears[n][0] == width), default=names[-1])
            return [[name for name in names if name != own], [own]]
    return [*by_width.values()]


def groups_of(shapes: Mapping[str, tuple[int, int]], quantized: Container[str]) -> list[Group]:
    """The input groups of a block whose linears have ``shapes``, by name in the block.

    Which of them are ``quantized`` does not change what reads one tensor.
    """
    modules: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, shape in shapes.items():
        modules[module_of(name)][name] = shape
    return [
        Group(
            sum(math.prod(linears[name]) for name in names),
            linears[names[0]][1],
            not any(name in quantized for name in names),
        )
        for linears in modules.values()
        for names in _by_input(linears)
    ]


def workload(
    plan: Plan,
    view: ModelView,
    source: Checkpoint,
    samples: Samples | None,
    efforts: frozenset[Effort],
    *,
    by_group: bool,
) -> Workload:
    """The work of the run ``plan`` over ``source``; ``samples`` are None for a run without data.

    ``efforts`` and ``by_group`` are those of the stages.
    """
    of_a_token = experts_of_a_token(view.config) or _DEFAULT_EXPERTS
    shapes: list[dict[str, tuple[int, int]]] = [{} for _ in view.blocks]
    others, read, written = Counter[int](), Counter[int](), Counter[int]()
    outside = 0
    for step in plan.steps:  # each is within one block, or outside of all
        number = block_of(f"{step.name}.", view.blocks)
        if number is not None:
            shapes[number] |= {name: view.linears[name] for name in step.linears}
            written[number] += step.nbytes
    for name, tensor in source.tensors.items():
        number = block_of(name, view.blocks)
        if number is None:
            outside += tensor.nbytes
            continue
        read[number] += tensor.nbytes
        if module_of(name) not in shapes[number]:
            others[number] += math.prod(tensor.spec.shape)
    linears: list[dict[str, tuple[int, int]]] = [{} for _ in view.blocks]
    for name, shape in view.linears.items():
        number = block_of(name, view.blocks)
        if number is not None:
            linears[number][relative_name(view.blocks[number], name)] = shape
    blocks = (
        _block_work(
            within(block, shapes[number]),
            linears[number],
            of_a_token,
            others[number],
            read[number],
            written[number],
        )
        for number, block in enumerate(view.blocks)
    )
    steps = (sum(math.prod(view.linears[name]) for name in step.linears) for step in plan.steps)
    return Workload(
        tuple(blocks),
        outside,
        efforts,
        samples.tokens.numel() if samples else 0,
        text_config(view.config).get("hidden_size") or _stream_width(view),
        max(steps, default=0),
        by_group,
    )


def _block_work(
    quantized: Mapping[str, tuple[int, int]],
    linears: Mapping[str, tuple[int, int]],
    of_a_token: int,
    others: int,
    read: int,
    written: int,
) -> BlockWork:
    """The work of a block with ``linears``, of which some are ``quantized``; both by local name."""
    every = readers(linears, of_a_token)
    has_experts = any(one.experts for one in every)
    return BlockWork(
        readers(quantized, of_a_token),
        others,
        read,
        written,
        len(quantized),
        () if has_experts else tuple(groups_of(linears, quantized)),
    )


def _stream_width(view: ModelView) -> int:
    """The width that most linears read."""
    widths = Counter(shape[1] for name, shape in view.linears.items() if name in view.quantizable)
    return widths.most_common(1)[0][0] if widths else 0
