"""The engines that folders are tried in: where their Python is, and how they are run."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from engine_cases import Case, engines_of, left_out_on_cpu

from qplug_vllm.cpu import cpu_flags

if TYPE_CHECKING:
    from collections.abc import Mapping

ENGINE_SECONDS = 7200 if os.environ.get("QPLUG_ENGINE_TESTS") == "full" else 1800


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
        also = {"vllm"} if case.backend == "sglang" else set()
        if self.name not in engines_of(case) | also:
            return f"{case.scheme} of {case.backend}: not for {self.name}"
        return left_out_on_cpu(case, cpu_flags(), emulating=True) if self.on_cpu else None

    def measure(
        self, loads: Mapping[str, Mapping[str, str]], prompts: list[list[int]], base: Path
    ) -> dict[str, Any]:
        """What the program found for each of ``loads``, in one process."""
        job, result, log = base / "job.json", base / "result.json", base / "log.txt"
        told = json.loads(os.environ.get(f"{self.variable}_OPTIONS", "{}"))
        options = {**self.options, **told}
        job.write_text(json.dumps({"prompts": prompts, "loads": loads, "options": options}))
        with log.open("wb") as stream:
            run = subprocess.run(
                [self.python, Path(__file__).with_name(self.program), job, result],
                cwd=base,
                env=self.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=ENGINE_SECONDS,
                check=False,
            )
        tail = log.read_text("utf-8", errors="replace").splitlines()[-40:]
        assert run.returncode == 0, "\n".join(tail)
        found: dict[str, Any] = json.loads(result.read_text("utf-8"))
        return found


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
    settings={"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_DEEP_GEMM": "0"},
    options={"gpu_memory_utilization": 0.3},
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
        "mem_fraction_static": 0.1,
    },
    on_cpu=False,
)
