"""Load folders in vLLM on a CPU, one after another, and say how likely it finds given tokens.

    python vllm_logprobs.py JOB.json RESULT.json

Runs in vLLM's own environment, which has no qplug, and so imports nothing of it. A job is::

    {"prompts": [[TOKEN, ...], ...], "loads": {NAME: {"folder": PATH, "dtype": "auto"}, ...}}

The result has, by name, the ``logprobs`` of every token of every prompt but the first, and the
``seconds`` it took to load and compute. A load that fails has its ``error`` instead, and the next
one is tried.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def measure(folder: str, dtype: str, prompts: list[list[int]]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    began = time.monotonic()
    longest = max(map(len, prompts)) + 1
    llm = LLM(
        model=folder,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=longest,
        max_num_batched_tokens=longest,
        max_num_seqs=2,
        disable_log_stats=True,
    )
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        use_tqdm=False,
    )
    logprobs = []
    for prompt, answer in zip(prompts, answers, strict=True):
        found = answer.prompt_logprobs[1:]
        logprobs.append([at[token].logprob for token, at in zip(prompt[1:], found, strict=True)])
    return {"logprobs": logprobs, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    job_file, result_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text("utf-8"))

    # Several engines one after another in this process: starting one takes most of a minute.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    result: dict[str, dict[str, Any]] = {}
    for name, load in job["loads"].items():
        try:
            result[name] = measure(load["folder"], load["dtype"], job["prompts"])
        except Exception as error:
            traceback.print_exc()
            result[name] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        cleanup_dist_env_and_memory()
    result_file.write_text(json.dumps(result), "utf-8")
    # Threads that vLLM leaves behind must not keep the process alive.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
