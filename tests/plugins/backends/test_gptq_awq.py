"""The gptq and awq exporters, against readers written here from the formats' own descriptions."""

from __future__ import annotations

import re
from dataclasses import replace
from shutil import copytree
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qplug
from qplug import ModelView, QplugError, QuantizedWeight, preset
from qplug.api.groups import dequantize
from qplug.api.limits import Target
from qplug.machine.session import Session
from qplug.numerics.rounding import round_to_nearest
from qplug.reading.folder import open_folder
from qplug.registry.registry import Registry
from qplug_awq_format.exporter import AWQExporter
from qplug_gptq_format.exporter import GPTQExporter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    Quantized = Callable[..., Path]

GPTQ, AWQ = GPTQExporter(Target()), AWQExporter(Target())
CASES = [
    (GPTQ, "W4A16", 32),
    (GPTQ, "W4A16", -1),
    (GPTQ, "W8A16", 64),
    (AWQ, "W4A16_ASYM", 32),
    (AWQ, "W4A16_ASYM", -1),
]
every_case = pytest.mark.parametrize(
    ("exporter", "scheme", "size"), CASES, ids=lambda value: getattr(value, "name", str(value))
)


def made(scheme: str, size: int) -> QuantizedWeight:
    """A weight ``[40, 128]`` with rows on one side of zero and away from it."""
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[1] = weight[1].abs() + 0.01
    weight[2] = -weight[2].abs() - 0.01
    args = preset(scheme).with_group_size(size).weights
    return round_to_nearest(weight, replace(args, scale_dtype="bfloat16"))


def fields(words: Tensor, bits: int) -> Tensor:
    """Each int32 taken apart, low bits first: ``[..., 32 / bits]``, int64."""
    shifts = torch.arange(0, 32, bits)
    return (words.long()[..., None] >> shifts) & (2**bits - 1)


def read_gptq(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """As AutoGPTQ unpacks: ``(q - (z + 1)) * s`` with the row's group of ``g_idx``."""
    rows = fields(tensors["qweight"].T, bits).flatten(1).T  # [in, out]
    zeros = fields(tensors["qzeros"], bits).flatten(1) + 1  # [groups, out]
    groups = tensors["g_idx"].long()
    return ((rows - zeros[groups]) * tensors["scales"].float()[groups]).T


def read_awq(tensors: Mapping[str, Tensor]) -> Tensor:
    """As AutoAWQ unpacks: output ``8 w + order[i]`` is nibble ``i`` of word ``w``."""

    def outputs(words: Tensor) -> Tensor:
        nibbles = fields(words, 4)
        found = torch.empty_like(nibbles)
        found[..., [0, 2, 4, 6, 1, 3, 5, 7]] = nibbles
        return found.flatten(1)

    rows, zeros = outputs(tensors["qweight"]), outputs(tensors["qzeros"])
    times = len(rows) // len(zeros)
    scales = tensors["scales"].float().repeat_interleave(times, 0)
    return ((rows - zeros.repeat_interleave(times, 0)) * scales).T


def read(tensors: Mapping[str, Tensor], scheme: str) -> Tensor:
    if scheme == "W4A16_ASYM":
        return read_awq(tensors)
    return read_gptq(tensors, 4 if scheme == "W4A16" else 8)


@every_case
def test_a_reader_of_the_format_gets_the_weight(
    exporter: GPTQExporter | AWQExporter, scheme: str, size: int
) -> None:
    weight, kind = made(scheme, size), preset(scheme).with_group_size(size)
    packed = exporter.format.pack(weight, kind, "bfloat16")
    assert torch.equal(read(packed, scheme), dequantize(weight))


@every_case
def test_unpack_is_the_inverse_of_pack(
    exporter: GPTQExporter | AWQExporter, scheme: str, size: int
) -> None:
    weight, kind = made(scheme, size), preset(scheme).with_group_size(size)
    packed = exporter.format.pack(weight, kind, "bfloat16")
    layout = exporter.format.layout((40, 128), kind.with_scale_dtype("bfloat16"), "bfloat16")
    assert {n: (str(t.dtype)[6:], tuple(t.shape)) for n, t in packed.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in layout.items()
    }
    assert all(tensor.is_contiguous() for tensor in packed.values())
    back = exporter.format.unpack(packed, kind)
    assert back.args == weight.args
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scale, weight.scale)
    assert (back.zero is None) == (weight.zero is None)
    if back.zero is not None and weight.zero is not None:
        assert torch.equal(back.zero, weight.zero)


