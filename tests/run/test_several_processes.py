"""Two processes give what one gives, but for the order of sums; and they end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import qplug
from qplug.calibration import batches, observation
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.processes import ALONE, Processes
from qplug.machine.session import Session
from qplug.model.view import model_view
from qplug.output.manifest import read_manifest
from qplug.registry.registry import Registry
from qplug_omniquant.omniquant import OmniQuant
from qplug_omniquant.omniquant import Params as OmniQuantParams

if TYPE_CHECKING:
    from conftest import Ended, Starter

pytestmark = pytest.mark.slow

Family = Callable[..., Path]
Quantize = Callable[..., Path]

#: What another order of sums may change: codes of weights that lie between two, by one step.
MOST_CODES = 0.005
SCALES = 1e-5

#: The bound that docs/how-to/several-gpus.md states for mixtures of experts, where a range of
#: another length may have the same loss: the part of the codes and of the scales that may differ,
#: and how far such a scale may be off: as far as the search for clips goes.
OTHER_CODES, OTHER_SCALES, SCALE_OFF = 0.005, 0.01, 0.4
#: How far the mean loss of all linears may be off, and the part of the tokens of an expert, also if
#: other codes send a token of a later block to another expert.
LOSS_OFF, OTHER_TOKENS = 0.01, 0.05

# Does what TROUBLE says to the process and at the block that it names, else nothing.
TROUBLE = '''
import errno, os, signal, time
from pathlib import Path
import qplug.output.writer
from qplug import Algorithm, NoParams, QplugError, hookimpl

journal = Path(__file__).parent / ".out.partial" / "journal.jsonl"

def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

class Trouble(Algorithm[NoParams]):
    """Breaks in many ways."""

    name = "trouble"
    needs_data = True

    def transform(self, block):
        rank, _, kind = os.environ.get("TROUBLE", "").partition(" ")
        if rank not in (os.environ["RANK"], "all") or block.name != "model.layers.1":
            return
        if kind == "mend":
            raise QplugError("this cannot be quantized")
        if kind == "bug":
            raise ValueError("a bug")
        if kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "kill in a portion":
            if any("experts.1." in linear.name for linear in block.linears):
                for _ in range(6000):  # the disk may be slow
                    if journal.read_bytes().count(b"\\n") >= 3:
                        break
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            return
        if kind == "full disk":
            qplug.output.writer.Writer._write = full
            return
        if kind == "astray":
            block.spread([1, 2], lambda item: item)
        time.sleep(60)

@hookimpl
def qplug_algorithms():
    return [Trouble]
'''


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"The number {i} is followed by {i + 1}." for i in range(60)))
    return file


@pytest.fixture
def words(text: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a short run."""
    (tmp_path / "trouble.py").write_text(TROUBLE)

    def made(source: Path, out: str, **changes: Any) -> list[str]:
        options = {
            "algo": "gptq",
            "backend": "compressed-tensors",
            "group-size": 16,
            "dataset": "text",
            "dataset-opt": f"path={text}",
            "samples": 6,
            "seq-len": 20,
            "device": "cpu",
            **changes,
        }
        line = ["--plugin", str(tmp_path / "trouble.py"), "quantize", "--algo", "rtn", str(source)]
        for name, value in options.items():
            line += [f"--{name}", str(value)] if value is not None else []
        for name in ("awq", "osplus"):
            if name in options["algo"]:
                line += ["-o", {"awq": "awq.ratios=7", "osplus": "osplus.steps=13"}[name]]
        return [*line, "--out", str(tmp_path / out)]

    return made


@pytest.fixture
def alone(text: Path, tmp_path: Path) -> Quantize:
    """The same run in this process."""

    def quantized(source: Path, out: str, **changes: Any) -> Path:
        algorithms = changes.get("algo", "gptq")
        options = {"awq": {"ratios": 7}, "osplus": {"steps": 13}}
        return qplug.quantize(
            str(source),
            tmp_path / out,
            **{
                "algo": "gptq",
                "backend": "compressed-tensors",
                "group_size": 16,
                "dataset": "text",
                "dataset_options": {"path": str(text)},
                "samples": 6,
                "seq_len": 20,
                "device": "cpu",
                "algorithm_options": {n: o for n, o in options.items() if n in algorithms},
                **changes,
            },
        ).out

    return quantized


