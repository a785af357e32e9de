"""What the programs share that run in an engine's own environment: loads in, answers out.

    python PROGRAM.py JOB.json ANSWERS.jsonl

A job is ``{"prompts": [[TOKEN, ...], ...], "options": {...}}``. Every line of standard input is a
load, ``{"folder": PATH, "dtype": "auto", "options": {...}}``; its options go over those of the job.
The first line of the answers says what computes; then there is one for each load, or its ``error``.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Measure = Callable[[str, str, list[list[int]], dict[str, Any]], dict[str, Any]]


def answer_loads(told: dict[str, Any], measure: Measure) -> None:
    """Say what is ``told`` of this engine, and then what ``measure`` finds of each load."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    with Path(sys.argv[2]).open("a", encoding="utf-8") as answers:
        print(json.dumps(told), file=answers, flush=True)
        for line in sys.stdin:
            load = json.loads(line)
            options = {**job["options"], **load["options"]}
            try:
                found = measure(load["folder"], load["dtype"], job["prompts"], options)
            except Exception as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(found), file=answers, flush=True)
