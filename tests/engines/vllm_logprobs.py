"""Load folders in vLLM on a CPU, one after another, and say how likely it finds given tokens.

    python vllm_logprobs.py JOB.json RESULT.json

Runs in vLLM's own environment, which has no qplug, and so imports nothing of it. A job is
``{"folders": {NAME: PATH}, "prompts": [[TOKEN, ...], ...]}``; the result is, by name, the
``logprobs`` of every token of every prompt but the first, the ``tokens`` that greedy decoding
continues each prompt with, and the ``seconds`` it took. A folder that fails has its ``error``
instead, and the next one is tried.
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

# Read by vLLM when it is imported. All in one process: each engine would else start its own.
os.environ.update(
    VLLM_TARGET_DEVICE="cpu",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

#: How many tokens greedy decoding appends to each prompt.
CONTINUED = 4


def measure(folder: str, prompts: list[list[int]]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    began = time.monotonic()
    longest = max(map(len, prompts)) + CONTINUED
    llm = LLM(
        model=folder,
        enforce_eager=True,
        max_model_len=longest,
        max_num_batched_tokens=longest,
        max_num_seqs=2,
        disable_log_stats=True,
    )
    asked = SamplingParams(max_tokens=CONTINUED, temperature=0, ignore_eos=True, prompt_logprobs=0)
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False
    )
    logprobs = []
    for prompt, answer in zip(prompts, answers, strict=True):
        found = answer.prompt_logprobs[1:]
        logprobs.append([at[token].logprob for token, at in zip(prompt[1:], found, strict=True)])
    return {
        "logprobs": logprobs,
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    job_file, result_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text("utf-8"))

    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    result = {}
    for name, folder in job["folders"].items():
        try:
            result[name] = measure(folder, job["prompts"])
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
