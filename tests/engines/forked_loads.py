"""Loads of an engine in forks of a process that has imported it: a load takes seconds.

Importing vLLM takes ten seconds, and after a load most of that again is spent on taking the engine
down. A fork has what its parent imported, starts from the state of a fresh process, and just ends;
if it fails or crashes its parent is as before. A GPU can be used in a fork as long as its parent
has not touched it: ``a_fork_computes`` tries.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any

from engine_program import Measure


def in_forks(measure: Measure) -> Measure:
    """``measure``, called in a fork of this process; an error there is a RuntimeError here."""
    gc.freeze()  # what is imported stays: collections in forks need not look at it

    def measured(
        folder: str, dtype: str, prompts: list[list[int]], options: dict[str, Any]
    ) -> dict[str, Any]:
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            try:
                found = measure(folder, dtype, prompts, options)
            except BaseException as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            with os.fdopen(writing, "w", encoding="utf-8") as answer:
                json.dump(found, answer)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as answer:
            told = answer.read()
        _, status = os.waitpid(pid, 0)
        if not told:
            raise RuntimeError(f"the load ended with status {os.waitstatus_to_exitcode(status)}")
        answered: dict[str, Any] = json.loads(told)
        return answered

    return measured


def a_fork_computes() -> bool:
    """Say whether a fork of this process can use the GPU, by trying it in one."""
    import torch

    pid = os.fork()
    if pid == 0:
        try:
            computes = torch.ones(1, device="cuda").sum().item() == 1
        except Exception:
            traceback.print_exc()
            computes = False
        os._exit(0 if computes else 1)
    return os.waitpid(pid, 0)[1] == 0
