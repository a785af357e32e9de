"""What the engine tests quantize and serve, taken from the backends' tables of capabilities.

A few combinations that stand for all, or, with QPLUG_ENGINE_TESTS=full, every one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from qplug import PRESETS, Capability, Engine
from qplug.reading.engine_version import choose_version
from qplug.registry.registry import Registry
from qplug_compressed_tensors.engine import CompressedTensorsLoader
from qplug_vllm.cpu import FP8_CACHE, SATURATES, Flaw, refused_on_cpu
from qplug_vllm.cpu import flaws_on_cpu as flaws_of_scheme

EMBEDDING = "model.embed_tokens"
#: What an algorithm is tried with, where one scheme has to do.
FITTING = {"smoothquant": "W8A8", "osplus": "W8A8", "spinquant": "FP8_DYNAMIC"}


@dataclass(frozen=True)
class Case:
    """A folder to be quantized and loaded. ``model``: one of ``engine_models``."""

    scheme: str
    algo: str = "rtn"
    backend: str = "vllm"
    group_size: int | None = None
    kv_cache: str | None = None
    model: str = "demo"
    ignore: tuple[str, ...] = ()
    override: tuple[str, str] | None = None

    def __str__(self) -> str:
        sizes = {None: "", -1: "-channel"}
        size = sizes.get(self.group_size, f"-g{self.group_size}")
        cache = f"-{self.kv_cache}-cache" if self.kv_cache else ""
        part = "-in-part" if self.ignore else ""
        other = "-{}-{}".format(*map(_word, self.override)) if self.override else ""
        return f"{self.model}-{self.algo}-{self.scheme}{size}{cache}{part}{other}-{self.backend}"

    @property
    def rounds_activations(self) -> bool:
        schemes = [self.scheme, *(self.override or ())[1:]]
        rounded = any(PRESETS[scheme].activations is not None for scheme in schemes)
        return rounded or self.kv_cache is not None


def _word(text: str) -> str:
    """The letters and digits of a pattern of module names."""
    return re.sub(r"\W", "", text)


def served_schemes() -> list[tuple[str, str]]:
    """Scheme and backend of every row of every table that an engine serves."""
    found = [
        (row.scheme, backend)
        for backend in Registry.installed(only_shipped=True).exporters
        for row in _table(backend)
        if row.served and row.scheme in PRESETS
    ]
    return list(dict.fromkeys(found))


def engine_of(backend: str) -> Engine | None:
    """The engine of the backend, in the version that is installed, else in the newest."""
    engine = Registry.installed(only_shipped=True).exporters[backend].engine
    return None if engine is None else engine.at(choose_version(engine, backend).version)


def _table(backend: str) -> list[Capability]:
    """What the engine of the backend serves, and what it does not."""
    engine = engine_of(backend)
    return [] if engine is None else engine.capabilities()


def engines_of(case: Case) -> set[str]:
    """The engines, in lower case, that the table of the backend names for the scheme."""
    table = _table(case.backend)
    return {
        row.engine.partition(" ")[0].lower()
        for row in table
        if row.scheme == case.scheme and row.served
    }


def inputs_stay(case: Case, *, on_cpu: bool) -> bool:
    """Whether kernels compute ``case`` with float inputs whatever the scheme says.

    They are those of a CPU, or of an H100.
    """
    device = "cpu" if on_cpu else "sm90"
    table = _table(case.backend)
    return any(
        "inputs stay as they are" in row.kernel
        for row in table
        if row.scheme == case.scheme and device in row.devices
    )


def inputs_are_rounded(case: Case) -> bool:
    """Whether a kernel for it on an H100 rounds inputs that the scheme leaves as they are."""
    return any(
        row.rounds_inputs
        for row in _table(case.backend)
        if row.scheme == case.scheme and "sm90" in row.devices
    )


def every_case() -> list[Case]:
    """Every algorithm with every scheme of every backend; what one refuses is found on trying."""
    algorithms = list(Registry.installed(only_shipped=True).algorithms)
    return [
        Case(scheme, algo, backend, model=model)
        for model in ("demo", "ref-19m")
        for scheme, backend in served_schemes()
        for algo in algorithms
    ] + variants()


def some_cases() -> list[Case]:
    """Every scheme of every backend once, and every algorithm once."""
    schemes = served_schemes()
    algorithms = [
        name for name in Registry.installed(only_shipped=True).algorithms if name != "rtn"
    ]
    return [
        *(Case(scheme, backend=backend) for scheme, backend in schemes),
        *(Case(FITTING.get(name, "W4A16"), name) for name in algorithms),
        *variants(),
        *(larger_cases(("W8A8", "FP8_DYNAMIC")) if "QPLUG_REFERENCE_MODEL" in os.environ else ()),
    ]


def variants() -> list[Case]:
    """What the tables do not tell apart, and models of other kinds."""
    return [
        Case("W4A16", group_size=32),
        Case("W4A16", group_size=-1),
        Case("W8A8", kv_cache="fp8"),
        Case("W8A8", "quarot+gptq"),
        Case("W4A16", model="qwen2"),
        Case("W4A16", group_size=64, model="qwen3-moe"),
        Case("W3A16", "gptq"),
        Case("MXFP8", "awq+gptq"),
        Case("W4A16", model="qwen3-moe", ignore=("*.experts.*",)),
    ]


def larger_cases(schemes: tuple[str, ...]) -> list[Case]:
    """The larger model, with ``schemes`` of each backend that has them."""
    found = [(scheme, backend) for scheme, backend in served_schemes() if scheme in schemes]
    return [
        *(Case(scheme, backend=backend, model="ref-19m") for scheme, backend in found),
        *(Case("W4A16", "awq+gptq", backend, model="ref-19m") for backend in ("vllm", "sglang")),
    ]


def cases_for_gpus() -> list[Case]:
    """What is run on GPUs alone: CPUs lack the kernels, or the time."""
    algorithms = [
        name for name in Registry.installed(only_shipped=True).algorithms if name != "rtn"
    ]
    return [
        *(Case(FITTING.get(name, "W4A16"), name, "sglang") for name in algorithms),
        *(replace(case, backend="sglang") for case in variants() if case.kv_cache is None),
        *(Case("W8A16", group_size=-1, backend=backend) for backend in ("vllm", "sglang")),
        *(Case("FP8_DYNAMIC", model="qwen3-moe", backend=name) for name in ("vllm", "sglang")),
        *(Case(scheme, model="qwen3-moe") for scheme in ("W8A8", "MXFP8", "MXFP4", "MXFP4AFP8")),
        *(Case(f"W{bits}A16", group_size=64, model="qwen3-moe") for bits in (2, 3, 5, 6, 7)),
        *(Case(f"W{bits}A16", group_size=size) for bits in (2, 3) for size in (32, 64, -1)),
        Case("W4A8", group_size=-1),
        *(Case("W4A16", override=("*.down_proj", "W8A16"), backend=b) for b in ("vllm", "sglang")),
        Case("W4A16", override=("*.mlp.*", "W8A8")),
        Case("W4A16", model="qwen2", override=("lm_head", "W8A16")),
        *(
            Case("W4A16", model="qwen2", override=("model.embed_tokens", s))
            for s in ("W8A16", "W4A16")
        ),
        *(Case("FP8", kv_cache=cache) for cache in ("fp8", "fp8_per_head")),
        Case("W4AFP8", backend="sglang", model="qwen3-moe", ignore=("*.self_attn.*",)),
        *(_beside_fp8(scheme) for scheme in ("NVFP4", "NVFP4A16")),
        *_read_by_the_loader("sglang"),
        *larger_cases(("W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_DYNAMIC", "NVFP4")),
    ]


def _beside_fp8(scheme: str) -> Case:
    """A mixed folder of SGLang: ModelOpt's for NVFP4, and for NVFP4A16 in old versions."""
    return Case(scheme, backend="sglang", override=("*.self_attn.*", "FP8"))


