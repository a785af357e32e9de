"""What a CPU must have for vLLM to compute a scheme on it.

vLLM for CPUs loads one library on CPUs with AVX-512 and another, with fewer kernels, on the rest;
``qplug_vllm.capabilities`` tells of the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qplug_vllm.capabilities import CAPABILITIES

_AVX2 = "vLLM 0.32 on an AVX2 CPU, 2026-11-25"


@dataclass(frozen=True)
class CPUNeed:
    """The features, by the names in ``/proc/cpuinfo``, that ``scheme`` (or a KV cache) needs.

    ``op``: the operator that vLLM's library lacks without them, though all else is there.
    ``exact``: the features without which its products are not those of the codes to the last bit.
    """

    scheme: str
    flags: frozenset[str]
    evidence: str
    op: str | None = None
    exact: frozenset[str] = frozenset()


_AVX512 = frozenset({"avx512f"})

CPU_NEEDS = (
    CPUNeed("W4A16", _AVX512, f"{_AVX2}: no such op", "cpu_gemm_wna16"),
    CPUNeed("W4A16_ASYM", _AVX512, f"{_AVX2}: no such op", "cpu_gemm_wna16"),
    CPUNeed(
        "W8A8",
        frozenset(),
        f"{_AVX2}: run; pairs of products saturate in 16 bits: 256 times 127 * 127 gives 32640",
        exact=frozenset({"avx512_vnni"}),
    ),
    CPUNeed("W8A8_STATIC", _AVX512, f"{_AVX2}: oneDNN's reference kernel, minutes for a page"),
    CPUNeed("FP8_DYNAMIC", frozenset(), f"{_AVX2}: run"),
    CPUNeed("fp8 cache", _AVX512, f"{_AVX2}: refused, needs AVX-512 or AMX"),
)


def cpu_flags() -> frozenset[str]:
    """The features of this CPU by Linux's names; none where it is not Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    told = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(told.partition(":")[2].split())


def refused_on_cpu(scheme: str, flags: frozenset[str], *, emulating: bool = False) -> str | None:
    """Why vLLM does not compute ``scheme`` on a CPU with ``flags``; None if it does.

    ``emulating``: whether someone stands in for operators that its library lacks.
    """
    for row in CAPABILITIES:
        if row.scheme == scheme and "cpu" in row.devices and not row.served:
            return f"{scheme}: {row.kernel}"
    need = next((need for need in CPU_NEEDS if need.scheme == scheme), None)
    if need is None:
        return f"{scheme}: was never tried on a CPU"
    lacking = sorted(need.flags - flags)
    if lacking and not (emulating and need.op):
        return f"{scheme}: needs {', '.join(lacking)}, which this CPU lacks ({need.evidence})"
    return None


def inexact_on_cpu(scheme: str, flags: frozenset[str]) -> str | None:
    """Why vLLM's products of ``scheme`` are not exact on a CPU with ``flags``; None if they are."""
    for need in CPU_NEEDS:
        if need.scheme == scheme and (lacking := sorted(need.exact - flags)):
            return f"{scheme}: not exact without {', '.join(lacking)} ({need.evidence})"
    return None
