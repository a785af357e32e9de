"""Time one folder in vLLM: run by serving.py, in vLLM's own environment, which has no qplug.

    python serving_speed.py FOLDER RESULT.json OPTIONS

OPTIONS is a JSON list of options for ``vllm.LLM``: the first with which it starts are taken, and
told in the result. Times are of ``LLM.generate``, without the text of tokens, the median of three.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PREFILL_PROMPTS, PREFILL_TOKENS = 8, 2048
DECODED, PROMPT_TOKENS = 128, 32
BATCHES = (1, 32)
REPEATS = 3


def started(folder: str, tries: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """An engine, and the options that it took."""
    from vllm import LLM

    for options in tries:
        try:
            engine = LLM(
                model=folder,
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                max_model_len=PREFILL_TOKENS + 8,
                max_num_batched_tokens=PREFILL_PROMPTS * PREFILL_TOKENS,
                max_num_seqs=max(BATCHES),
                disable_log_stats=True,
                **options,
            )
        except Exception:
            traceback.print_exc()
        else:
            return engine, options
    sys.exit("vLLM starts with none of the options")


def seconds(engine: Any, prompts: int, tokens: int, new: int) -> float:
    """How long it takes to read ``prompts`` of random ``tokens`` and to write ``new`` of each."""
    import torch
    from vllm import SamplingParams

    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    said = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
    taken = []
    for number in range(REPEATS + 1):
        generator = torch.Generator().manual_seed(number)
        drawn = torch.randint(10, vocabulary, (prompts, tokens), generator=generator).tolist()
        asked = [{"prompt_token_ids": prompt} for prompt in drawn]
        began = time.perf_counter()
        engine.generate(asked, said, use_tqdm=False)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])  # the first one compiles and warms up


def main() -> None:
    folder, result, tries = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    import vllm

    began = time.monotonic()
    engine, options = started(folder, json.loads(tries))
    told: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "options": options,
        "seconds to start": round(time.monotonic() - began, 1),
    }
    reading = seconds(engine, PREFILL_PROMPTS, PREFILL_TOKENS, 1)
    told[f"prefill {PREFILL_PROMPTS} x {PREFILL_TOKENS}"] = round(
        PREFILL_PROMPTS * PREFILL_TOKENS / reading
    )
    for batch in BATCHES:
        first = seconds(engine, batch, PROMPT_TOKENS, 1)
        all_ = seconds(engine, batch, PROMPT_TOKENS, DECODED)
        told[f"decode {batch}"] = round(batch * (DECODED - 1) / (all_ - first), 1)
    Path(result).write_text(json.dumps(told), "utf-8")
    print(json.dumps(told), flush=True)
    os._exit(0)  # threads that vLLM leaves behind must not keep the process alive


if __name__ == "__main__":
    main()
