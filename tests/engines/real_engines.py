"""The engines that folders are tried in: where their Python is, and how they are run."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from engine_cases import Case, engine_of, engines_of, left_out_on_cpu
from engine_processes import EnginePool, Launch

from qplug.checkpoint.open import read_json
from qplug_vllm.cpu import cpu_flags

if TYPE_CHECKING:
    from collections.abc import Mapping

FULL = os.environ.get("QPLUG_ENGINE_TESTS") == "full"
#: For all loads of an engine, for each of them, and how many processes share them.
SECONDS = float(os.environ.get("QPLUG_ENGINE_SECONDS", "7200" if FULL else "1800"))
SECONDS_EACH = float(os.environ.get("QPLUG_ENGINE_SECONDS_EACH", "600"))
PROCESSES = int(os.environ.get("QPLUG_ENGINE_PROCESSES", "1"))
#: Which of a host's GPUs they are spread over, as CUDA_VISIBLE_DEVICES has them: "0,1".
GPUS = re.findall(r"[^, ]+", os.environ.get("QPLUG_ENGINE_GPUS", ""))


@dataclass(frozen=True)
class RealEngine:
    """An engine in an environment of its own.

    ``variable`` names its Python, ``<variable>PATH`` where that finds packages beside its own.
    ``program`` runs there, ``options`` go to the engine's class (and those in
    ``<variable>_OPTIONS``, as JSON, over them).
    """

    name: str
    variable: str
    program: str
    settings: Mapping[str, str]
    options: Mapping[str, Any]
    on_cpu: bool
    #: What a flag of its command line is called by its class, where not the same.
    flags: Mapping[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        """Its interpreter; fails, and does not skip, if there is none."""
        named = os.environ.get(self.variable)
        default = Path(__file__).parents[2] / f".venv-{self.name}/bin/python"
        python = Path(named or default).absolute()
        if not python.exists():
            pytest.fail(
                f"{python}: is not there. Run these tests with `make test-engines`, or let "
                f"{self.variable} name the python of an environment with {self.name}"
            )
        return python

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that it is started with; the caller's own ones win."""
        ours = ("OMP_NUM_THREADS", "PYTHONPATH")
        inherited = {name: value for name, value in os.environ.items() if name not in ours}
        packages = os.environ.get(f"{self.variable}PATH")
        path = {"PYTHONPATH": packages} if packages else {}
        return {"HF_HUB_OFFLINE": "1", **self.settings, **inherited, **path}

    def left_out(self, case: Case) -> str | None:
        """Why this engine does not compute ``case`` on this machine; None if it does."""
        # What is written for SGLang is compressed-tensors, which vLLM loads too.
        once = case.backend == "sglang" and case.algo == "rtn" and case.model == "demo"
        also = {"vllm"} if once else set()
        if self.name not in engines_of(case) | also:
            return f"{case.scheme} of {case.backend}: not for {self.name}"
        return left_out_on_cpu(case, cpu_flags(), emulating=True) if self.on_cpu else None

    def started(self, prompts: list[list[int]], base: Path) -> EnginePool:
        """Its processes, which read ``prompts`` with what they are given to load."""
        told = json.loads(os.environ.get(f"{self.variable}_OPTIONS", "{}"))
        job = base / "job.json"
        job.write_text(json.dumps({"prompts": prompts, "options": {**self.options, **told}}))
        environments = [dict(self.environment) for _ in range(PROCESSES)]
        for number, environment in enumerate(environments):
            if GPUS:
                environment["CUDA_VISIBLE_DEVICES"] = GPUS[number % len(GPUS)]
        command = (self.python, Path(__file__).with_name(self.program), job)
        return EnginePool(Launch(command, environments, SECONDS_EACH, SECONDS), base)

    def options_for(self, folder: Path) -> dict[str, Any]:
        """What ``qplug serve`` passes for ``folder`` on the command line, for the class."""
        engine = engine_of(self.name)
        assert engine is not None
        arguments = engine.serve_arguments(read_json(folder / "config.json"))
        named = [self.flags.get(word, word.removeprefix("--")) for word in arguments[::2]]
        names = (name.replace("-", "_") for name in named)
        return dict(zip(names, arguments[1::2], strict=True))


VLLM_ON_CPU = RealEngine(
    name="vllm",
    variable="QPLUG_VLLM_PYTHON",
    program="vllm_logprobs.py",
    settings={
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Where a CPU has AMX, W4A16 would be computed as W4A8.
        "VLLM_CPU_INT4_W4A8": "0",
        "VLLM_NO_USAGE_STATS": "1",
    },
    options={},
    on_cpu=True,
)
VLLM_ON_GPU = RealEngine(
    name="vllm",
    variable="QPLUG_VLLM_PYTHON",
    program="vllm_logprobs.py",
    settings={
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_DEEP_GEMM": "0",
        # Counting GPUs must not touch them, so that forks can.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    },
    # With a cache of a stated size it does not measure what others leave of the GPU's memory.
    options={"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**28},
    on_cpu=False,
)
SGLANG_ON_GPU = RealEngine(
    name="sglang",
    variable="QPLUG_SGLANG_PYTHON",
    program="sglang_logprobs.py",
    settings={},
    options={
        "attention_backend": "triton",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "disable_radix_cache": True,
        # Others may take of the GPU's memory while one starts, and it counts that as its own.
        "mem_fraction_static": 0.3,
    },
    on_cpu=False,
    flags={"--fp4-gemm-backend": "fp4_gemm_runner_backend"},
)
