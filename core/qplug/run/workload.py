"""The work of a run in numbers: shapes of the linears of each block, bytes, and tokens."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qplug.api import ModelView
from qplug.api.algorithm import Effort
from qplug.api.tensors import Checkpoint
from qplug.calibration.samples import Samples
from qplug.checkpoint.config_file import experts_of_a_token, text_config
from qplug.checkpoint.names import block_of, kind_of, module_of, within
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
class BlockWork:
    """A decoder block, whose quantized linears are in ``readers``; ``linears`` is their number.

    ``others`` is the number of float weights. ``read`` are the bytes of the block in the source,
    ``written`` those in the result.
    """

    readers: tuple[Readers, ...]
    others: int
    read: int
    written: int
    linears: int

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
    rows: dict[int, list[int]] = defaultdict(list)
    for out, width in linears:
        rows[width].append(out)
    if len(rows) == 1:
        ((width, outs),) = rows.items()
        if len(outs) > 1:
            own = width if width in outs else outs[-1]
            return [(width, sum(outs) - own), (width, own)]
    return [(width, sum(outs)) for width, outs in rows.items()]


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
    blocks = (
        BlockWork(
            readers(within(block, shapes[number]), of_a_token),
            others[number],
            read[number],
            written[number],
            len(shapes[number]),
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


def _stream_width(view: ModelView) -> int:
    """The width that most linears read."""
    widths = Counter(shape[1] for name, shape in view.linears.items() if name in view.quantizable)
    return widths.most_common(1)[0][0] if widths else 0
