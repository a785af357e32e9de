"""Names of tensors and modules, taken apart."""

from __future__ import annotations

import pytest

from qplug.checkpoint.names import (
    block_of,
    by_module,
    is_within,
    kind_of,
    local_of,
    module_of,
    natural_order,
    relative_name,
    split_name,
    within,
)

BLOCKS = ("model.layers.1", "model.layers.10")


@pytest.mark.parametrize(
    ("name", "module", "local"),
    [("a.b.weight", "a.b", "weight"), ("a.b", "a", "b"), ("weight", "", "weight")],
)
def test_a_name_is_a_module_and_a_local_name(name: str, module: str, local: str) -> None:
    assert split_name(name) == (module, local) == (module_of(name), local_of(name))


def test_a_block_whose_name_begins_another_has_none_of_its_tensors() -> None:
    name = "model.layers.10.mlp.weight"
    assert [is_within(block, name) for block in BLOCKS] == [False, True]
    assert block_of(name, BLOCKS) == 1
    assert block_of("model.norm.weight", BLOCKS) is None
    assert relative_name(BLOCKS[1], name) == "mlp.weight"
    assert relative_name(BLOCKS[0], name) == name
    assert within(BLOCKS[1], {name: 1, "model.norm.weight": 2}) == {"mlp.weight": 1}


def test_experts_of_a_layer_are_of_one_kind() -> None:
    assert kind_of("mlp.experts.12.up_proj.weight") == "mlp.experts.*.up_proj.weight"
    assert kind_of("mlp.up_proj.weight") == "mlp.up_proj.weight"


def test_names_are_grouped_and_sorted() -> None:
    assert by_module(["a.weight", "b.c.bias", "a.bias"]) == {
        "a": ["weight", "bias"],
        "b.c": ["bias"],
    }
    assert natural_order(["l.10.w", "l.2.w", "l.1.w"]) == ["l.1.w", "l.2.w", "l.10.w"]
