"""The features that a CPU needs for vLLM to compute a scheme.

vLLM has one library for CPUs with AVX-512, and another one with fewer kernels for all other CPUs.
The table in ``qplug_vllm.capabilities`` describes the library for AVX-512.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qplug_vllm.capabilities import VLLM_0_32

#: The file in which Linux lists the features of this CPU; other systems have no such file.
CPUINFO = Path("/proc/cpuinfo")

_AVX2 = "vLLM 0.32 on an AVX2 CPU, 2026-11-25"
_WITH_AVX512 = "vLLM 0.32 on a CPU with AVX-512, 2026-11-26"
_WITH_AMX = "vLLM 0.32 on a CPU with AMX, 2026-11-27"


@dataclass(frozen=True)
class Flaw:
    """A silent fault of vLLM on CPUs with all features ``only_with`` and not all of ``unless``.

    If ``unless`` is empty, no feature avoids the fault. ``what`` names the fault, ``evidence`` the
    release and CPU on which it was seen, and ``effect`` says what the answers on this CPU do.
    """

    what: str
    evidence: str
    unless: frozenset[str] = frozenset()
    only_with: frozenset[str] = frozenset()
    effect: str = "will be worse than on a GPU"

    def occurs(self, flags: frozenset[str]) -> bool:
        """Whether the fault occurs on a CPU with the features ``flags``."""
        avoided = bool(self.unless) and self.unless <= flags
        return self.only_with <= flags and not avoided


@dataclass(frozen=True)
class CPUNeed:
    """The features (``flags``, as named in ``/proc/cpuinfo``) that ``scheme`` or a KV cache needs.

    ``op``: the only operator that vLLM's library lacks on CPUs without these features; None if an
    emulation of one operator would not help. ``flaws``: silent faults with this scheme.
    """

    scheme: str
    flags: frozenset[str]
    evidence: str
    op: str | None = None
    flaws: tuple[Flaw, ...] = ()


_AVX512 = frozenset({"avx512f"})
#: Sums of int8 products overflow without a word.
SATURATES = Flaw(
    "int8 products saturate on this CPU",
    f"{_AVX2}: pairs are summed in 16 bits, 256 times 127 * 127 gives 32640",
    unless=frozenset({"avx512_vnni"}),
)

#: vLLM's kernel for AMX rounds the inputs of every integer product itself, a token at a time.
PER_TOKEN = Flaw(
    "static inputs are rounded per token, and their stored scales are not used",
    f"{_WITH_AMX}: the answers of W8A8_STATIC are those of W8A8",
    only_with=frozenset({"amx_tile", "amx_int8"}),
    effect="will differ from the answers on a GPU",
)

_SLOW_FP8 = Flaw(
    "an fp8 product takes seconds on this CPU",
    f"{_WITH_AMX}: oneDNN's reference kernel, 3 s for [129, 256] x [256, 768]",
    only_with=frozenset({"amx_tile"}),
    effect="will take minutes",
)

#: The name of the KV cache in the table below, which otherwise has names of schemes.
FP8_CACHE = "fp8 cache"

CPU_NEEDS = (
    CPUNeed("W4A16", _AVX512, f"{_AVX2}: no such op", "cpu_gemm_wna16"),
    CPUNeed("W4A16_ASYM", _AVX512, f"{_AVX2}: no such op", "cpu_gemm_wna16"),
    CPUNeed("W4A8", _AVX512, f"{_AVX2}: no such op", "cpu_gemm_wna16"),
    CPUNeed("W8A8", frozenset(), f"{_AVX2}: run", flaws=(SATURATES,)),
    CPUNeed(
        "W8A8_STATIC",
        _AVX512,
        f"{_AVX2}: oneDNN's reference kernel, minutes for a page",
        flaws=(SATURATES, PER_TOKEN),
    ),
    CPUNeed("FP8_DYNAMIC", frozenset(), f"{_AVX2}: run", flaws=(_SLOW_FP8,)),
    CPUNeed(
        FP8_CACHE,
        _AVX512,
        f"{_AVX2}: refused, needs AVX-512 or AMX",
        flaws=(
            Flaw(
                "keys and values are cut to fp8, not rounded",
                f"{_WITH_AVX512}: every byte stored is that of the next value towards zero",
            ),
        ),
    ),
)


def cpu_flags() -> frozenset[str]:
    """The features that ``CPUINFO`` lists for this CPU; empty if there is no such file."""
    lines = CPUINFO.read_text("utf-8").splitlines() if CPUINFO.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def refused_on_cpu(scheme: str, flags: frozenset[str], *, emulating: bool = False) -> str | None:
    """Why vLLM cannot compute ``scheme`` on a CPU with the features ``flags``; None if it can.

    ``emulating``: whether the caller emulates the operators that vLLM's library lacks.
    """
    for row in VLLM_0_32:
        if row.scheme == scheme and not row.served:
            return f"{scheme}: {row.kernel}"
    need = next((need for need in CPU_NEEDS if need.scheme == scheme), None)
    if need is None:
        return f"{scheme}: nobody has run it with vLLM on a CPU"
    lacking = sorted(need.flags - flags)
    if lacking and not (emulating and need.op):
        return f"{scheme}: needs {', '.join(lacking)}, which this CPU lacks ({need.evidence})"
    return None


def flaws_on_cpu(scheme: str, flags: frozenset[str]) -> list[Flaw]:
    """The silent faults of vLLM with ``scheme`` on a CPU with the features ``flags``.

    ``scheme`` may be ``FP8_CACHE``.
    """
    flaws = [flaw for need in CPU_NEEDS if need.scheme == scheme for flaw in need.flaws]
    return [flaw for flaw in flaws if flaw.occurs(flags)]
