"""Measure how many tokens that a draft head (MTP) proposes are accepted by vLLM.

    PYTHON_OF_VLLM benchmarks/acceptance.py TEXT FOLDER... [--prompts 64] [--options JSON]

Each FOLDER is served twice, with and without speculative decoding (one drafted token a step), and
continues the same prompts greedily: prompts of 64 tokens, spread over TEXT, by 128 tokens each. A
JSON line for each folder has

- ``length``: the acceptance length, 1 + accepted / drafts, which is the number of tokens that a
  step of the model gives;
- ``same``: the number of prompts whose 128 tokens are the same without speculation;
- ``near``: for the other prompts, the largest distance in nats, without speculation, between the
  two tokens at the first place where the answers differ. Batches of other sizes may round
  otherwise, so that a tie falls otherwise.

On a CPU, VLLM_CPU_KVCACHE_SPACE=1 is enough, and VLLM_CPU_INT4_W4A8=0 keeps activations of W4A16 in
bfloat16. This program imports nothing of qplug.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

GIVEN, NEW = 64, 128

#: The tokens of an answer, and at each place the log-probabilities of the likeliest tokens.
Answer = tuple[list[int], list[dict[int, float]]]


def prompts_of(folder: Path, text: Path, count: int) -> list[list[int]]:
    """Returns the first GIVEN tokens of each of ``count`` equal parts of ``text``."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text("utf-8"), verbose=False)
    ids: list[int] = tokens["input_ids"]
    apart = len(ids) // count
    return [ids[start : start + GIVEN] for start in range(0, apart * count, apart)]


def answers_of(
    folder: Path, prompts: list[list[int]], options: dict[str, Any]
) -> tuple[list[Answer], dict[str, int]]:
    """Returns the answers to ``prompts``, and what the engine counted of its drafts."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        model=str(folder),
        enforce_eager=True,
        max_model_len=GIVEN + NEW + 8,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        disable_log_stats=False,
        **options,
    )
    sampling = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, logprobs=5)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = [found.outputs[0] for found in llm.generate(given, sampling, use_tqdm=False)]
    found = [
        ([*answer.token_ids], [{t: p.logprob for t, p in at.items()} for at in answer.logprobs])
        for answer in answers
    ]
    counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    names = ("num_drafts", "num_accepted_tokens")
    return found, {name: int(counts.get(f"vllm:spec_decode_{name}", 0)) for name in names}


def distance(drafted: Answer, plain: Answer) -> float:
    """Returns how far apart the first two tokens that differ are, in nats; 0.0 if none differ."""
    for ours, theirs, likely in zip(drafted[0], plain[0], plain[1], strict=True):
        if ours != theirs:
            return likely[theirs] - likely.get(ours, min(likely.values()))
    return 0.0


def measure(folder: Path, prompts: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of ``folder``, as the head of this file lists them."""
    speculation = {"method": "mtp", "num_speculative_tokens": 1}
    drafted, counts = answers_of(folder, prompts, {**options, "speculative_config": speculation})
    plain, _ = answers_of(folder, prompts, options)
    pairs = [*zip(drafted, plain, strict=True)]
    return {
        "folder": folder.name,
        "length": round(1 + counts["num_accepted_tokens"] / counts["num_drafts"], 3),
        "accepted": counts["num_accepted_tokens"],
        "drafts": counts["num_drafts"],
        "same": sum(ours[0] == theirs[0] for ours, theirs in pairs),
        "of": len(prompts),
        "near": round(max(distance(*pair) for pair in pairs), 4),
    }


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("text", type=Path)
    words.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    words.add_argument("--prompts", type=int, default=64)
    words.add_argument("--options", type=json.loads, default={}, help="for vllm.LLM, as JSON")
    told = words.parse_args()
    # Several engines one after another in this process, whose counts it can read.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for folder in told.folders:
        prompts = prompts_of(folder, told.text, told.prompts)
        print(json.dumps(measure(folder, prompts, told.options)), flush=True)
    # Threads that vLLM leaves behind must not keep the process alive.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
