"""What several processes tell one another, and how they fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qplug
from qplug.machine.devices import find_device
from qplug.machine.exchange import join
from qplug.machine.launch import ALONE, Launch
from qplug.machine.processes import Processes, shares_of

if TYPE_CHECKING:
    from conftest import Starter

# Each of three processes runs this: what one gives must arrive at all.
EXCHANGES = """
import torch
from qplug import PRESETS, QuantizedWeight
from qplug.machine.launch import Launch
from qplug.machine.exchange import join

launch = Launch.of()
rank, count = launch.rank, launch.count
assert count == 3

def tensors(rank):
    base = torch.arange(6, dtype=torch.float32).view(2, 3) + 10 * rank
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]
    dtypes += [torch.int32, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2]
    return [
        *(base.to(dtype) for dtype in dtypes),
        base > 12,
        base.sum(),  # no dimension
        base.T,  # not contiguous
        base[:, 1],
        base[:0],  # empty
        torch.full((rank + 1, 2), float("nan")),  # another shape everywhere
        torch.nn.Parameter(base),
    ]

def same(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.is_contiguous()
    assert not a.requires_grad
    assert torch.equal(a.double().nan_to_num(7), b.double().nan_to_num(7))

with join(launch, torch.device("cpu")) as processes:
    assert processes.is_first == (rank == 0)
    assert processes.gather((rank, "x" * rank)) == [(0, ""), (1, "x"), (2, "xx")]

    for sender, found in enumerate(processes.gather(tensors(rank))):
        for a, b in zip(found, tensors(sender), strict=True):
            same(a, b)

    codes = torch.full((4, 8), rank, dtype=torch.int8)
    weight = QuantizedWeight(codes, codes.float() + 1, None, PRESETS["W4A16"].weights)
    told = processes.from_first(lambda: {"a": [weight], "b": (None, codes[0, 0])})
    assert set(told) == {"a", "b"} and told["b"][0] is None
    same(told["a"][0].codes, torch.zeros(4, 8, dtype=torch.int8))
    same(told["a"][0].scale, torch.ones(4, 8))
    assert told["a"][0].args == weight.args

    called = []
    assert processes.from_first(lambda: called.append(1)) is None
    assert len(called) == (rank == 0)

    sums, least, most = torch.ones(3) * rank, torch.ones(2) * rank, torch.ones(()) * rank
    more = torch.full((2,), 0.5, dtype=torch.float64)
    processes.reduce(sums=[sums, more], least=[least], most=[most])
    assert sums.tolist() == [3, 3, 3] and more.tolist() == [1.5, 1.5]
    assert least.tolist() == [0, 0] and most.item() == 2

    mine = []
    def work(item):
        mine.append(item)
        return item * item, torch.tensor([item])
    found = processes.spread(range(7), work, cost=lambda item: item)
    assert [square for square, _ in found] == [item * item for item in range(7)]
    assert [int(tensor) for _, tensor in found] == list(range(7))
    assert sorted(sum(processes.gather(mine), [])) == list(range(7))
    assert processes.spread([], work) == []
    assert [square for square, _ in processes.spread([5], work)] == [25]

with join(launch, torch.device("cpu")) as processes:  # a second run of the same processes
    assert processes.gather(rank) == [0, 1, 2]
print("done\\n", end="")  # in one piece: three print at once
"""

# And this: process 1 breaks where the others wait for it, and all end with the same error.
FAILURES = '''
import sys
import torch
from qplug import QplugError
from qplug.errors import CtrlC, OtherProcessError, RelayedError
from qplug.machine.launch import Launch
from qplug.machine.exchange import join

launch = Launch.of()
rank = launch.rank

def run(work):
    """What a run ends with."""
    try:
        with join(launch, torch.device("cpu")) as processes:
            work(processes)
    except BaseException as error:
        return type(error), str(error)
    return None

def at(which, error):
    def work(processes):
        processes.gather(1)
        if rank in which:
            raise error
        processes.gather(2)
    return work

def broken_work(processes):
    def work(item):
        if item == 1:
            raise QplugError("mend this")
        return item
    processes.spread(range(6), work)

def after_the_last_exchange(processes):
    if rank == 0:
        raise QplugError("too late")

def not_to_be_pickled(processes):
    processes.gather(sys if rank == 1 else 1)

mend = QplugError("mend this")
kind = QplugError if rank == 1 else RelayedError
assert run(at({1}, mend)) == (kind, "mend this")
assert run(broken_work) == (kind, "mend this")
assert run(at({0, 1, 2}, QplugError(f"mend {rank}")))[1] == "mend 0"
assert run(after_the_last_exchange)[1] == "too late"
assert run(at({1}, KeyboardInterrupt())) == (KeyboardInterrupt if rank == 1 else CtrlC, "")
other = run(at({1}, ValueError("a bug")))
assert other == (ValueError, "a bug") if rank == 1 else other == (
    OtherProcessError, "process 1 broke: ValueError: a bug"
), other
other = run(not_to_be_pickled)
assert other[0] is (TypeError if rank == 1 else OtherProcessError), other
assert run(lambda processes: None) is None
print("done\\n", end="")  # in one piece: three print at once

if rank == 2:
    sys.stdout.flush()
    with join(launch, torch.device("cpu")):
        import os
        os._exit(3)
kind, text = run(lambda processes: processes.gather(1))
assert kind is OtherProcessError and "has ended; the same command goes on" in text, (kind, text)
'''


@pytest.fixture
def run_three(start: Starter) -> Callable[..., str]:
    """What three processes print that run some code and must end with these exit codes."""

    def run(code: str, *codes: int) -> str:
        ended = start("-c", code, count=3, patience=None).wait()
        assert ended.codes == list(codes), ended.output
        return ended.output

    return run


@pytest.mark.slow
def test_what_one_gives_arrives_at_all(run_three: Callable[..., str]) -> None:
    assert run_three(EXCHANGES, 0, 0, 0) == 3 * "done\n"


@pytest.mark.slow
def test_a_failure_of_one_is_raised_in_all(run_three: Callable[..., str]) -> None:
    assert run_three(FAILURES, 0, 0, 3) == 3 * "done\n"


def test_one_process_needs_nobody() -> None:
    with join(ALONE, torch.device("cpu")) as processes:
        assert type(processes) is Processes
        tensor = torch.arange(3).float()
        processes.reduce(sums=[tensor], least=[tensor], most=[tensor])
        assert tensor.tolist() == [0, 1, 2]
        assert processes.gather(tensor)[0] is tensor
        assert processes.from_first(lambda: tensor) is tensor
        assert processes.spread([1, 2], lambda item: 2 * item, cost=float) == [2, 4]
    with pytest.raises(ValueError, match="as it is"), join(ALONE, torch.device("cpu")):
        raise ValueError("as it is")


def test_a_block_spreads_by_itself_if_it_is_alone() -> None:
    assert qplug.Block("block", ()).spread([3, 1], str, cost=float) == ["3", "1"]


@given(st.lists(st.floats(0, 100), max_size=30), st.integers(1, 6))
def test_shares_are_alike(costs: list[float], count: int) -> None:
    shares = shares_of(costs, count)
    assert len(shares) == count
    assert sorted(number for share in shares for number in share) == list(range(len(costs)))
    loads = [sum(costs[number] for number in share) for share in shares]
    # Whoever ends last took its last item when it had no more than the mean.
    assert max(loads) <= sum(costs) / count + max(costs, default=0) + 1e-6
    assert all(share == sorted(share) for share in shares)


def test_items_of_one_cost_go_round() -> None:
    assert shares_of([1.0] * 5, 2) == [[0, 2, 4], [1, 3]]


# --- how this process was started -----------------------------------------------------------------

TORCHRUN = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
}


def test_torchrun_says_which_process_this_is() -> None:
    assert Launch.of(TORCHRUN) == Launch(rank=3, count=4, local_rank=1, local_count=2)
    assert not Launch.of(TORCHRUN).is_first


@pytest.mark.parametrize("missing", sorted(TORCHRUN))
def test_schedulers_that_set_some_of_it_start_one_process(missing: str) -> None:
    assert Launch.of({**TORCHRUN, missing: ""}) == ALONE
    assert Launch.of({name: value for name, value in TORCHRUN.items() if name != missing}) == ALONE


def test_several_processes_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: asked.append(device) or torch.ones(1))
    second = Launch(rank=3, count=4, local_rank=1, local_count=2)
    assert find_device("auto", second) == find_device("cuda", second) == torch.device("cuda", 1)
    assert find_device("cpu", second) == torch.device("cpu")
    assert asked == [torch.device("cuda", 1)] * 2 + [torch.device("cpu")]
    with pytest.raises(qplug.QplugError, match=r"--device cuda:0: several processes need a GPU"):
        find_device("cuda:0", second)
    with pytest.raises(qplug.QplugError, match=r"3 processes need a GPU each, and 2 can be seen"):
        find_device("auto", Launch(rank=0, count=3, local_rank=0, local_count=3))
