"""What engines merge when they load: names on disk, and the names that engines look up."""

from __future__ import annotations

import pytest

from qplug_compressed_tensors.fusing import merged_matrices, with_merged_names, with_partners


@pytest.mark.parametrize(
    ("parent", "members", "merged"),
    [
        ("self_attn", ("q_proj", "k_proj", "v_proj"), {"qkv_proj"}),
        ("mlp", ("gate_proj", "up_proj"), {"gate_up_proj"}),
        ("feed_forward", ("w1", "w3"), {"gate_up_proj", "w13"}),
        (
            "self_attn",
            ("q_a_proj", "kv_a_proj_with_mqa"),
            {"fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"},
        ),
        ("linear_attn", ("in_proj_qkv", "in_proj_z"), {"in_proj_qkvz"}),
        ("linear_attn", ("in_proj_b", "in_proj_a"), {"in_proj_ba"}),
        ("linear_attn", ("q_proj", "k_proj", "v_proj", "g_proj"), {"in_proj_qkvg"}),
        ("encoder_attn", ("k_proj", "v_proj"), {"kv_proj"}),
    ],
)
def test_members_are_one_group_with_the_names_of_the_matrix(
    parent: str, members: tuple[str, ...], merged: set[str]
) -> None:
    names = [f"model.layers.0.{parent}.{member}" for member in members]
    others = [f"model.layers.0.{parent}.o_proj", "model.layers.0.mlp.down_proj", "lm_head"]
    assert merged_matrices([*names, *others]) == [names]
    added = with_merged_names([*names, *others])[len(names) + len(others) :]
    assert {name.rpartition(".")[2] for name in added} == merged


def test_a_gate_beside_queries_is_a_matrix_of_its_own() -> None:
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvg"]  # Step-3.5
    assert merged_matrices(names) == [names[:3]]


def test_a_linear_is_in_one_group() -> None:
    names = [f"a.self_attn.{n}_proj" for n in ("q", "k", "v", "g", "b", "f_a", "o")]  # Kimi-K3
    assert merged_matrices(names) == [names[:6]]


def test_partners_have_a_reason() -> None:
    names = ["a.linear_attn.in_proj_b", "a.linear_attn.in_proj_a", "a.linear_attn.out_proj"]
    found = with_partners({names[1]: "narrow"}, names)
    assert found == {
        names[1]: "narrow",
        names[0]: "engines merge it with a.linear_attn.in_proj_a, which stays float",
    }
    experts = [f"a.mlp.experts.{n}.up_proj" for n in range(2)]
    assert set(with_partners({experts[1]: "narrow"}, experts)) == {*experts}
