"""Load folders in vLLM, one after another, and say how likely it finds given tokens.

Runs in vLLM's own environment, which has no qplug, and so imports nothing of it. It is told what to
load as ``engine_program`` says; options are passed to ``vllm.LLM``. An answer has the ``logprobs``
of every token of every prompt but the first, the ``seconds`` it took to load and compute, and what
was ``emulated``. With the option ``pooling``, a task of vLLM's pooling models, it has what that
task computes of each prompt in place of ``logprobs``, as ``pooled``.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import packages_distributions, version
from typing import Any
from unittest import mock

from engine_program import answer_loads
from forked_loads import a_fork_computes, in_forks
from torchvision_for_cpu import make_importable

#: The engine of the last load. Taking it down takes seconds, which a fork saves by ending with it.
engines: list[Any] = []


def measure(
    folder: str, dtype: str, prompts: list[list[int]], options: dict[str, Any]
) -> dict[str, Any]:
    began = time.monotonic()
    emulated_calls.clear()
    options = dict(options)
    task = options.pop("pooling", None)
    with without_amx_products() if dtype == "float32" else nullcontext():
        if task is None:
            found = {"logprobs": logprobs_of(folder, dtype, prompts, options)}
        else:
            found = {"pooled": pooled(folder, dtype, prompts, task, options)}
    seconds = round(time.monotonic() - began, 1)
    return {**found, "seconds": seconds, "emulated": sorted(set(emulated_calls))}


def measure_and_clean(
    folder: str, dtype: str, prompts: list[list[int]], options: dict[str, Any]
) -> dict[str, Any]:
    """``measure``, after which this process can load another folder."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    try:
        return measure(folder, dtype, prompts, options)
    finally:
        engines.clear()
        gc.collect()
        cleanup_dist_env_and_memory()


def load(folder: str, dtype: str, prompts: list[list[int]], options: dict[str, Any]) -> Any:
    """A ``vllm.LLM`` of ``folder`` that takes ``prompts``."""
    from vllm import LLM

    longest = max(map(len, prompts)) + 1
    llm = LLM(
        model=folder,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=longest,
        max_num_batched_tokens=longest,
        max_num_seqs=2,
        disable_log_stats=True,
        **options,
    )
    engines.append(llm)
    return llm


def logprobs_of(
    folder: str, dtype: str, prompts: list[list[int]], options: dict[str, Any]
) -> list[list[float]]:
    from vllm import SamplingParams

    answers = load(folder, dtype, prompts, options).generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        use_tqdm=False,
    )
    logprobs = []
    for prompt, answer in zip(prompts, answers, strict=True):
        found = answer.prompt_logprobs[1:]
        logprobs.append([at[token].logprob for token, at in zip(prompt[1:], found, strict=True)])
    return logprobs


def pooled(
    folder: str, dtype: str, prompts: list[list[int]], task: str, options: dict[str, Any]
) -> list[Any]:
    """What ``task`` computes of each prompt, with no activation function after it."""
    from vllm import PoolingParams

    config = {"task": task}
    llm = load(folder, dtype, prompts, {**options, "runner": "pooling", "pooler_config": config})
    answers = llm.encode(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        PoolingParams(use_activation=False),
        pooling_task=task,
        use_tqdm=False,
    )
    return [answer.outputs.data.float().tolist() for answer in answers]


def without_amx_products() -> AbstractContextManager[Any]:
    """Lets vLLM choose oneDNN's integer product, which every other CPU uses.

    vLLM chooses its product for AMX whatever the dtype of the activations, and that product then
    refuses float32.
    """
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    return mock.patch.object(cpu, "check_cpu_sgl_kernel", return_value=False)


# --- a kernel that vLLM's library for CPUs without AVX-512 lacks ----------------------------------

INT4 = "cpu_gemm_wna16"
emulated_calls: list[str] = []


def emulate_int4() -> None:
    """Stand in for vLLM's int4 product, so that all else of vLLM runs as it is.

    That is its choice of scheme and kernel, its loader, and its own packing for the kernel: what is
    multiplied here is what they made of the files.
    """
    import torch

    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        f"{INT4}(Tensor x, Tensor q, Tensor(a!) out, Tensor scales, Tensor? zeros, Tensor? bias, "
        "int pack_factor, str isa_hint) -> ()"
    )
    library.impl(INT4, multiply_int4, "CPU")
    globals()["_library"] = library  # it takes its operators with it when it goes