def test_zero_points_of_gptq_are_stored_less_one() -> None:
    for scheme, word in (("W4A16", 0x77777777), ("W8A16", 0x7F7F7F7F)):
        packed = GPTQ.format.pack(made(scheme, 32), preset(scheme).with_group_size(32), "bfloat16")
        assert (packed["qzeros"] == word).all()
    assert packed["g_idx"].tolist() == [column // 32 for column in range(128)]


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "scheme"), [("gptq", "W4A16"), ("awq", "W4A16_ASYM")])
def test_folders(quantized: Quantized, backend: str, scheme: str) -> None:
    out = quantized(scheme, backend=backend)
    folder = open_folder(str(out), Session.alone())
    config = folder.checkpoint.config["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == (backend, 4, 128)
    assert len(folder.schemes) == 28
    for name in folder.schemes:
        stored = {
            tensor.removeprefix(f"{name}."): folder.checkpoint.read(tensor)
            for tensor in folder.checkpoint.tensors
            if tensor.startswith(f"{name}.")
        }
        assert torch.equal(read(stored, scheme), folder.dequantized(name))
    assert qplug.verify(str(out)).ok
    # Without the manifest, by the name of the method alone.
    assert Registry.installed().exporters[backend].format.quant_method == backend


def view(blocks: int = 2) -> ModelView:
    parts = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    linears = {f"m.layers.{n}.{part}": (128, 128) for n in range(blocks) for part in parts}
    linears |= {f"m.layers.{n}.moe.gate": (128, 128) for n in range(blocks)}
    names = frozenset(name for name in linears if not name.endswith(".gate"))
    blocks_ = tuple(f"m.layers.{n}" for n in range(blocks))
    return ModelView({}, "bfloat16", linears, names, blocks_, "head")


def test_what_stays_float_is_named_as_engines_match_it() -> None:
    """By the names of merged linears too, and those of no other block."""
    model = view()
    kept = {n: preset("W4A16") for n in sorted(model.quantizable) if "layers.1.mlp" not in n}
    config = GPTQ.format.config(model, kept)
    rules = [rule.removeprefix("-:") for rule in config["dynamic"]]

    def skipped(name: str) -> bool:
        return any(re.match(rule, name) for rule in rules)

    floats = ("mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj", "moe.gate")
    assert all(skipped(f"m.layers.1.{name}") for name in floats)
    assert skipped("m.layers.0.moe.gate")
    for name in ("mlp.gate_up_proj", "attn.qkv_proj", "mlp.gate_proj", "attn.q_proj"):
        assert not skipped(f"m.layers.0.{name}"), name
    assert GPTQ.format.read_schemes(config, model) == kept

    kept = {name: preset("W4A16_ASYM") for name in kept}
    config = AWQ.format.config(model, kept)
    assert "m.layers.1.mlp.gate_up_proj" in config["modules_to_not_convert"]
    assert "head" in config["modules_to_not_convert"]
    assert AWQ.format.read_schemes(config, model) == kept


def test_awq_refuses_names_that_would_take_others_with_them() -> None:
    linears = {f"m.layers.0.mlp.{n}": (128, 128) for n in ("gate", "gate_proj", "up_proj")}
    names = frozenset(name for name in linears if name != "m.layers.0.mlp.gate")
    model = ModelView({}, "bfloat16", linears, names, ("m.layers.0",), None)
    sentence = AWQ.refuses(model, dict.fromkeys(sorted(names), preset("W4A16_ASYM")))
    assert sentence == (
        "m.layers.0.mlp.gate is to stay float, but then engines would load "
        "m.layers.0.mlp.gate_proj as float too"
    )


@pytest.mark.parametrize(
    ("exporter", "schemes", "sentence"),
    [
        (GPTQ, ("W4A16_ASYM",) * 5, "--backend awq stores W4A16_ASYM), not W4A16_ASYM"),
        (GPTQ, ("W8A8",) * 5, "the format stores symmetric integers (W4A16, W8A16; "),
        (GPTQ, ("W4A16",) * 3 + ("W8A16",) * 2, "one scheme in a folder, not W4A16 and W8A16"),
        (GPTQ, ("W4A16",) * 2, "engines fuse m.layers.0.attn.q_proj"),
        (AWQ, ("W4A16",) * 5, "use W4A16_ASYM), not W4A16"),
        (AWQ, ("W4A16_ASYM",) * 2, "engines fuse m.layers.0.attn.q_proj"),
    ],
)
def test_refusals(
    exporter: GPTQExporter | AWQExporter, schemes: tuple[str, ...], sentence: str
) -> None:
    model = view(blocks=1)
    names = [name for name in model.linears if name in model.quantizable]
    pairs = zip(names, schemes, strict=False)
    found = exporter.refuses(model, {name: preset(scheme) for name, scheme in pairs})
    assert found is not None
    assert sentence in found


def test_shapes_outside_the_tiles_are_refused() -> None:
    linears = {"m.layers.0.o_proj": (96, 128)}
    model = ModelView({}, "bfloat16", linears, frozenset(linears), ("m.layers.0",), None)
    for exporter, scheme in ((GPTQ, "W4A16"), (AWQ, "W4A16_ASYM")):
        found = exporter.refuses(model, {"m.layers.0.o_proj": preset(scheme)})
        assert found is not None
        assert "out_features in multiples of 64, not 96" in found


@pytest.mark.parametrize(
    ("exporter", "config"),
    [
        (GPTQ, {"bits": 3, "group_size": 128}),
        (GPTQ, {"bits": 4, "group_size": 128, "desc_act": True}),
        (GPTQ, {"bits": 4, "group_size": 128, "sym": False}),
        (AWQ, {"bits": 4, "group_size": 128, "version": "gemv"}),
        (AWQ, {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": False}),
    ],
)
def test_configs_that_engines_refuse(
    exporter: GPTQExporter | AWQExporter, config: dict[str, Any]
) -> None:
    with pytest.raises(QplugError):
        exporter.format.read_schemes(config, view())


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("backend", "change", "check"),
    [
        ("gptq", lambda t: t.pop(f"{UP}.g_idx"), "missing"),
        ("gptq", lambda t: t[f"{UP}.g_idx"].copy_(t[f"{UP}.g_idx"].flip(0)), "g_idx"),
        ("gptq", lambda t: t[f"{UP}.qzeros"].add_(1), "zero"),
        ("gptq", lambda t: t[f"{UP}.scales"].zero_(), "scale"),
        ("gptq", lambda t: t.update({f"{UP}.weight": torch.ones(1, 1)}), "unexpected"),
        ("awq", lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].float()}), "dtype"),
        ("awq", lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:1].clone()}), "shape"),
        ("awq", lambda t: t[f"{UP}.scales"].neg_(), "scale"),
    ],
)
def test_folders_that_engines_would_not_load(
    quantized: Quantized,
    tmp_path: Path,
    backend: str,
    change: Callable[[dict[str, Tensor]], Any],
    check: str,
) -> None:
    scheme = "W4A16" if backend == "gptq" else "W4A16_ASYM"
    out = copytree(quantized(scheme, backend=backend), tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    folder = open_folder(str(out), Session.alone())
    assert folder.exporter is not None
    found = {
        problem.check for problem in folder.exporter.check_folder(folder.checkpoint, folder.view)
    }
    assert found == {check}
