"""Linears that engines merge are one decision, all experts of a layer are one."""

from __future__ import annotations

from qplug.choosing.decisions import decisions
from qplug.registry.registry import Registry

DENSE = [f"model.layers.{n}.self_attn.{local}_proj" for n in range(2) for local in "qkvo"]
MLP = [f"model.layers.0.mlp.{local}_proj" for local in ("gate", "up", "down")]
EXPERTS = [
    f"model.layers.1.mlp.experts.{n}.{local}_proj"
    for n in range(3)
    for local in ("gate", "up", "down")
]


def sets(backend: str) -> list[set[str]]:
    exporter = Registry.installed().exporters.make(backend)
    found = decisions([*DENSE, *MLP, *EXPERTS], exporter)
    assert len({each.name for each in found}) == len(found)
    return [set(each.linears) for each in found]


def test_what_an_engine_merges() -> None:
    for backend in ("vllm", "sglang"):
        assert sets(backend) == [
            {*DENSE[:3]},
            {DENSE[3]},
            {*DENSE[4:7]},
            {DENSE[7]},
            {*MLP[:2]},
            {MLP[2]},
            {*EXPERTS},
        ]


def test_without_an_engine_only_experts_are_together() -> None:
    assert sets("fake") == [*({name} for name in (*DENSE, *MLP)), {*EXPERTS}]
