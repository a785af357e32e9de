"""What is float in a composite model is float under the names that engines give it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest

from qplug import BuiltFloat, ModelView, Scheme, preset
from qplug_awq_format.format import AWQ
from qplug_compressed_tensors.configuration import write_config
from qplug_compressed_tensors.outside import portable, tower_suffixes, towers
from qplug_gptq_format.format import GPTQ
from qplug_sglang.mixed import NVFP4
from qplug_sglang.modelopt import ModelOpt

#: How engines rename modules of such a model, by beginning of the name: ``hf_to_vllm_mapper``.
RENAMED = {"model.language_model.": "language_model.model.", "model.visual.": "visual."}
#: What engines merge: ``packed_modules_mapping``.
PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
BLOCKS = tuple(f"model.language_model.layers.{number}" for number in range(3))
DENSE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
LOOSE = ("model.per_layer_model_projection", "multi_modal_projector")  # beside the blocks
DRAFT = ("self_attn.q_proj", "mlp.down_proj", *(f"mlp.experts.{n}.up_proj" for n in range(3)))


def model(*, draft: str = "mtp.layers.0") -> ModelView:
    """A text decoder, a vision tower whose linears have other names in engines, a draft layer."""
    names = [f"{block}.{local}" for block in BLOCKS for local in DENSE]
    names += [f"{BLOCKS[1]}.linear_attn.in_proj_{part}" for part in "ab"]
    quantizable = frozenset(names)
    names += [f"model.visual.blocks.{n}.attn.{part}" for n in range(2) for part in ("qkv", "proj")]
    names += [f"{block}.conv.in_proj" for block in BLOCKS]
    names += LOOSE
    names += ["model.visual.layers.2.self_attn.q_proj", "model.visual.merger.linear_fc1", "lm_head"]
    names += [f"{draft}.{local}" for local in DRAFT]
    linears = dict.fromkeys(names, (128, 128))
    why = BuiltFloat("a convolution", renamed=(".conv.", ".short_conv."))
    floats = {f"{block}.conv.in_proj": why for block in BLOCKS}
    floats |= dict.fromkeys(LOOSE, BuiltFloat("it is small"))
    view = ModelView({}, "bfloat16", linears, quantizable, BLOCKS, "lm_head")
    return replace(view, built_float=floats)


def schemes(view: ModelView, scheme: Scheme) -> dict[str, Scheme]:
    """All that is quantizable, but the narrow linears and a linear of the first block."""
    floats = ("in_proj_a", "in_proj_b", "layers.0.mlp.down_proj")
    return {name: scheme for name in view.linears if quantized(view, name, floats)}


def quantized(view: ModelView, name: str, floats: tuple[str, ...]) -> bool:
    return name in view.quantizable and not name.endswith(floats)


#: Modules as an engine names them, and whether they hold codes.
MODULES = {
    "language_model.model.layers.0.self_attn.qkv_proj": True,
    "language_model.model.layers.0.mlp.down_proj": False,
    "language_model.model.layers.1.mlp.down_proj": True,
    "language_model.model.layers.1.linear_attn.in_proj_ba": False,
    "visual.blocks.0.attn.qkv_proj": False,
    "visual.blocks.0.attn.proj": False,
    "visual.blocks.1.mlp.gate_up_proj": False,
    "visual.merger.linear_fc1": False,
    "visual.layers.2.self_attn.qkv_proj": False,
    "language_model.model.layers.2.self_attn.qkv_proj": True,
    "mtp.layers.0.self_attn.qkv_proj": False,
    "mtp.layers.0.mlp.experts.0.up_proj": False,
    "language_model.model.layers.2.short_conv.in_proj": False,
    "language_model.model.layers.0.conv.in_proj": False,
    "language_model.model.self_decoder.per_layer_model_projection": False,
    "model.multi_modal_projector": False,
}


def renamed(name: str) -> str:
    for old, new in RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def ignored(ignore: Iterable[str], module: str) -> bool:
    """vLLM 0.32's ``apply_vllm_mapper``, then ``should_ignore_layer``; SGLang's are alike."""
    entries = [e if e.startswith("re:") or "." not in e else renamed(e) for e in ignore]

    def hit(name: str) -> bool:
        return any(
            re.match(e[3:], name) is not None if e.startswith("re:") else e == name for e in entries
        )

    parent, _, local = module.rpartition(".")
    parts = [hit(f"{parent}.{member}") for member in PACKED.get(local, (local,))]
    assert hit(module) or all(parts) or not any(parts), f"{module}: members differ"
    return hit(module) or all(parts)


@pytest.mark.parametrize("module", list(MODULES))
def test_compressed_tensors(module: str) -> None:
    view = model()
    ignore = write_config(view, schemes(view, preset("W4A16")))["ignore"]
    assert ignored(ignore, module) is not MODULES[module]


@pytest.mark.parametrize("module", list(MODULES))
def test_gptq_whose_expressions_are_not_renamed(module: str) -> None:
    view = model()
    dynamic = GPTQ().config(view, schemes(view, preset("W4A16")))["dynamic"]
    assert any(re.match(entry[2:], module) for entry in dynamic) is not MODULES[module]


@pytest.mark.parametrize("module", list(MODULES))
def test_awq_whose_entries_are_parts_of_names(module: str) -> None:
    view = model()
    entries = AWQ().config(view, schemes(view, preset("W4A16_ASYM")))["modules_to_not_convert"]
    assert any(renamed(entry) in module for entry in entries) is not MODULES[module]


@pytest.mark.parametrize("module", [name for name in MODULES if "language_model" not in name])
def test_modelopt_whose_entries_have_stars(module: str) -> None:
    view = model()
    format_, given = ModelOpt(), schemes(view, NVFP4)
    config = format_.config(view, given)
    assert any(fnmatchcase(module, renamed(entry)) for entry in config["ignore"])
    assert format_.read_schemes(config, view) == given


def test_all_formats_read_their_entries_back() -> None:
    view = model()
    for format_, scheme in ((GPTQ(), preset("W4A16")), (AWQ(), preset("W4A16_ASYM"))):
        given = schemes(view, scheme)
        assert format_.read_schemes(format_.config(view, given), view).keys() == given.keys()


def test_a_draft_layer_after_the_last_block_has_the_names_of_both_engines() -> None:
    view = model(draft="model.language_model.layers.3")
    ignore = write_config(view, schemes(view, preset("W4A16")))["ignore"]
    assert ignored(ignore, "language_model.model.layers.3.mlp.down_proj")
    assert ignored(ignore, "model.decoder.self_attn.qkv_proj")  # SGLang's deepseek_nextn
    assert not ignored(ignore, "language_model.model.layers.2.mlp.down_proj")


@pytest.mark.parametrize("listed", ["mtp_layers", "mtp_block"])
def test_draft_layers_in_a_list_have_numbers_after_the_last_block_too(listed: str) -> None:
    draft = f"model.{listed}.0.mlp.up_proj"
    linears = {f"model.layers.{n}.mlp.up_proj": (8, 8) for n in range(11)} | {draft: (8, 8)}
    blocks = tuple(f"model.layers.{n}" for n in range(11))
    view = ModelView({}, "bfloat16", linears, frozenset(linears), blocks, None)
    view = replace(view, drafts=frozenset({draft}))
    given = dict.fromkeys(linears.keys() - {draft}, preset("W4A16"))
    ignore = write_config(view, given)["ignore"]
    assert ignored(ignore, "model.layers.11.self_attn.qkv_proj")  # vLLM's mimo_mtp, ernie_mtp
    assert not ignored(ignore, "model.layers.1.mlp.gate_up_proj")


def test_no_expression_matches_what_is_quantized() -> None:
    names = ("model.decoder.layers.0.mlp.up_proj", "model.visual.layers.0.mlp.up_proj")
    view = ModelView({}, "bfloat16", dict.fromkeys(names, (8, 8)), frozenset(names), (), None)
    view = replace(view, blocks=("model.decoder.layers.0",))
    assert list(towers(view)) == ["model.visual"]
    assert tower_suffixes(view, [names[1]]) == ["visual"]
    assert tower_suffixes(replace(view, blocks=()), [names[1]]) == []
    both = {**view.linears, "model.decoder.layers.0.visual.up_proj": (8, 8)}
    assert tower_suffixes(replace(view, linears=both), [names[1]]) == []


def test_the_experts_of_a_draft_layer_are_one_entry() -> None:
    linears = {f"model.layers.1.mlp.experts.{n}.up_proj": (8, 8) for n in range(256)}
    linears |= {"model.layers.0.mlp.up_proj": (8, 8)}
    view = ModelView({}, "bfloat16", linears, frozenset(), ("model.layers.0",), None)
    given = {"model.layers.0.mlp.up_proj": preset("W4A16")}
    ignore = write_config(view, given)["ignore"]
    assert ignore == [
        r"re:.*model\.layers\.1\.mlp\.experts\..+",
        r"re:.*layers\.1\..*",
        r"re:.*model\.decoder\..*",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate"),
        ("model.language_model.layers.12.mlp.gate", "layers.12.mlp.gate"),
        ("lm_head", "lm_head"),
        ("model.visual.merger.fc1", "model.visual.merger.fc1"),
    ],
)
def test_names_from_the_list_on(name: str, expected: str) -> None:
    assert portable(name) == expected
