"""What reports tell is so: held to the files, to transformers, and to ``qplug.json``."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qplug
from qplug import QplugError
from qplug.calibration.ranges import CLIP_BINS
from qplug.calibration.tokens import calibration_tokens
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.model.view import model_view
from qplug.recipe.recipe import Calibration
from qplug.registry.registry import Registry
from qplug.report.examine import examine
from qplug.report.findings import BINS_PER_OCTAVE, Findings
from qplug.report.layers import merged


@pytest.fixture(scope="module")
def found(rtn: Path, awq: Path) -> dict[str, Findings]:
    registry = Registry.installed()
    return {folder.name: examine(str(folder), registry) for folder in (rtn, awq)}


def told(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "qplug.json").read_text())
    return manifest


def test_sizes(found: dict[str, Findings], rtn: Path, float_model: Path) -> None:
    findings = found["llama-rtn"]
    held = load_file(rtn / "model.safetensors")
    before = load_file(float_model / "model.safetensors")
    packed = [t.nbytes for n, t in held.items() if "_proj." in n]
    weights = sum(t.numel() for n, t in before.items() if "_proj." in n)
    overview = findings.overview
    assert overview.bytes.total == sum(tensor.nbytes for tensor in held.values())
    assert (overview.bytes.quantized, overview.weights) == (sum(packed), weights)
    assert overview.bytes.linears == held["lm_head.weight"].nbytes
    assert overview.parameters == sum(tensor.numel() for tensor in before.values())
    assert overview.bits_per_weight == 8 * sum(packed) / weights
    assert 5.0 < overview.bits_per_weight < 5.3  # four, a float32 scale for 32, and the shapes
    assert findings.float_bytes is not None
    assert findings.float_bytes.total == sum(tensor.nbytes for tensor in before.values())
    assert findings.float_bytes.quantized == 4 * weights


@pytest.mark.parametrize("name", ["llama-rtn", "llama-awq"])
def test_errors_and_ranges_of_weights(
    name: str, found: dict[str, Findings], rtn: Path, awq: Path, float_model: Path
) -> None:
    folder = {"llama-rtn": rtn, "llama-awq": awq}[name]
    after = qplug.load(str(folder), quantize_activations=False).state_dict()
    before = load_file(float_model / "model.safetensors")
    manifest = told(folder)
    assert [layer.name for layer in found[name].layers] == list(manifest["layers"])
    for layer in found[name].layers:
        weight, original = after[f"{layer.name}.weight"], before[f"{layer.name}.weight"]
        spans = [(s.low, s.high) for s in layer.weights if s is not None]
        assert spans == [(w.min().item(), w.max().item()) for w in (original, weight)]
        kept = manifest["layers"][layer.name]
        assert (layer.error, layer.loss) == (kept["error"], kept["loss"])
        assert layer.rewritten == (f"{layer.name}.weight" in manifest["rewritten"])
        if layer.rewritten:
            assert layer.recomputed is None
        else:
            error = ((weight - original).norm() / original.norm()).item()
            assert layer.recomputed == pytest.approx(error, rel=1e-5)
            assert layer.recomputed == pytest.approx(kept["error"], rel=1e-3)
    assert any(layer.rewritten for layer in found[name].layers) == (name == "llama-awq")


def test_places(found: dict[str, Findings]) -> None:
    places = {layer.name: (layer.block, layer.kind) for layer in found["llama-rtn"].layers}
    assert places["model.layers.2.self_attn.o_proj"] == (2, "self_attn.o_proj")
    assert {block for block, _ in places.values()} == {0, 1, 2}
    assert len({kind for _, kind in places.values()}) == 7


def test_scales(found: dict[str, Findings], rtn: Path) -> None:
    findings = found["llama-rtn"]
    held = load_file(rtn / "model.safetensors")
    scales = torch.cat([t.flatten() for n, t in held.items() if n.endswith(".weight_scale")])
    assert sum(findings.scales.values()) == len(scales)
    for place, count in findings.scales.items():
        low, high = (2 ** (edge / BINS_PER_OCTAVE) for edge in (place, place + 1))
        assert count == ((scales >= low) & (scales < high)).sum()
    layer = findings.layers[0]
    own = held[f"{layer.name}.weight_scale"]
    assert layer.scales is not None
    assert (layer.scales.low, layer.scales.high) == (own.min().item(), own.max().item())
    assert layer.scale_count == own.numel()


def test_columns_of_a_wide_histogram() -> None:
    counts = dict.fromkeys(range(-90, 7), 1)
    columns = merged(counts)
    assert sum(columns.values()) == len(counts)
    assert 24 <= len(columns) <= 48


@torch.no_grad()
def test_ranges_of_inputs(found: dict[str, Findings], float_model: Path) -> None:
    """Those before are what the float model computes on the calibration data."""
    model = AutoModelForCausalLM.from_pretrained(float_model, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for layer in found["llama-awq"].layers:
        module = model.get_submodule(layer.name)
        module.register_forward_pre_hook(lambda _, x, name=layer.name: seen.update({name: x[0]}))
    samples = calibration_tokens(
        Calibration(samples=4, seq_len=32),
        str(float_model),
        model_view(open_checkpoint(float_model)),
        Session.alone(),
        seed=0,
    )
    model(samples.tokens)
    changed = False
    for layer in found["llama-awq"].layers:
        assert layer.inputs is not None
        before, after = layer.inputs
        changed |= before != after
        if layer.block == 0:  # later ones are fed by quantized blocks
            x = seen[layer.name].flatten(0, 1)
            typical = x.abs().amax(0).median().item()
            wanted = [x.min().item(), x.max().item(), typical]
            assert before.to_list() == pytest.approx(wanted, rel=1e-3)
    assert changed
    assert all(layer.inputs is None for layer in found["llama-rtn"].layers)


def test_clips(found: dict[str, Findings], float_model: Path, tmp_path: Path) -> None:
    clipped = [layer for layer in found["llama-awq"].layers if layer.clips]
    assert clipped
    for layer in clipped:
        assert len(layer.clips) == len(CLIP_BINS)
        assert sum(layer.clips) == layer.scale_count
    # Where nothing moved scale, the covering scale can be told from the float model.
    fixed = tmp_path / "fixed"
    qplug.quantize(
        str(float_model),
        fixed,
        algo="gptq",
        algorithm_options={"gptq": {"clip": "true"}},
        group_size=32,
        backend="compressed-tensors",
        samples=4,
        seq_len=32,
    )
    layer = next(layer for layer in examine(str(fixed), Registry.installed()).layers if layer.clips)
    weight = load_file(float_model / "model.safetensors")[f"{layer.name}.weight"]
    covering = weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7.5
    scale = load_file(fixed / "model.safetensors")[f"{layer.name}.weight_scale"]
    ratio = scale / covering
    edges = [*CLIP_BINS, torch.inf]
    counts = [int(((ratio >= low) & (ratio < high)).sum()) for low, high in pairwise(edges)]
    assert list(layer.clips) == counts


def test_without_the_float_model(rtn: Path, tmp_path: Path, float_model: Path) -> None:
    alone = Path(shutil.copytree(rtn, tmp_path / "alone"))
    manifest = told(alone)
    manifest["model"] = str(tmp_path / "gone")
    (alone / "qplug.json").write_text(json.dumps(manifest))
    registry = Registry.installed()
    findings = examine(str(alone), registry)
    assert (findings.against, findings.float_bytes) == (None, None)
    assert {layer.weights[0] for layer in findings.layers} == {None}
    assert {layer.recomputed for layer in findings.layers} == {None}
    named = examine(str(alone), registry, against=str(float_model))
    assert named.against == str(float_model)
    assert all(layer.recomputed for layer in named.layers)
    with pytest.raises(QplugError, match="another shape; it is a different model"):
        examine(str(alone), registry, against="qplug:demo")


def test_a_float_model_has_nothing_to_report(float_model: Path) -> None:
    with pytest.raises(QplugError, match="is not quantized; there is nothing to report"):
        examine(str(float_model), Registry.installed())


@pytest.mark.parametrize("backend", ["fake", "hf"])
def test_folders_without_codes(backend: str, float_model: Path, tmp_path: Path) -> None:
    from qplug.report.page import report_page

    qplug.quantize(str(float_model), tmp_path / "out", backend=backend, group_size=32)
    findings = examine(str(tmp_path / "out"), Registry.installed())
    assert len(findings.layers) == (21 if backend == "fake" else 0)
    assert not findings.scales
    assert "The format of this folder stores no scales." in report_page(findings)


def test_a_run_that_goes_on_keeps_the_ranges(float_model: Path, awq: Path, tmp_path: Path) -> None:
    calls: list[Any] = []

    def stop(*step: Any) -> None:
        calls.append(step)
        if len(calls) == 2:
            raise KeyboardInterrupt

    how: dict[str, Any] = {
        "algo": "awq",
        "algorithm_options": {"awq": {"ratios": "4", "clip_steps": "4"}},
        "group_size": 32,
        "backend": "compressed-tensors",
        "samples": 4,
        "seq_len": 32,
    }
    with pytest.raises(KeyboardInterrupt):
        qplug.quantize(str(float_model), tmp_path / "out", watch=stop, **how)
    result = qplug.quantize(str(float_model), tmp_path / "out", **how)
    assert result.resumed
    kept, whole = (told(folder)["layers"] for folder in (tmp_path / "out", awq))
    assert kept == whole
    assert all("inputs" in layer for layer in kept.values())
