"""What a CPU must have for vLLM to compute a scheme on it.

vLLM for CPUs loads one library on CPUs with AVX-512 and another, with fewer kernels, on the rest;
``qplug_vllm.capabilities`` tells of the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qplug_vllm.capabilities import VLLM_0_32

#: Where Linux lists the features of this CPU; other systems have no such file.
CPUINFO = Path("/proc/cpuinfo")

_AVX2 = "vLLM 0.32 on an AVX2 CPU, 2026-11-25"
_WITH_AVX512 = "vLLM 0.32 on a CPU with AVX-512, 2026-11-26"


@dataclass(frozen=True)
class Flaw:
    """What vLLM gets wrong, in silence, on CPUs that lack one of ``unless`` (none: on all)."""

    what: str
    evidence: str
    unless: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CPUNeed:
    """The features, by the names in ``/proc/cpuinfo``, that ``scheme`` (or a KV cache) needs.

    ``op``: the operator that vLLM's library lacks without them, though all else is there.
    """

    scheme: str
    flags: frozenset[str]
    evidence: str
    op: str | None = None
    flaw: Flaw | None = None


_AVX512 = frozenset({"avx512f"})
_SATURATES = Flaw(
    "int8 products saturate on this CPU",
    f"{_AVX2}: pairs are summed in 16 bits, 256 times 127 * 127 gives 32640",
    unless=frozenset({"avx512_vnni"}),
)

#: How the cache of keys and values is called here, beside schemes.
FP8_CACHE = "fp8 cache"

CPU_NEEDS = (
    CPUNeed("W4A16", _AVX512, f"{_AVX2}: no such op", "cpu_gemm_wna16"),
    CPUNeed("W4A16_ASYM", _AVX512, f"{_AVX2}: no such op", "cpu_gemm_wna16"),
    CPUNeed("W8A8", frozenset(), f"{_AVX2}: run", flaw=_SATURATES),
    CPUNeed(
        "W8A8_STATIC",
        _AVX512,
        f"{_AVX2}: oneDNN's reference kernel, minutes for a page",
        flaw=_SATURATES,
    ),
    CPUNeed("FP8_DYNAMIC", frozenset(), f"{_AVX2}: run"),
    CPUNeed(
        FP8_CACHE,
        _AVX512,
        f"{_AVX2}: refused, needs AVX-512 or AMX",
        flaw=Flaw(
            "keys and values are cut to fp8, not rounded",
            f"{_WITH_AVX512}: every byte stored is that of the next value towards zero",
        ),
    ),
)


def cpu_flags() -> frozenset[str]:
    """Returns the features that ``CPUINFO`` lists for this CPU; none if there is no such file."""
    lines = CPUINFO.read_text("utf-8").splitlines() if CPUINFO.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def refused_on_cpu(scheme: str, flags: frozenset[str], *, emulating: bool = False) -> str | None:
    """Why vLLM does not compute ``scheme`` on a CPU with ``flags``; None if it does.

    ``emulating``: whether someone stands in for operators that its library lacks.
    """
    for row in VLLM_0_32:
        if row.scheme == scheme and not row.served:
            return f"{scheme}: {row.kernel}"
    need = next((need for need in CPU_NEEDS if need.scheme == scheme), None)
    if need is None:
        return f"{scheme}: was never tried on a CPU"
    lacking = sorted(need.flags - flags)
    if lacking and not (emulating and need.op):
        return f"{scheme}: needs {', '.join(lacking)}, which this CPU lacks ({need.evidence})"
    return None


def flaw_on_cpu(scheme: str, flags: frozenset[str]) -> Flaw | None:
    """What vLLM gets wrong of ``scheme``, or of a KV cache, on a CPU with ``flags``."""
    flaws = [need.flaw for need in CPU_NEEDS if need.scheme == scheme and need.flaw]
    return next((flaw for flaw in flaws if not flaw.unless or flaw.unless - flags), None)
