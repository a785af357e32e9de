"""Load folders in SGLang on a GPU, one after another, and say how likely it finds given tokens.

Runs in SGLang's own environment, which has no qplug, and so imports nothing of it. What it is told
and what it answers is as in vllm_logprobs.py; options are passed to ``sglang.Engine``.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from engine_program import answer_loads


def measure(
    folder: str, dtype: str, prompts: list[list[int]], options: dict[str, Any]
) -> dict[str, Any]:
    import sglang

    began = time.monotonic()
    longest = max(map(len, prompts)) + 8
    engine = sglang.Engine(
        model_path=folder,
        dtype=dtype,
        context_length=longest,
        chunked_prefill_size=max(256, longest),
        max_running_requests=4,
        max_total_tokens=max(4096, 4 * longest),
        skip_server_warmup=True,
        log_level="warning",
        **options,
    )
    try:
        answers = engine.generate(
            input_ids=prompts,
            sampling_params={"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=0,
        )
    finally:
        engine.shutdown()
    logprobs = [[at[0] for at in a["meta_info"]["input_token_logprobs"]][1:] for a in answers]
    return {"logprobs": logprobs, "seconds": round(time.monotonic() - began, 1), "emulated": []}


def main() -> None:
    import torch

    packages = ("sglang", "torch", "transformers")
    versions = {name: f"{name} {version(name)}" for name in packages}
    answer_loads({"versions": versions, "device": torch.cuda.get_device_name()}, measure)


if __name__ == "__main__":
    main()
