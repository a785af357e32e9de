"""Loads of an engine on a CPU in forks of a process that has imported it: a load takes seconds.

Importing vLLM takes ten seconds, and after a load most of that again is spent on taking the engine
down. A fork has what its parent imported, starts from the state of a fresh process, and just ends;
if it fails or crashes its parent is as before. Not for GPUs: CUDA does not survive a fork.
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