def multiply_int4(
    x: Any, q: Any, out: Any, scales: Any, zeros: Any, bias: Any, pack_factor: int, isa_hint: str
) -> None:
    """``out = x @ W + bias``; ``W: [in, out]`` lies in ``q`` in blocks of 16 columns.

    ``q``: int32 ``[out / 16, in * 2]``; ``scales: [groups, out]``; ``zeros``: int32 ``[groups, out
    / 8]``, or None for 8.
    """
    emulated_calls.append(INT4)
    columns, (groups, width) = x.shape[1], scales.shape
    codes = nibbles(q.view(width // 16, columns, 2)).permute(1, 0, 2).reshape(columns, width)
    offset = 8 if zeros is None else nibbles(zeros).view(groups, width).unsqueeze(1)
    grouped = codes.view(groups, columns // groups, width) - offset
    weight = (grouped * scales.float().unsqueeze(1)).view(columns, width)
    product = x.float() @ weight
    out.copy_(product if bias is None else product + bias.float())


def nibbles(words: Any) -> Any:
    """The eight 4-bit numbers of each int32 in the last axis, lowest first, as float32."""
    import torch

    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(-2).float()


# --- a product that takes seconds on a CPU with AMX -----------------------------------------------

FP8 = "_scaled_mm"


def emulate_fp8() -> None:
    """Stand in for torch's fp8 product, for which oneDNN has but a reference kernel there.

    Products of two fp8 numbers are exact in float32, and both kernels sum them in float32.
    """
    import torch

    torch._scaled_mm = multiply_fp8


def multiply_fp8(
    a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any = None, out_dtype: Any = None
) -> Any:
    """``a @ b * scale_a * scale_b + bias``; ``a``: fp8 ``[tokens, in]``, ``b``: ``[in, out]``."""
    emulated_calls.append(FP8)
    product = a.float() @ b.float() * (scale_a * scale_b)
    return (product if bias is None else product + bias.float()).to(out_dtype or a.dtype)


# --- experts, for which vLLM has int4 kernels on CPUs with AMX, and not for every router ----------

EXPERTS = "int4 experts"


def emulate_int4_experts() -> None:
    """Let experts that no int4 kernel takes here be those that vLLM has for GPUs without a kernel.

    vLLM reads them from the files as ever, and makes float matrices of them when it has; here they
    then go through its float experts for CPUs, and not through those in Triton.
    """
    from vllm._custom_ops import cpu_prepack_moe_weight
    from vllm.model_executor.layers.fused_moe.experts import int4_emulation_moe
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16

    triton = int4_emulation_moe.Int4EmulationTritonExperts
    backends = [*int_wna16._get_priority_backends(), int_wna16.WNA16MoEBackend.EMULATION]

    class FloatExperts(CPUUnquantizedExperts):  # type: ignore[misc]
        """The weights that ``apply`` is given are float by now."""

        _supports_quant_scheme = staticmethod(triton._supports_quant_scheme)
        quant_dtype = block_shape = None

        def __init__(self, moe_config: Any, quant_config: Any):
            super().__init__(moe_config, quant_config)
            for weight in (self.quant_config._w1, self.quant_config._w2):
                weight.dtype = weight.scale = None

        def apply(self, *, w1: Any, w2: Any, **others: Any) -> None:
            emulated_calls.append(EXPERTS)
            packed = (cpu_prepack_moe_weight(weight, self.isa) for weight in (w1, w2))
            super().apply(**dict(zip(("w1", "w2"), packed, strict=True)), **others)

    int_wna16._get_priority_backends = lambda: backends
    int4_emulation_moe.Int4EmulationTritonExperts = FloatExperts


# --- what takes time, and is the same for every load ----------------------------------------------


def inspect_here() -> None:
    """Let vLLM look at a model's class in this process, not in one that imports all of it again."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda work: work()


#: What every load imports, and what it imports on a CPU and on a GPU alone.
EVERYWHERE = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.mixtral",
    "vllm.v1.core.sched.scheduler",
    "torch.distributed.tensor.experimental",
    "torch._inductor.compile_fx",
)
ON_A_CPU = (
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen2_vl",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.utils.cpu_triton_utils",
    "vllm.distributed.elastic_ep.elastic_execute",
    "transformers.integrations.mistral.tokenizer",
)
ON_A_GPU = ("vllm.v1.worker.gpu_worker", "vllm.v1.attention.backends.triton_attn")


def import_all(modules: tuple[str, ...]) -> None:
    """Import ``modules``, and the formats that vLLM reads."""
    for module in modules:
        importlib.import_module(module)
    from vllm.model_executor.layers.quantization import get_quantization_config

    get_quantization_config("compressed-tensors")  # imports all of them


# --------------------------------------------------------------------------------------------------


def main() -> None:
    # Several engines one after another in this process: starting one takes most of a minute.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch

    if torch.version.cuda is None:
        make_importable()
    from vllm import _custom_ops  # noqa: F401 - loads the library with vLLM's operators
    from vllm.platforms import current_platform

    forks = current_platform.is_cpu()
    if forks:
        if not hasattr(torch.ops._C, INT4):
            emulate_int4()
        if torch.cpu._is_amx_tile_supported():
            emulate_fp8()
        emulate_int4_experts()
        inspect_here()
        import_all(EVERYWHERE + ON_A_CPU)
    elif not torch.cuda.is_initialized():
        inspect_here()
        import_all(EVERYWHERE + ON_A_GPU)
        forks = a_fork_computes()
    packages = {"vllm": packages_distributions()["vllm"][0], "torch": "torch"}
    packages["transformers"] = "transformers"
    told = {
        "versions": {name: f"{package} {version(package)}" for name, package in packages.items()},
        "device": "cpu" if current_platform.is_cpu() else current_platform.get_device_name(),
        "forks": forks,
    }
    answer_loads(told, in_forks(measure) if forks else measure_and_clean)
    # Threads that vLLM leaves behind must not keep the process alive.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
