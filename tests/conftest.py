"""What all tests share: one thread of torch in each process, and processes that start at once."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from qplug import Dataset, Tokenizer

# Matrices here are small, and threads that wait for a busy core cost seconds. It must be said
# before torch is imported; processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes is the machine's doing. A run gives what it gave before; others are
# looked for with --hypothesis-profile=explore.
settings.register_profile("qplug", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("qplug")


def pytest_collection_finish() -> None:
    """What libraries made when they were imported is not looked through for garbage again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _the_demo_text_is_tokenized_once() -> Iterator[None]:
    """To tokenize it takes longer than most runs that are calibrated on a few windows of it."""
    from qplug.text import windows

    work = windows._text_tokens
    known: dict[tuple[str, str], list[int]] = {}

    def once(
        dataset: Dataset[Any],
        tokenizer: Tokenizer,
        length: int,
        split: Any,
        first: int | None = None,
    ) -> list[int]:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if dataset.name != "demo" or backend is None or first is not None:
            return work(dataset, tokenizer, length, split, first)
        key = (split, backend.to_str())
        if len(known.get(key, ())) < length:
            known[key] = work(dataset, tokenizer, length, split)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_text_tokens", once)
        yield


# --- the CPU of the host --------------------------------------------------------------------------

#: The features of the CPU that tests see: all that vLLM's kernels for CPUs are known to ask for.
DECLARED_CPU = ("avx2", "avx512f", "avx512_vnni")


@pytest.fixture(scope="session")
def _cpuinfo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cpu") / "cpuinfo"


@pytest.fixture(autouse=True)
def declare_cpu(_cpuinfo: Path) -> Iterator[Callable[..., None]]:
    """Declares the features of the CPU in place of the host's: ``declare_cpu("avx2")``.

    A test that declares none sees those of ``DECLARED_CPU``, whatever host it runs on.
    """
    from qplug_vllm import cpu

    def declare(*flags: str) -> None:
        _cpuinfo.write_text(f"flags\t\t: {' '.join(flags)}\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CPUINFO", _cpuinfo)
        declare(*DECLARED_CPU)
        yield declare


# --- processes ------------------------------------------------------------------------------------

# Starts what each line of stdin says, as often as it says, and as torchrun does if it says more
# than once: in forks of this process, which has everything imported. Tells the processes' ids, then
# how they ended.
STARTER = """
import json, os, signal, socket, sys, time, traceback
import transformers
import transformers.models.llama.modeling_llama, transformers.models.mixtral.modeling_mixtral
import transformers.models.opt.modeling_opt
import torch.distributed
import qplug.run.perform, qplug.run.quantize
from qplug.cli.main import main
from qplug import Checkpoint
from qplug.checkpoint.open import open_checkpoint
from qplug.registry.registry import Registry
from qplug.model.view import model_view
from qplug.checkpoint.locate import find_model

demo = find_model("qplug:demo")
Registry.installed().load()
transformers.AutoTokenizer.from_pretrained(demo)
model_view(open_checkpoint(demo))  # transformers compiles a thousand patterns

def work(words):
    if words[0] == "-c":
        exec(words[1], {"__name__": "__main__"})
    else:
        main(words, prog_name="qplug")

def be_child(told, rank, port):
    # A job in the background starts with Ctrl-C switched off.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(told["folder"])
    os.environ.update(told["environment"])
    if told["count"] > 1:
        count = str(told["count"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count)
        os.environ.update(LOCAL_WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for stream, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(told["log"] + "." + stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    end = 0
    try:
        work(told["words"])
    except SystemExit as error:
        end = error.code or 0
    except BaseException:
        traceback.print_exc()
        end = 1
    sys.stdout.flush()
    os._exit(end)  # without a second of tidying up

for line in sys.stdin:
    told = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(told["count"]):
        child = os.fork()
        if child == 0:
            be_child(told, rank, port)
        children.append(child)
    print(json.dumps(children), flush=True)
    ends = {}
    while len(ends) < told["count"]:
        child, status = os.wait()
        ends[child] = os.waitstatus_to_exitcode(status)
        if ends[child] != 0 and told["end_together"]:
            time.sleep(0.1)
            for other in set(children) - set(ends):
                os.kill(other, signal.SIGTERM)
    print(json.dumps([ends[child] for child in children]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How processes ended: their exit codes, by rank, and all they printed."""

    codes: list[int]
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@dataclass(frozen=True)
class Started:
    """Processes that run. Wait for their end before others are started."""

    ids: list[int]
    log: Path
    hear: IO[str]
    began: float

    def wait(self) -> Ended:
        codes = json.loads(self.hear.readline())
        stdout, stderr = (Path(f"{self.log}.{name}").read_text() for name in ("stdout", "stderr"))
        return Ended(codes, stdout, stderr, time.monotonic() - self.began)


@dataclass(frozen=True)
class Starter:
    """``start("eval", "qplug:demo")`` is that command line, ``start("-c", code)`` is Python's.

    In ``count`` processes, in ``folder``. Unless they ``end_together``, one that fails leaves the
    others as they are.
    """

    starter: subprocess.Popen[str]
    logs: Path

    def __call__(
        self,
        *words: object,
        count: int = 1,
        folder: Path | None = None,
        end_together: bool = True,
        **environment: str,
    ) -> Started:
        assert self.starter.stdin is not None
        assert self.starter.stdout is not None
        log = self.logs / str(time.monotonic_ns())
        told = {"words": [str(word) for word in words], "count": count, "log": str(log)}
        told |= {"folder": str(folder or Path.cwd()), "environment": environment}
        self.starter.stdin.write(json.dumps({**told, "end_together": end_together}) + "\n")
        self.starter.stdin.flush()
        ids = json.loads(self.starter.stdout.readline())
        return Started(ids, log, self.starter.stdout, time.monotonic())


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts processes that have torch and transformers imported: it costs no seconds then."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", STARTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as starter:
        yield Starter(starter, tmp_path_factory.mktemp("logs"))
        assert starter.stdin is not None
        starter.stdin.close()
