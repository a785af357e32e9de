"""The folders that engines are given, and what qplug's reader finds in them, made side by side."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from engine_cases import Case, engine_of
from safetensors.torch import load_file, save_file
from torch import Tensor

import qplug
from qplug import QuantArgs
from qplug.api.capability import NEWEST
from qplug.model import kv_cache

#: How many processes quantize and read.
WRITERS = int(os.environ.get("QPLUG_ENGINE_WRITERS", "1"))
#: In 8 windows a percent of perplexity is chance; of a CPU, more would take minutes.
TOKENS, WINDOWS = 128, 64 if torch.cuda.is_available() else 8


@dataclass(frozen=True)
class Written:
    """A folder, and what is expected of it.

    ``logprobs``: ``[prompts, tokens - 1]``, of the reader that rounds no activations; ``rounding``:
    how far they are, on average, from those of the reader that does. ``perplexity``: as
    ``qplug eval`` has it, with activations rounded.
    """

    folder: Path
    logprobs: list[list[float]]
    rounding: float
    perplexity: float


def write_all(
    cases: list[Case], models: Mapping[str, Path], prompts: list[list[int]], base: Path
) -> Iterator[tuple[Case, Written | Exception]]:
    """Each case when it is ready, or why it is not: a QplugError if qplug refuses it."""
    with ProcessPoolExecutor(WRITERS, mp_context=get_context("spawn")) as writers:
        started = {
            writers.submit(write, case, models[case.model], prompts, base / str(case)): case
            for case in cases
        }
        for ready in as_completed(started):
            refusal = ready.exception()
            found = refusal if isinstance(refusal, Exception) else ready.result()
            yield started[ready], found


def version_of(backend: str) -> dict[str, str]:
    """The option for the version of the engine that is installed; none for the newest."""
    engine = engine_of(backend)
    return {} if engine is None or engine.version == NEWEST else {"engine": engine.version}


def write(case: Case, model: Path, prompts: list[list[int]], out: Path) -> Written:
    """Quantize ``model``, and read what was written."""
    folder = qplug.quantize(
        str(model),
        out,
        algo=case.algo,
        scheme=case.scheme,
        group_size=case.group_size,
        backend=case.backend,
        backend_options=version_of(case.backend),
        kv_cache=case.kv_cache,
        ignore=case.ignore,
        overrides=dict([case.override] if case.override else []),
        samples=16,
        seq_len=TOKENS,
        device="cpu",
    ).out
    tokens = torch.tensor(prompts)
    plain = read(folder, tokens, quantize_activations=False)
    rounded = read(folder, tokens) if case.rounds_activations else plain
    rounding = (rounded - plain).abs().mean().item()
    if case.model == "demo":
        perplexity = qplug.evaluate(
            str(folder), seq_len=TOKENS, windows=WINDOWS, device="cpu"
        ).perplexity
    else:  # the tokens are of the demo's tokenizer: what ``qplug eval`` computes of them
        perplexity = math.exp(-rounded.double().mean().item())
    return Written(folder, plain.tolist(), rounding, perplexity)


@torch.inference_mode()
def read(
    folder: Path, prompts: Tensor, *, quantize_activations: bool = True, cut_cache: bool = False
) -> Tensor:
    """The log-probabilities ``[prompts, tokens - 1]`` that qplug's reader computes in float32.

    ``cut_cache``: keys and values are cut to fp8, as vLLM does on CPUs, and not rounded.
    """
    model = qplug.load(str(folder), quantize_activations=quantize_activations)
    with pytest.MonkeyPatch.context() as patch:
        if cut_cache:
            patch.setattr(kv_cache, "fake_quantize_activations", cut)
        logprobs = model(prompts, use_cache=False).logits.log_softmax(-1)
    return logprobs[:, :-1].gather(2, prompts[:, 1:, None]).squeeze(2)


def with_inputs_per_token(folder: Path, copy: Path) -> Path:
    """A copy of ``folder`` whose static inputs are dynamic: a scale for each token, none stored."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text("utf-8"))
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] |= {"dynamic": True, "strategy": "token"}
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = load_file(copy / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith("input_scale")}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def cut(x: Tensor, args: QuantArgs, scale: Tensor) -> Tensor:
    """``x`` as the next values of e4m3 towards zero, under ``scale: [1]``."""
    assert args.dtype == "e4m3"
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    quotient = x.float() / scale
    below = torch.searchsorted(grid, quotient.abs().contiguous(), right=True) - 1
    return (grid[below] * quotient.sign() * scale).to(x.dtype)
