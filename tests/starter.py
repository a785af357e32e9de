"""Starts processes that have everything imported: a program, run by the fixture ``start``.

A line of stdin is a request in JSON: the command line ``words``, the ``folder``, the
``environment``, the ``log`` that output goes to, and the ``count`` of processes. The program forks
itself that often, as torchrun starts processes if the count is above 1. It answers with a line of
the processes' ids, and with a line of their exit codes once they ended.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import time
from importlib import import_module
from typing import Any

from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.cli.main import main
from qplug.model.tokenizer import load_tokenizer
from qplug.model.view import model_view
from qplug.registry.registry import Registry
from qplug.text import random_windows

#: What the processes import, but this program does not use.
MODULES = (
    "torch.distributed",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.opt.modeling_opt",
    "qplug.run.perform",
    "qplug.run.quantize",
)


def import_everything() -> None:
    """Loads modules, plugins, what transformers compiles at its first use, and the demo's tokens.

    The text is tokenized here, once, as that takes longer than most of the processes run.
    """
    for module in MODULES:
        import_module(module)
    demo = find_model("qplug:demo")
    kind = Registry.installed().datasets["demo"]
    tokenizer = load_tokenizer(str(demo), trust_remote_code=False)
    random_windows(kind(kind.Params()), tokenizer, length=1, count=1, seed=0)
    model_view(open_checkpoint(demo))  # transformers compiles a thousand patterns


def work(words: list[str]) -> None:
    """Runs Python code after ``-c``, or the command line of ``qplug``."""
    if words[0] == "-c":
        exec(words[1], {"__name__": "__main__"})
    else:
        main(words, prog_name="qplug")


def be_child(request: dict[str, Any], rank: int, port: int) -> None:
    """Does the work of one process, and ends it."""
    # A job in the background starts with Ctrl-C switched off.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    if request["count"] > 1:
        count = str(request["count"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count)
        os.environ.update(LOCAL_WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for stream, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(request["log"] + "." + stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    code: Any = 0
    try:
        work(request["words"])
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    os._exit(code)  # an orderly exit takes a second


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def wait_for(children: list[int], patience: float | None) -> list[int]:
    """Returns the exit codes. If a process fails, the others are ended after that many seconds."""
    codes: dict[int, int] = {}
    give_up = math.inf
    while len(codes) < len(children):
        # Once one has failed, what the others do meanwhile is looked at now and then.
        child, status = os.waitpid(-1, 0 if math.isinf(give_up) else os.WNOHANG)
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child] != 0 and patience is not None and math.isinf(give_up):
                give_up = time.monotonic() + patience
        elif time.monotonic() < give_up:
            time.sleep(0.01)
        else:
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGTERM)
            give_up = math.inf
            patience = None
    return [codes[child] for child in children]


def answer(request: dict[str, Any]) -> None:
    port = free_port()
    children = []
    for rank in range(request["count"]):
        child = os.fork()
        if child == 0:
            be_child(request, rank, port)
        children.append(child)
    print(json.dumps(children), flush=True)
    codes = wait_for(children, request["patience"])
    print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    sys.path[0] = ""  # as for ``python -c``: the folder of the work, not that of this file
    import_everything()
    for line in sys.stdin:
        answer(json.loads(line))
