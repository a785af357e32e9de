"""A model of costs: the seconds, the memory and the bytes on disk of a run, by counting.

It counts products, weights and bytes, and divides them by the rates of a device. While a block is
computed, the next one is read and the one before is written: the slowest of the three decides.
docs/scale.md compares it with measured runs.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qplug.api.events import Estimate
from qplug.calibration.groups_apart import GroupRoom
from qplug.calibration.portions import PER_ENTRY, PER_WEIGHT, Room
from qplug.machine.memory import memory_of_each
from qplug.machine.session import Session
from qplug.numerics.alike import ROOM
from qplug.run.rates import CPU_CORE, H100, Rates
from qplug.run.workload import BlockWork, Readers, Workload

#: AWQ's default search: ratios that are tried, and steps of the clip search in each; then the steps
#: of the final clip search, which GPTQ has too.
_RATIOS, _STEPS, _CLIP_STEPS = 21, 5, 20
_BYTES = 2  # of an element of hidden states
_PENDING = 2  # results of steps that wait for the disk
_AHEAD = 1 << 28  # bytes that a run without data reads ahead


@dataclass(frozen=True)
class Machine:
    """Where a run would be: ``processes`` with a device of these ``rates`` each.

    ``memory``: the bytes that a block may take on a device; None if nothing limits them.
    ``on_gpu``: whether the device has memory of its own.
    """

    rates: Rates
    on_gpu: bool = True
    processes: int = 1
    memory: float | None = None

    @property
    def budget(self) -> float:
        """``memory``, infinite if nothing limits it."""
        return math.inf if self.memory is None else self.memory

    @classmethod
    def of(cls, session: Session) -> Machine:
        """The machine of ``session``: all GPUs count as H100s; threads share products alike."""
        on_gpu = session.device.type == "cuda"
        return cls(
            H100 if on_gpu else CPU_CORE.of_cores(torch.get_num_threads()),
            on_gpu,
            session.processes.count,
            memory_of_each(session.device, session.processes.count, session.memory),
        )


def estimate(work: Workload, machine: Machine, nbytes: int, *, warm: bool = False) -> Estimate:
    """What a run of ``work`` takes on ``machine``.

    ``nbytes``: the bytes of all tensors of the result. ``warm``: it is the second run of a process.
    """
    stages = _seconds(work, machine, warm=warm)
    device, host = _memory(work, machine)
    return Estimate(
        machine.rates.name,
        machine.processes if work.tokens else 1,
        sum(stages.values()),
        stages,
        int(device) if machine.on_gpu else None,
        int(host if machine.on_gpu else host + device),
        nbytes,
    )


def block_seconds(work: Workload, machine: Machine) -> tuple[float, ...]:
    """The seconds that each block takes on ``machine``, without what the disk adds."""
    if not work.tokens:
        each = machine.rates.nearest + machine.rates.packing
        return tuple(
            block.weights * each + block.linears * machine.rates.linear for block in work.blocks
        )
    return tuple(sum(_block_seconds(block, work, machine).values()) for block in work.blocks)


def _seconds(work: Workload, machine: Machine, *, warm: bool) -> dict[str, float]:
    """The seconds of each stage; ``reading`` and ``writing`` are those in which a run waits."""
    rates = machine.rates
    once = {} if warm else {"opening": rates.start if work.tokens else rates.bare}
    if not work.tokens:
        return once | _streamed(work, rates)
    once["data"] = rates.data
    if not warm:
        once["kernels"] = rates.kernels + (rates.expert_kernels if _has_experts(work) else 0)
    total = defaultdict(float, once)
    # The run waits for the first block and for the last result. Half of what is outside is a head.
    total["reading"] = (work.blocks[0].read + work.outside / 2) / rates.read
    total["writing"] = (work.blocks[-1].written + work.outside / 2) / rates.write
    for before, block, after in zip(
        (None, *work.blocks[:-1]), work.blocks, (*work.blocks[1:], None), strict=True
    ):
        stages = _block_seconds(block, work, machine)
        if after is None:
            del stages["passing on"]
        reading = after.read / rates.read if after else 0
        writing = before.written / rates.write if before else 0
        slower = "reading" if reading > writing else "writing"
        total[slower] += max(0, reading - sum(stages.values()), writing - sum(stages.values()))
        for name, seconds in stages.items():
            total[name] += seconds
    return dict(total)


def _streamed(work: Workload, rates: Rates) -> dict[str, float]:
    """The seconds of a run without data, which one process does whatever their number is."""
    reading = (sum(block.read for block in work.blocks) + work.outside) / rates.read
    writing = (sum(block.written for block in work.blocks) + work.outside) / rates.write
    quantize = work.weights * rates.nearest
    packing = sum(_packing(block, rates) for block in work.blocks)
    slower = "reading" if reading > writing else "writing"
    waiting = max(0, max(reading, writing) - quantize - packing)
    return {"quantize": quantize, "packing": packing, slower: waiting}


def _block_seconds(block: BlockWork, work: Workload, machine: Machine) -> dict[str, float]:
    """The seconds that the stages of one block compute."""
    rates, tokens = machine.rates, work.tokens / machine.processes
    dense = [one for one in block.readers if not one.experts]
    experts = [one for one in block.readers if one.experts]
    forward = 2 * tokens * (block.others + sum(one.weights for one in dense)) / rates.forward
    forward += 2 * tokens * sum(one.weights * one.share for one in experts) / rates.experts
    gram = 2 * tokens * sum(one.count * one.width**2 for one in dense) / rates.gram
    gram += 2 * tokens * sum(_entries(one) * one.share for one in experts) / rates.experts
    exchange = 0.0
    if machine.processes > 1:
        exchange = PER_ENTRY * sum(map(_entries, block.readers)) / rates.exchange
        exchange += rates.exchanged * sum(one.count for one in block.readers)
    return {
        "statistics": forward * max(1, _parts(block, work, machine.budget)) + gram + exchange,
        "quantize": _solving(block, work, machine),
        "packing": _packing(block, rates),
        "passing on": forward,
    }


def _packing(block: BlockWork, rates: Rates) -> float:
    """The seconds in which errors are measured, and codes packed and handed to the disk."""
    return block.weights * rates.packing + block.linears * rates.linear


def _entries(one: Readers) -> int:
    """The entries of the Gram matrices of ``one``."""
    return one.count * one.width**2


def _solving(block: BlockWork, work: Workload, machine: Machine) -> float:
    """The seconds of the algorithms; processes share sets of linears, but no set is divided."""
    each = [
        (sum(_set_seconds(one, effort, machine.rates) for effort in work.efforts), one.count)
        for one in block.readers
    ]
    shared = sum(seconds * count for seconds, count in each) / machine.processes
    return max(shared, max((seconds for seconds, _ in each), default=0))


def _set_seconds(one: Readers, effort: str, rates: Rates) -> float:
    """The seconds of an algorithm at one of the sets of ``one``.

    GPTQ: a Cholesky factorisation and a triangular inverse, ``in³ / 3`` products each, and an
    update of all later columns for each column, ``out in² / 2``. AWQ: for each ratio, ``D G Dᵀ``
    costs ``out in²`` products, and each step of a clip search rounds all weights.
    """
    weights = one.width * one.rows
    if effort == "solves":
        flops = 2 / 3 * one.width**3 + one.rows * one.width**2
        return flops / rates.factoring + weights * (rates.column + _CLIP_STEPS * rates.trial)
    if effort == "searches":
        flops = _RATIOS * 2 * one.rows * one.width**2
        return flops / rates.search + weights * rates.trial * (_RATIOS * (_STEPS + 1) + _CLIP_STEPS)
    return weights * rates.nearest


def _memory(work: Workload, machine: Machine) -> tuple[float, float]:
    """The bytes on a device, and those of a process on its host."""
    base = machine.rates.base
    if not work.tokens:
        ahead = min(_AHEAD, sum(block.read for block in work.blocks))
        return machine.rates.streamed * work.largest, base + ahead + _PENDING * work.largest
    tokens = work.tokens / machine.processes
    budget = machine.budget
    device = max((_peak(block, work, tokens, budget) for block in work.blocks), default=0)
    if machine.on_gpu:
        device += _passes(work, tokens) + _copies(work)
    in_memory = min(2, len(work.blocks))
    if not machine.on_gpu and any(_parts(block, work, budget) for block in work.blocks):
        in_memory -= 1  # counted with the parts
    read = max((block.read for block in work.blocks), default=0) * in_memory
    written = max((block.written for block in work.blocks), default=0) * _PENDING
    return device, base + read + written + tokens * work.width * _BYTES


def _peak(block: BlockWork, work: Workload, tokens: float, budget: float) -> float:
    """The bytes that ``block`` takes on a device at most."""
    groups = _groups(block, work)
    return room(block, tokens).peak(budget) if groups is None else groups.peak(budget)


def _parts(block: BlockWork, work: Workload, budget: float) -> int:
    """The number of parts that the input groups of ``block`` are divided into; 0 if they are not.

    ``budget``: the bytes that a block may take.
    """
    groups = _groups(block, work)
    return 0 if groups is None else len(groups.parts(budget) or ())


def _groups(block: BlockWork, work: Workload) -> GroupRoom | None:
    """The input groups of ``block``, if these may be quantized one after another."""
    if not work.by_group or not block.groups:
        return None
    groups = block.groups
    others = block.others + block.weights - sum(group.weights for group in groups)
    floats = (number for number, group in enumerate(groups) if group.is_float)
    each = [(group.weights, group.width) for group in groups]
    return GroupRoom(max(0, others), each, frozenset(floats))


def _passes(work: Workload, tokens: float) -> float:
    """The bytes that passes through the model, which stop at blocks, keep on a GPU.

    They keep the embeddings of all tokens. Where a block has experts, the states of all tokens are
    counted there already.
    """
    return 0 if _has_experts(work) else tokens * work.width * _BYTES


def _copies(work: Workload) -> float:
    """The bytes of copies of layers of one shape, whose errors are measured side by side.

    These are the layers that ``of_one_shape`` has in a list.
    In a block with experts there is room for them when the errors are measured.
    """
    most = max((block.weights for block in work.blocks), default=0) / 2
    return 0 if _has_experts(work) else 8 * min(ROOM["cuda"] // 2, most)


def _has_experts(work: Workload) -> bool:
    return any(one.experts for block in work.blocks for one in block.readers)


def room(block: BlockWork, tokens: float) -> Room:
    """The bytes that ``block`` takes on a device, as ``divide_experts`` counts them.

    The Gram matrices outside of experts come on top.
    """
    dense = [one for one in block.readers if not one.experts]
    experts = [one for one in block.readers if one.experts]
    weights = block.others + sum(one.weights for one in dense)
    rest = PER_WEIGHT * weights + PER_ENTRY * sum(map(_entries, dense))
    of_expert = sum(PER_WEIGHT * one.width * one.rows + PER_ENTRY * one.width**2 for one in experts)
    count = max((one.count for one in experts), default=0)
    return Room(
        rest,
        of_expert,
        of_expert * count,
        1 if experts else 0,
        count,
        tokens * max((one.width for one in experts), default=0) * _BYTES,
        sum(one.weights for one in experts) * _BYTES,
    )


def portions(work: Workload, machine: Machine) -> Mapping[int, int]:
    """How many blocks have their experts in portions of how many; empty if all have room."""
    if machine.memory is None:
        return {}
    tokens = work.tokens / machine.processes
    found = Counter(room(block, tokens).portion(machine.memory) for block in work.blocks)
    return {size: count for size, count in found.items() if size is not None}
