"""Which schemes vLLM computes on a CPU, and what the CPU must have for it.

vLLM for CPUs loads one library on CPUs with AVX-512 and another, with fewer kernels, on the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_AVX2 = "vLLM 0.32 on an AVX2 CPU, 2026-11"
_AVX512 = "vLLM 0.32 on an AVX-512 CPU, 2026-11"


@dataclass(frozen=True)
class CPUKernel:
    """What runs ``scheme`` (or the KV cache so called) on a CPU.

    ``needs``: flags that Linux lists in ``/proc/cpuinfo``; None where no CPU runs it, and then
    ``kernel`` says why. ``op``: the operator that is missing in vLLM's library where they are
    lacking, though it loads the weights.
    """

    scheme: str
    kernel: str
    needs: frozenset[str] | None
    evidence: str
    op: str | None = None


_INT4 = ("cpu_gemm_wna16", frozenset({"avx512f"}))
_ONLY_INT4 = "CPUWNA16LinearKernel takes 4 bits only"

CPU_KERNELS = (
    *(
        CPUKernel(scheme, _INT4[0], _INT4[1], f"{_AVX512}; op missing in {_AVX2}", _INT4[0])
        for scheme in ("W4A16", "W4A16_ASYM")
    ),
    CPUKernel("W8A16", _ONLY_INT4, None, f"{_AVX2}, {_AVX512}"),
    CPUKernel("W8A8", "onednn_scaled_mm", frozenset({"avx2"}), f"{_AVX2}, {_AVX512}"),
    CPUKernel(
        "W8A8_STATIC",
        "onednn_scaled_mm with one scale of the inputs (minutes a page without)",
        frozenset({"avx512f"}),
        f"{_AVX512}; in {_AVX2} it computes the same in oneDNN's reference kernel: minutes",
    ),
    CPUKernel("FP8", "static_scaled_fp8_quant is not built", None, f"{_AVX2}, {_AVX512}"),
    CPUKernel("FP8_DYNAMIC", "torch._scaled_mm", frozenset({"avx2"}), f"{_AVX2}, {_AVX512}"),
    CPUKernel("FP8_BLOCK", "cpu fp8 block", frozenset({"amx_tile"}), f"refused in {_AVX512}"),
    CPUKernel("fp8 cache", "cpu_attn", frozenset({"avx512f"}), f"{_AVX512}; refused in {_AVX2}"),
)


def cpu_flags() -> frozenset[str]:
    """The features of this CPU by Linux's names; none where it is not Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    told = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(told.partition(":")[2].split())


def runs_on_cpu(scheme: str, flags: frozenset[str], *, emulating: bool = False) -> str | None:
    """Why vLLM does not compute ``scheme`` on a CPU with ``flags``; None if it does.

    ``emulating``: whether someone stands in for operators that its library lacks.
    """
    row = next((row for row in CPU_KERNELS if row.scheme == scheme), None)
    if row is None:
        return f"{scheme}: never tried on a CPU (no row in qplug_vllm.cpu)"
    if row.needs is None:
        return f"{scheme}: {row.kernel}"
    lacking = sorted(row.needs - flags)
    if lacking and not (emulating and row.op):
        return f"{scheme}: {row.kernel} needs {' and '.join(lacking)}, which this CPU lacks"
    return None
