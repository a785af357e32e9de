"""Write the tables into docs/scale.md: ``python tools/scale_page.py``.

Shapes of models and measured runs are in docs/scale.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qplug.api.algorithm import Effort
from qplug.api.events import Estimate
from qplug.api.scheme import preset
from qplug.machine.memory import gibibytes
from qplug.registry.registry import Registry
from qplug.run.costs import Machine, estimate, portions
from qplug.run.rates import CPU_CORE, H100
from qplug.run.workload import BlockWork, Workload, groups_of, readers

DOCS = Path(__file__).parents[1] / "docs"
PAGE, DATA = DOCS / "scale.md", DOCS / "scale.json"

Shapes = dict[str, tuple[int, int]]
Numbers = Mapping[str, Any]

EFFORTS: Mapping[str, frozenset[Effort]] = {
    "gptq": frozenset({"solves"}),
    "awq": frozenset({"searches", "rounds"}),
    "rtn": frozenset({"rounds"}),
}
_FREE = 0.9 * 79 * 2**30  # of an H100 80 GB, less the reserve
_ON_A_HOST = 8  # GPUs


@cache
def data() -> Mapping[str, Any]:
    """The shapes and the runs."""
    read: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return read


def attention(n: Numbers) -> Shapes:
    """The linears of attention: with heads in groups, or of low rank (MLA)."""
    width, heads = n["hidden_size"], n["num_attention_heads"]
    if "kv_lora_rank" not in n:
        inner, shared = heads * n["head_dim"], n["num_key_value_heads"] * n["head_dim"]
        return {
            "self_attn.q_proj": (inner, width),
            "self_attn.k_proj": (shared, width),
            "self_attn.v_proj": (shared, width),
            "self_attn.o_proj": (width, inner),
        }
    q_rank, rank, nope = n["q_lora_rank"], n["kv_lora_rank"], n["qk_nope_head_dim"]
    rope, value = n["qk_rope_head_dim"], n["v_head_dim"]
    return {
        "self_attn.q_a_proj": (q_rank, width),
        "self_attn.q_b_proj": (heads * (nope + rope), q_rank),
        "self_attn.kv_a_proj_with_mqa": (rank + rope, width),
        "self_attn.kv_b_proj": (heads * (nope + value), rank),
        "self_attn.o_proj": (width, heads * value),
    }


def mlp(path: str, width: int, inner: int) -> Shapes:
    """The linears of an MLP, or of an expert."""
    return {
        f"{path}.gate_proj": (inner, width),
        f"{path}.up_proj": (inner, width),
        f"{path}.down_proj": (width, inner),
    }


def block(n: Numbers, number: int) -> Shapes:
    """The linears of block ``number``."""
    width, experts = n["hidden_size"], n.get("num_experts", 0)
    if not experts or number < n.get("dense_layers", 0):
        return attention(n) | mlp("mlp", width, n["intermediate_size"])
    inner, found = n["moe_intermediate_size"], attention(n)
    if n.get("shared_experts"):
        found |= mlp("mlp.shared_experts", width, inner * n["shared_experts"])
    for expert in range(experts):
        found |= mlp(f"mlp.experts.{expert}", width, inner)
    return found


@cache
def blocks(name: str, layers: int) -> tuple[BlockWork, ...]:
    """The blocks of a model in bfloat16, and in W4A16 as vLLM reads it."""
    n, scheme = data()["models"][name], preset("W4A16")
    layout = Registry.installed().exporters.make("vllm", {}).format.layout
    dense = n.get("dense_layers", 0)
    kinds: dict[bool, BlockWork] = {}
    for number in (0, layers - 1):
        shapes = block(n, number)
        router = 0 if number < dense else n["hidden_size"] * n.get("num_experts", 0)
        written = {
            shape: sum(spec.nbytes for spec in layout(shape, scheme, "bfloat16").values())
            for shape in {*shapes.values()}
        }
        kinds[number < dense] = BlockWork(
            readers(shapes, n.get("num_experts_per_tok", 1)),
            router,
            2 * (sum(map(math.prod, shapes.values())) + router),
            sum(written[shape] for shape in shapes.values()) + 2 * router,
            len(shapes),
            () if any(".experts." in each for each in shapes) else (*groups_of(shapes, shapes),),
        )
    return tuple(kinds[number < dense] for number in range(layers))


def work_of(name: str, layers: int, algo: str, tokens: int) -> Workload:
    """The work of a run of ``algo`` over the model ``name``, with fewer layers than it has."""
    n = data()["models"][name]
    return Workload(
        blocks(name, layers),
        2 * 2 * n["vocab_size"] * n["hidden_size"],
        EFFORTS[algo],
        tokens,
        n["hidden_size"],
        max(math.prod(shape) for shape in block(n, layers - 1).values()),
        by_group=algo == "gptq",
    )


def _result(work: Workload) -> int:
    """The bytes of the result, in which what is outside of the blocks stays as it is."""
    return work.outside + sum(one.written for one in work.blocks)


def of_run(run: Numbers, *, warm: bool = False) -> Estimate:
    """The estimate of a measured run."""
    work = work_of(run["model"], run["layers"], run["algo"], run["samples"] * run["length"])
    on_gpu = run["device"].startswith("H")
    memory = run.get("budget_gib")
    machine = Machine(
        H100 if on_gpu else CPU_CORE,
        on_gpu,
        run.get("processes", 1),
        None if memory is None else memory * 2**30,
    )
    return estimate(work, machine, _result(work), warm=warm)


def measured() -> str:
    """A table of measured runs, with the estimates of both time and memory."""
    lines = [
        "| run | device | version | measured | estimated | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for run in data()["runs"]:
        layers = f"{run['layers']} layer{'s' if run['layers'] > 1 else ''}"
        name = f"{run['model']}, {layers}"
        what = f"{name}, {run['algo']} {run['samples']} x {run['length']}"
        if not run["samples"]:
            what = f"{name}, {run['algo']}"
        count = run.get("processes", 1)
        device = run["device"] if count == 1 else f"{count} x {run['device']}"
        for what_of, was, found, unit in comparisons(run):
            lines.append(
                f"| {what}: {what_of} | {device} | {run['version']} | {was:g} {unit} "
                f"| {found:.3g} {unit} | {found / was:.2f} |"
            )
    return "\n".join(lines)


def comparisons(run: Numbers) -> list[tuple[str, float, float, str]]:
    """What was measured of ``run``: its name, the measured number, the estimated one, the unit."""
    first = of_run(run)
    found = []
    if "seconds" in run:
        time = "time" if first.gpu_memory is not None else "CPU time"
        found.append((time, run["seconds"], first.seconds, "s"))
    if "warm" in run:
        found.append(("time of a second run", run["warm"], of_run(run, warm=True).seconds, "s"))
    if "gpu_gib" in run:
        assert first.gpu_memory is not None
        found.append(("GPU memory", run["gpu_gib"], first.gpu_memory / 2**30, "GiB"))
    if "memory_gib" in run:
        found.append(("memory", run["memory_gib"], first.memory / 2**30, "GiB"))
    return found


def scale() -> str:
    """A table of the large models on 1, 8 and 64 GPUs."""
    lines = [
        "| model | GPUs | gptq 128 x 2048 | of it waiting for the disk | GPU memory "
        "| memory of each host | experts at once | awq 128 x 512 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in data()["pages"]:
        n = data()["models"][name]
        solves, searches = (
            work_of(name, n["layers"], algo, 128 * length)
            for algo, length in (("gptq", 2048), ("awq", 512))
        )
        for processes in (1, 8, 64):
            machine = Machine(H100, processes=processes, memory=_FREE)
            found, other = (estimate(work, machine, _result(work)) for work in (solves, searches))
            waiting = found.stages["reading"] + found.stages["writing"]
            sizes = portions(solves, machine)
            at_once = ", ".join(map(str, sorted(sizes))) if sizes else "all"
            assert found.gpu_memory is not None
            cells = [
                name,
                str(processes),
                _minutes(found.seconds),
                _minutes(waiting),
                gibibytes(found.gpu_memory),
                gibibytes(found.memory * min(processes, _ON_A_HOST)),
                at_once if "num_experts" in n else "",
                _minutes(other.seconds),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def disk() -> str:
    """A table of the bytes of the large models, and of their runs without data."""
    lines = [
        "| model | bfloat16 | W4A16 | rtn, one GPU | GPU memory |",
        "|---|---|---|---|---|",
    ]
    for name in data()["pages"]:
        work = work_of(name, data()["models"][name]["layers"], "rtn", 0)
        found = estimate(work, Machine(H100), _result(work))
        read = sum(one.read for one in work.blocks) + work.outside
        assert found.gpu_memory is not None
        cells = [f"{read / 1e9:,.0f} GB", f"{found.disk / 1e9:,.0f} GB", _minutes(found.seconds)]
        lines.append(f"| {name} | {' | '.join(cells)} | {gibibytes(found.gpu_memory)} |")
    return "\n".join(lines)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def written(page: str) -> str:
    """``page`` with each table between its marks."""
    tables: dict[str, Callable[[], str]] = {"measured": measured, "scale": scale, "disk": disk}
    for name, table in tables.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