@pytest.fixture
def together(words: Callable[..., list[str]], start: Starter, tmp_path: Path) -> Quantize:
    """A run of two processes, or of ``count``, which must succeed."""

    def quantized(source: Path, out: str, *, count: int = 2, **changes: Any) -> Path:
        ended = start(*words(source, out, **changes), count=count).wait()
        assert ended.codes == [0] * count, ended.output
        assert ended.output.count("next: ") == 1  # the first process alone prints
        return tmp_path / out

    return quantized


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def codes_of(packed: Tensor) -> Tensor:
    """int4 codes from 0 to 15 of int32 ``[out, in / 8]``; int8 as they are."""
    if packed.dtype != torch.int32:
        return packed.int()
    return torch.stack([packed >> shift & 15 for shift in range(0, 32, 4)])


def assert_alike(one: Path, two: Path) -> float:
    """The same layout, scales but for rounding, codes but for a few; gives the part that differ."""
    first, second = open_checkpoint(one), open_checkpoint(two)
    assert first.config == second.config
    assert list(first.tensors) == list(second.tensors)
    count, differ = 0, 0
    for name, tensor in first.tensors.items():
        assert tensor.spec == second.tensors[name].spec
        a, b = first.read(name), second.read(name)
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=SCALES, atol=0)
        elif name.endswith((".weight_packed", ".weight")):
            steps = (codes_of(a) - codes_of(b)).abs()
            assert steps.max() <= 1
            count, differ = count + steps.numel(), differ + int(steps.count_nonzero())
        else:
            assert torch.equal(a, b)
    assert count
    assert differ <= MOST_CODES * count
    return differ / count


@dataclass(frozen=True)
class Differences:
    """The parts of codes and scales that differ, and how far scales and the mean loss are off.

    ``tokens``: the largest part of an expert's tokens by which their numbers differ.
    """

    codes: float
    scales: float
    scale_off: float
    loss_off: float
    tokens: float


def differences(one: Path, two: Path) -> Differences:
    """How far two results of the same layout are apart."""
    first, second = open_checkpoint(one), open_checkpoint(two)
    assert first.config == second.config
    assert list(first.tensors) == list(second.tensors)
    codes, offs = [], []
    for name in first.tensors:
        a, b = first.read(name), second.read(name)
        if a.is_floating_point():
            offs.append(((a - b) / a).abs().nan_to_num().flatten())
        elif name.endswith(".weight_packed"):
            codes.append((codes_of(a) != codes_of(b)).flatten())
        else:
            assert torch.equal(a, b)
    off, other = torch.cat(offs), torch.cat(codes)
    said = [manifest for folder in (one, two) if (manifest := read_manifest(folder)) is not None]
    losses = [sum(manifest.losses.values()) for manifest in said]
    assert said[0].losses.keys() == said[1].losses.keys()
    tokens = [
        torch.tensor([count for of_layer in manifest.experts.values() for count in of_layer])
        for manifest in said
    ]
    return Differences(
        float(other.float().mean()),
        float((off > SCALES).float().mean()),
        float(off.max()),
        abs(losses[1] / losses[0] - 1),
        float(((tokens[0] - tokens[1]).abs() / tokens[0].clamp(min=1)).max()),
    )


W8A8 = {"scheme": "W8A8", "group-size": None}


@pytest.mark.parametrize("propagate", ["quantized", "float"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"algo": "awq"}),
        ("llama", {"algo": "gptq"}),
        ("llama", {"algo": "awq+gptq"}),
        ("opt", {"algo": "osplus", **W8A8}),
    ],
)
def test_two_processes_give_what_one_does(
    name: str,
    changes: dict[str, Any],
    propagate: str,
    family: Family,
    alone: Quantize,
    together: Quantize,
) -> None:
    two = together(family(name), "two", propagate=propagate, **changes)
    python = {key.replace("-", "_"): value for key, value in changes.items()}
    assert_alike(alone(family(name), "one", propagate=propagate, **python), two)