def _read_by_the_loader(backend: str) -> list[Case]:
    """What the loader of the installed version reads, and those of older versions do not."""
    engine = engine_of(backend)
    assert isinstance(engine, CompressedTensorsLoader)
    mixed = [Case("W4A16", backend=backend, override=("*.mlp.*", "W8A8"))]
    head = [
        Case("W4A16", model="qwen2", backend=backend, override=("lm_head", scheme))
        for scheme in ("W8A16", "W8A8", "FP8_DYNAMIC")
    ]
    cache = [Case(scheme, backend=backend, kv_cache="fp8") for scheme in ("W8A8", "FP8", "NVFP4")]
    return [
        *(mixed if engine.loader.own_formats else []),
        *(head if engine.loader.heads else []),
        *(cache if engine.loader.caches else []),
    ]


def left_out_on_cpu(case: Case, flags: frozenset[str], *, emulating: bool) -> str | None:
    """Why vLLM does not compute ``case`` on a CPU with ``flags``; None if it does.

    ``emulating``: whether an operator that its library lacks is stood in for.
    """
    if case.model == "qwen3-moe" and not case.ignore:
        return "vLLM 0.32 has no backend for quantized experts on a CPU"
    if case.kv_cache and (reason := refused_on_cpu(FP8_CACHE, flags)):
        return reason
    rotated = {"quarot", "spinquant"} & set(case.algo.split("+"))
    if rotated and SATURATES in flaws_on_cpu(case, flags):
        return f"rotated models lose most where {SATURATES.what}"
    return refused_on_cpu(case.scheme, flags, emulating=emulating)


def flaws_on_cpu(case: Case, flags: frozenset[str]) -> list[Flaw]:
    """What vLLM gets wrong of ``case`` on a CPU with ``flags``."""
    parts = (case.scheme, *((FP8_CACHE,) if case.kv_cache else ()))
    return [flaw for part in parts for flaw in flaws_of_scheme(part, flags)]
