"""Load folders in SGLang on a GPU, one after another, and say how likely it finds given tokens.

    python sglang_logprobs.py JOB.json RESULT.json

Runs in SGLang's own environment, which has no qplug, and so imports nothing of it. Job and result
are those of vllm_logprobs.py; ``options`` are passed to ``sglang.Engine``.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any


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
    job_file, result_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text("utf-8"))
    import torch

    packages = ("sglang", "torch", "transformers")
    result: dict[str, Any] = {
        "versions": {name: f"{name} {version(name)}" for name in packages},
        "device": torch.cuda.get_device_name(),
        "loads": {},
    }
    for name, load in job["loads"].items():
        options = {**job["options"], **load.get("options", {})}
        try:
            found = measure(load["folder"], load["dtype"], job["prompts"], options)
            result["loads"][name] = found
        except Exception as error:
            traceback.print_exc()
            result["loads"][name] = {"error": f"{type(error).__name__}: {error}"}
        result_file.write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