#: A budget that a block with one expert exceeds: each portion has one expert of a layer.
PORTIONS = "1MiB"


@pytest.mark.parametrize("memory", [None, PORTIONS], ids=["whole", "portions"])
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
@pytest.mark.parametrize("propagate", ["quantized", "float"])
@pytest.mark.parametrize(
    ("algo", "count"), [("gptq", 4), ("awq", 4), ("awq+gptq", 2), ("awq+gptq", 4)]
)
def test_mixtures_of_experts_are_those_of_one_process(
    name: str,
    algo: str,
    count: int,
    propagate: str,
    memory: str | None,
    family: Family,
    alone: Quantize,
    together: Quantize,
) -> None:
    changes = {"algo": algo, "samples": 8, "memory": memory, "propagate": propagate}
    one = alone(family(name), "one", **changes)
    shared = together(family(name), "shared", count=count, **changes)
    found = differences(one, shared)
    assert found.scale_off <= SCALE_OFF, found
    assert found.loss_off <= LOSS_OFF, found
    assert found.tokens <= OTHER_TOKENS, found
    if propagate == "float":  # no block depends on the codes of the blocks before
        assert found.codes <= OTHER_CODES, found
        assert found.scales <= OTHER_SCALES, found
        assert found.tokens == 0, found


def test_experts_that_one_process_alone_has_tokens_for(
    family: Family, alone: Quantize, together: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"algo": "awq+gptq", "samples": 2}
    two = together(family("mixtral"), "two", **few, **{"seq-len": 2})
    monkeypatch.setitem(batches._BATCH_TOKENS, "cpu", 2)  # as each of the two takes
    found = differences(alone(family("mixtral"), "one", **few, seq_len=2), two)
    assert (found.codes, found.tokens) == (0, 0)
    # An expert computes all tokens of a process at once: one row rounds otherwise than two do.
    assert found.scale_off <= 10 * SCALES


def test_the_order_of_sums_is_all_that_differs(
    family: Family, alone: Quantize, together: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = together(family("llama"), "two", algo="awq+gptq")
    monkeypatch.setitem(batches._BATCH_TOKENS, "cpu", 3 * 20)  # as each of the two takes
    one = alone(family("llama"), "one", algo="awq+gptq")
    assert assert_alike(one, two) == 0


def test_two_processes_give_the_same_again(family: Family, together: Quantize) -> None:
    once = together(family("llama"), "once", algo="awq+gptq", samples=7)
    assert contents(together(family("llama"), "again", algo="awq+gptq", samples=7)) == contents(
        once
    )


def test_without_data_there_is_no_difference(
    family: Family, alone: Quantize, together: Quantize
) -> None:
    two = together(family("llama"), "two", algo="rtn")
    assert contents(two) == contents(alone(family("llama"), "one", algo="rtn"))


@pytest.mark.slow
def test_torchrun(family: Family, words: Callable[..., list[str]], tmp_path: Path) -> None:
    source, folder = family("llama"), tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "qplug", *words(source, "out", algo="awq")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f"{folder}: 21 layers, ") == 1
    assert run.stdout.count("next: ") == 1
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stdout == ""
    assert again.stderr.count("Error: ") - again.stderr.count("ChildFailedError: ") == 1
    assert f"Error: {folder}: exists; choose another folder, or pass --overwrite" in again.stderr


