"""Time one folder in vLLM: run by serving.py, in vLLM's own environment, which has no qplug.

    python serving_speed.py FOLDER RESULT.json OPTIONS [--requests 1,32,256] [--prompt 1024]

OPTIONS is a JSON object of options for ``vllm.LLM``. Times are of ``LLM.generate``, without the
text of tokens: the median of three after one that is not counted, or of fewer where they are long.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

#: The tokens that a request writes after a prompt of so many.
DECODED, SHORT_PROMPT = 128, 32
#: The most tokens of prompts in one step.
STEP_TOKENS = 16384
REPEATS, ENOUGH_SECONDS = 3, 3.0


def started(folder: str, options: dict[str, Any], told: argparse.Namespace) -> Any:
    """An engine that takes the largest number of requests."""
    from vllm import LLM

    return LLM(
        model=folder,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=max(told.prompt, SHORT_PROMPT + DECODED) + 8,
        max_num_batched_tokens=max(STEP_TOKENS, told.prompt),
        max_num_seqs=max(told.requests),
        disable_log_stats=True,
        **options,
    )


def seconds(engine: Any, prompts: int, tokens: int, new: int) -> float:
    """How long it takes to read ``prompts`` of random ``tokens`` and to write ``new`` of each."""
    import torch
    from vllm import SamplingParams

    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    said = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
    taken: list[float] = []
    # The first one compiles and warms up; steps of a full batch are warm after fewer requests.
    uncounted = 0 if new == 1 and prompts * tokens > 4 * STEP_TOKENS else 1
    while len(taken) < uncounted + REPEATS:
        generator = torch.Generator().manual_seed(len(taken))
        drawn = torch.randint(10, vocabulary, (prompts, tokens), generator=generator).tolist()
        asked = [{"prompt_token_ids": prompt} for prompt in drawn]
        began = time.perf_counter()
        engine.generate(asked, said, use_tqdm=False)
        taken.append(time.perf_counter() - began)
        if len(taken) > uncounted and sum(taken[uncounted:]) > ENOUGH_SECONDS:
            break
    return statistics.median(taken[uncounted:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("result", type=Path)
    parser.add_argument("options", type=json.loads)
    parser.add_argument("--requests", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.set_defaults(requests=[1, 32, 256])
    told = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    import vllm

    began = time.monotonic()
    engine = started(told.folder, told.options, told)
    row: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "options": told.options,
        "seconds to start": round(time.monotonic() - began, 1),
    }
    for requests in told.requests:
        reading = seconds(engine, requests, told.prompt, 1)
        row[f"prefill {requests} x {told.prompt}"] = round(requests * told.prompt / reading)
    for requests in told.requests:
        first = seconds(engine, requests, SHORT_PROMPT, 1)
        all_ = seconds(engine, requests, SHORT_PROMPT, DECODED)
        row[f"decode {requests}"] = round(requests * (DECODED - 1) / (all_ - first), 1)
    row["seconds in all"] = round(time.monotonic() - began, 1)
    told.result.write_text(json.dumps(row), "utf-8")
    print(json.dumps(row), flush=True)
    os._exit(0)  # threads that vLLM leaves behind must not keep the process alive


if __name__ == "__main__":
    main()