# Meets nobody, and imports meanwhile what takes the group there is as a default.
LEAVES_NO_THREADS = """
from pathlib import Path
import torch
from qplug.machine.launch import Launch
from qplug.machine.exchange import JoinedProcesses

with JoinedProcesses(Launch(), torch.device("cpu")) as processes:
    import torch._dynamo
    assert processes.gather(torch.ones(1)) == [torch.ones(1)]
names = [thread.read_text() for thread in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed on Linux only")
def test_no_thread_of_the_group_outlives_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    run = subprocess.run(
        [sys.executable, "-c", LEAVES_NO_THREADS],
        env={**os.environ, **meeting},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


# --- what each knows ------------------------------------------------------------------------------


class Threads(Processes):
    """Two processes that are threads of this one."""

    count = 2

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self._board, self._barrier = rank, board, barrier

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait(60)
        found = list(self._board)
        self._barrier.wait(60)
        return found

    def reduce(
        self,
        *,
        sums: Sequence[Tensor] = (),
        least: Sequence[Tensor] = (),
        most: Sequence[Tensor] = (),
    ) -> None:
        for tensors, join in ((sums, torch.add), (least, torch.minimum), (most, torch.maximum)):
            both = self.gather([tensor.clone() for tensor in tensors])
            for tensor, one, two in zip(tensors, *both, strict=True):
                tensor.copy_(join(one, two))


def start_walk_of(source: Path, tokens: Tensor, processes: Processes, **changes: Any) -> Walk:
    folder = open_checkpoint(source)
    view = model_view(folder)
    return Walk(
        folder,
        view,
        dict.fromkeys(view.quantizable, qplug.preset("W4A16").with_group_size(16)),
        Samples(tokens),
        Session(Registry([]), processes=processes),
        propagate="float",
        **changes,
    )


def first_blocks(walk: Walk) -> list[LiveBlock]:
    seen = []
    for name in ("model.layers.0", "model.layers.1"):
        seen.append(walk.gather(name))
        walk.advance(name, {})
    return seen


def seen_by_two(source: Path, tokens: Tensor) -> list[list[LiveBlock]]:
    """The first blocks as each of two processes knows them."""
    board, barrier = [None, None], threading.Barrier(2)
    # One after the other: a model is built under settings that are the whole interpreter's.
    walks = [start_walk_of(source, tokens, Threads(rank, board, barrier)) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(first_blocks, walks))


@pytest.mark.parametrize(
    ("samples", "at_a_time", "kept"),
    [
        (8, 2, 2048),  # every batch is that of one process
        (8, 2, 90),  # of which the last keeps fewer than the others
        (8, 100, 2048),  # all samples were one batch
        (7, 2, 2048),  # the parts are not alike
        (2, 4, 2048),
    ],
)
def test_all_know_of_all_tokens(
    samples: int,
    at_a_time: int,
    kept: int,
    family: Family,
    make_tokens: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(observation, "SAMPLE", kept)
    monkeypatch.setitem(batches._BATCH_TOKENS, "cpu", at_a_time * 20)
    source, tokens = family("llama"), make_tokens(samples, 20)
    one = first_blocks(start_walk_of(source, tokens, ALONE))
    first, second = seen_by_two(source, tokens)
    for alone, mine, others in zip(one, first, second, strict=True):
        for a, b, c in zip(alone.groups, mine.groups, others.groups, strict=True):
            assert a.tokens == b.tokens == c.tokens == samples * 20
            for name in ("gram", "mean", "mean_abs", "low", "high", "sample"):
                wanted, found = getattr(a, name), getattr(b, name)
                assert torch.equal(found, getattr(c, name))  # the same state everywhere
                if name != "sample":
                    rounding = 1e-5 * float(wanted.abs().max())
                    torch.testing.assert_close(found, wanted, rtol=0, atol=rounding)
            if samples % 2 == 0:
                torch.testing.assert_close(b.sample, a.sample, rtol=1e-5, atol=1e-5)
            assert len(b.sample) <= kept


def test_all_know_of_the_tokens_of_experts(
    family: Family, make_tokens: Callable[..., Tensor]
) -> None:
    """Those that one process alone has tokens for, and those that none has; and of their drift."""
    source, tokens = family("mixtral"), make_tokens(2, 1)

    def walk_of(processes: Processes) -> Walk:
        folder = open_checkpoint(source)
        view = model_view(folder)
        return Walk(
            folder,
            view,
            dict.fromkeys(view.quantizable, qplug.preset("W4A16")),
            Samples(tokens),
            Session(Registry([]), processes=processes),
            with_drift=True,
            batch_size=1,
        )

    def second_block(walk: Walk) -> LiveBlock:
        block = walk.gather("model.layers.0")
        changed = {n: w if "norm" in n else w * 1.1 for n, w in block.weights32.items()}
        walk.advance("model.layers.0", changed)
        return walk.gather("model.layers.1")

    board, barrier = [None, None], threading.Barrier(2)
    walks = [walk_of(Threads(rank, board, barrier)) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(second_block, walks)
    one = second_block(walk_of(ALONE))
    groups = [
        [part for group in block.groups for part in (group, *group.by_expert)]
        for block in (one, first, second)
    ]
    assert any(group.tokens == 0 for group in groups[0])
    for a, b, c in zip(*groups, strict=True):
        assert a.tokens == b.tokens == c.tokens
        for name in ("gram", "mean_abs", "low", "high", "sample", "drift", "total_shift"):
            wanted, found = getattr(a, name), getattr(b, name)
            assert torch.equal(found, getattr(c, name))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("samples", [4, 5])
def test_all_learn_the_same(
    samples: int, family: Family, make_tokens: Callable[..., Tensor]
) -> None:
    """The same on each, and what one alone learns of the same batches.

    Of five samples one process has none in its last batch.
    """
    source, tokens = family("opt"), make_tokens(samples, 20)
    tokens[1, 12:] = -1
    board, barrier = [None, None], threading.Barrier(2)
    walks = [
        start_walk_of(
            source, tokens, Threads(rank, board, barrier), with_targets=True, batch_size=1
        )
        for rank in range(2)
    ]

    def learned(walk: Walk) -> LiveBlock:
        block = walk.gather("model.decoder.layers.0")
        OmniQuant(OmniQuantParams(epochs=2)).transform(block)
        return block

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(learned, walks)
    # Alone, with batches of the samples that the two had at the same time.
    half = -(-samples // 2)
    order = [n for pair in zip_longest(range(half), range(half, samples)) for n in pair]
    alone = learned(
        start_walk_of(
            source,
            tokens[[n for n in order if n is not None]],
            ALONE,
            with_targets=True,
            batch_size=2,
        )
    )
    for name, value in alone.weights32.items():
        assert torch.equal(first.weights32[name], second.weights32[name])
        torch.testing.assert_close(first.weights32[name], value, rtol=1e-3, atol=1e-3)
    for mine, others, wanted in zip(first.linears, second.linears, alone.linears, strict=True):
        assert mine.scale is not None
        assert others.scale is not None
        assert wanted.scale is not None
        assert torch.equal(mine.scale, others.scale)
        torch.testing.assert_close(mine.scale, wanted.scale, rtol=1e-2, atol=0)
    assert first.notes == second.notes


# --- the end of one is the end of all -------------------------------------------------------------

#: Seconds from a failure to the end of all. The block takes one; whoever waits in vain, a minute.
SOON = 40
#: What the first process that is left says if another was killed.
ENDED = "another process of this run has ended; the same command goes on from here"


@pytest.fixture
def fail(
    words: Callable[..., list[str]], start: Starter, family: Family, tmp_path: Path
) -> Callable[..., Ended]:
    """A run of two processes in which TROUBLE happens at the second block."""

    def run(trouble: str, *, patience: float = 0.1, **changes: Any) -> Ended:
        line = words(family("llama"), "out", **{"algo": "trouble+gptq", **changes})
        ended: Ended = start(*line, count=2, patience=patience, TROUBLE=trouble).wait()
        assert not (tmp_path / "out").exists()
        assert all(ended.codes), ended.output
        assert ended.seconds < SOON
        return ended

    return run


def complaint(ended: Ended) -> str:
    """The last words of a run, after what it said of its plan and stages."""
    return ended.output[max(0, ended.output.find("Error: ")) :]


@pytest.mark.parametrize("rank", ["0", "1", "all"])
def test_what_can_be_mended_is_said_once(
    rank: str, fail: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = fail(f"{rank} mend")
    assert ended.codes == [1, -signal.SIGTERM]  # the other one waits until it has been said
    assert complaint(ended) == "Error: model.layers.1: this cannot be quantized\n"
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("rank", ["0", "1", "all"])
def test_a_bug_shows_where_it_is(rank: str, fail: Callable[..., Ended], tmp_path: Path) -> None:
    ended = fail(f"{rank} bug")
    assert ended.output.count('raise ValueError("a bug")') == 1
    told = [line for line in ended.output.splitlines() if line.startswith("Error: ")]
    assert len(told) == (rank == "1")  # the first process says that it was another
    assert (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_is_killed_ends_the_others(
    rank: str, fail: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = fail(f"{rank} kill", patience=SOON)  # it ends by itself, however slow the disk is
    assert ended.codes[int(rank)] == -signal.SIGKILL
    assert "Traceback" not in ended.output
    assert ended.output.count("Error: ") == 1
    assert complaint(ended) == f"Error: {ENDED}\n"
    assert (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("rank", ["0", "1", "all"])
def test_ctrl_c(rank: str, fail: Callable[..., Ended], tmp_path: Path) -> None:
    ended = fail(f"{rank} interrupt")
    lines = [line for line in ended.output.splitlines() if line]
    assert "; the same command " in lines[-2]
    assert lines[-1] == "Aborted!"
    assert lines.count("Aborted!") == 1
    assert ended.codes[0] == 1
    assert (tmp_path / ".out.partial").exists()


def test_a_full_disk(fail: Callable[..., Ended], tmp_path: Path) -> None:
    ended = fail("0 full disk")
    assert complaint(ended) == f"Error: {tmp_path}: the disk is full; nothing was kept\n"
    assert not (tmp_path / ".out.partial").exists()


def test_a_plugin_that_is_not_alike_everywhere_is_found_out(fail: Callable[..., Ended]) -> None:
    ended = fail("1 astray")
    assert "the processes do not do the same" in ended.output


def test_there_must_be_a_sample_for_each(fail: Callable[..., Ended], tmp_path: Path) -> None:
    ended = fail("", samples=1)
    assert complaint(ended) == (
        "Error: 2 processes cannot share 1 calibration samples; raise --samples, or start fewer\n"
    )
    assert not (tmp_path / ".out.partial").exists()


def test_a_wrong_option_is_said_once(fail: Callable[..., Ended]) -> None:
    ended = fail("", propagate="backwards")
    assert ended.codes[0] == 2
    assert ended.output.count("Error: ") == 1


def test_killed_and_taken_up_again(
    family: Family,
    together: Quantize,
    words: Callable[..., list[str]],
    start: Starter,
    tmp_path: Path,
) -> None:
    source = family("llama")
    wanted = contents(together(source, "undisturbed", algo="trouble+awq+gptq"))
    line = words(source, "out", algo="trouble+awq+gptq")
    started = start(*line, count=2, TROUBLE="all sleep")
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    give_up = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    for child in started.ids:
        os.kill(child, signal.SIGKILL)
    assert started.wait().codes == [-signal.SIGKILL] * 2
    assert not (tmp_path / "out").exists()
    out = together(source, "out", algo="trouble+awq+gptq")
    assert contents(out) == wanted


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_in_a_portion_of_experts_and_taken_up_again(
    rank: int,
    family: Family,
    together: Quantize,
    words: Callable[..., list[str]],
    start: Starter,
    tmp_path: Path,
) -> None:
    source = family("qwen3-moe")
    changes = {"algo": "trouble+awq+gptq", "memory": PORTIONS}
    wanted = contents(together(source, "undisturbed", **changes))
    trouble = f"{rank} kill in a portion"
    line = words(source, "out", **changes)
    ended = start(*line, count=2, patience=SOON, TROUBLE=trouble).wait()
    assert ended.codes[rank] == -signal.SIGKILL
    assert ended.seconds < SOON
    assert complaint(ended) == f"Error: {ENDED}\n"
    assert (tmp_path / ".out.partial" / "journal.jsonl").read_bytes().count(b"\n") > 2
    assert contents(together(source, "out", **changes)) == wanted


def test_what_one_process_began_two_do_not_take_up(
    family: Family,
    words: Callable[..., list[str]],
    start: Starter,
    fail: Callable[..., Ended],
) -> None:
    line = words(family("llama"), "out", algo="trouble+gptq")
    assert start(*line, RANK="0", TROUBLE="0 kill").wait().codes == [-signal.SIGKILL]
    ended = fail("")
    assert "holds an unfinished run with another number of processes; delete it" in ended.output
