"""The real engines: they load what qplug writes, and read in it what qplug meant.

What is compared is the log-probability of every token of some real text: the engine's, computed
from the folder by its own loader and kernels, and that of qplug's reader in float32. vLLM runs on
a CPU; where that has no AVX-512, vLLM's int4 product is stood in for, and all else is vLLM's.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine_cases import Case, flaws_on_cpu, inputs_are_rounded, inputs_stay
from engine_folders import TOKENS, WINDOWS, Written, read, with_inputs_per_token, write_all
from engine_models import write_models
from real_engines import SGLANG_ON_GPU, VLLM_ON_CPU, VLLM_ON_GPU, RealEngine
from safetensors.torch import load_file, save_file
from torch import Tensor

from qplug import PRESETS, QplugError
from qplug.checkpoint.locate import DEMO
from qplug.machine.session import Session
from qplug.reading.perplexity import evaluation_tokens
from qplug_vllm.cpu import PER_TOKEN, SATURATES, cpu_flags

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: The mean |difference| that is allowed. The float demo in vLLM's bfloat16 is at 0.016.
WEIGHTS_ONLY, WITH_ACTIVATIONS = 0.03, 0.1
#: How far the perplexity of the served model may be from that which ``qplug eval`` gives.
PERPLEXITY = 0.01
#: How much further than the reader's rounding an engine's may move the log-probabilities.
OWN_ROUNDING = 1.1
#: What the results say of a row that failed.
BEYOND = "beyond the limit"

FLOATS = ("demo", "qwen2", "qwen3-moe")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(VLLM_ON_CPU, id="vllm-cpu", marks=pytest.mark.engine),
        pytest.param(VLLM_ON_GPU, id="vllm-gpu", marks=pytest.mark.gpu),
        pytest.param(SGLANG_ON_GPU, id="sglang-gpu", marks=pytest.mark.gpu),
    ],
)
def engine(request: pytest.FixtureRequest) -> RealEngine:
    return request.param


@pytest.fixture(scope="session")
def prompts() -> Tensor:
    """Token ids ``[windows, 128]``: what ``qplug eval --seq-len 128`` reads."""
    return evaluation_tokens(
        DEMO,
        Session.alone(),
        dataset="demo",
        dataset_options=None,
        seq_len=TOKENS,
        windows=WINDOWS,
    )


@dataclass(frozen=True)
class Served:
    """What an engine answered for each folder that it was given.

    ``left_out``: by case, why it was given none.
    """

    models: Mapping[str, Path]
    written: Mapping[Case, Written]
    left_out: Mapping[Case, str]
    answers: Mapping[str, Mapping[str, Any]]

    def expected(self, case: Case) -> Written:
        """What ``case`` was quantized to; skips the test that asks if it could not be."""
        if case in self.left_out:
            pytest.skip(self.left_out[case])
        self.answer(case)  # fails if there was no folder to load
        return self.written[case]

    def folder(self, case: Case) -> Path:
        return self.expected(case).folder

    def answer(self, case: Case | str, dtype: str = "auto") -> Mapping[str, Any]:
        found = self.answers[f"{case} {dtype}"]
        assert "error" not in found, found["error"]
        return found

    def logprobs(self, case: Case | str, dtype: str = "auto") -> Tensor:
        return torch.tensor(self.answer(case, dtype)["logprobs"])


@pytest.fixture(scope="module")
def served(
    engine: RealEngine,
    prompts: Tensor,
    results: Any,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Served:
    """An engine that has loaded all that the selected tests ask for."""
    base = tmp_path_factory.mktemp(engine.name)
    models = write_models(base)
    left_out, wanted, written, broken = {}, [], {}, {}
    for case in selected(request.session, "case", "spoilt"):
        reason = engine.left_out(case)
        if case.model not in models:
            reason = "QPLUG_REFERENCE_MODEL names no model"
        if reason is None:
            wanted.append(case)
        else:
            left_out[case] = reason
    tokens = prompts.tolist()
    with engine.started(tokens, base) as running:
        for name in selected(request.session, "model"):
            running.give(f"{name} auto", load(models[name]))
        for case, made in write_all(wanted, models, tokens, base):
            if isinstance(made, QplugError):
                left_out[case] = f"qplug refuses it: {made}"
                continue
            if isinstance(made, Exception):
                broken[f"{case} auto"] = {"error": f"qplug: {type(made).__name__}: {made}"}
                continue
            written[case] = made
            options = engine.options_for(made.folder)
            running.give(f"{case} auto", load(made.folder, options=options))
            if in_float32(case, engine):
                running.give(f"{case} float32", load(made.folder, "float32", options))
        answers = broken | running.answers()
    results.left_out |= {str(case): reason for case, reason in left_out.items()}
    results.failed |= {name: found["error"] for name, found in answers.items() if "error" in found}
    results.header |= running.told | {"windows": len(tokens)}
    return Served(models, written, left_out, answers)


def load(folder: Path, dtype: str = "auto", options: Mapping[str, Any] | None = None) -> Any:
    return {"folder": str(folder), "dtype": dtype, "options": dict(options or {})}


def selected(session: pytest.Session, *names: str) -> list[Any]:
    """What the tests that are about to run have for the parameters of these ``names``."""
    calls = (getattr(item, "callspec", None) for item in session.items)
    found = [call.params[name] for call in calls if call for name in names if name in call.params]
    return list(dict.fromkeys(found))


def in_float32(case: Case, engine: RealEngine) -> bool:
    """Whether ``case`` is served in float32 too, to see how activations are rounded."""
    plain = case.algo == "rtn" and case.backend == "vllm" and case.model == "demo"
    exact = engine.on_cpu and SATURATES not in flaws_on_cpu(case, cpu_flags())
    rounds = case.rounds_activations and not inputs_stay(case, on_cpu=engine.on_cpu)
    return exact and plain and rounds


def cuts_cache(case: Case, engine: RealEngine) -> bool:
    """Whether keys and values are cut to fp8, not rounded: the reader then does the same."""
    return engine.on_cpu and case.kv_cache is not None


def difference(one: Tensor, other: Tensor) -> float:
    return round((one - other).abs().mean().item(), 4)


def perplexity(logprobs: Tensor) -> float:
    return math.exp(-logprobs.double().mean().item())


@pytest.mark.parametrize("model", FLOATS)
def test_the_float_model(model: str, served: Served, prompts: Tensor, results: Any) -> None:
    """What bfloat16 alone does: the measure that the other differences are to be taken by."""
    found = difference(served.logprobs(model), read(served.models[model], prompts))
    seconds = served.answer(model)["seconds"]
    results.rows.append({"case": f"{model}-float", "difference": found, "seconds": seconds})
    assert found < WEIGHTS_ONLY


def test_what_is_served(
    case: Case,
    engine: RealEngine,
    served: Served,
    prompts: Tensor,
    results: Any,
    tmp_path: Path,
) -> None:
    """Log-probabilities of the reader without rounded activations, perplexity with them.

    A difference in the last bit makes an activation round to the other side now and then, and
    everything after it in the text then differs by as much as rounding does at all. In bfloat16
    that happens from the first token on (the reader in bfloat16 is as far from itself in float32 as
    vLLM is), so there the reader does not round: the engine's errors scatter around what it says.
    """
    expected, answer = served.expected(case), served.answer(case)
    logprobs, plain = torch.tensor(answer["logprobs"]), torch.tensor(expected.logprobs)
    flaws = flaws_on_cpu(case, cpu_flags()) if engine.on_cpu else []
    unrounded = inputs_stay(case, on_cpu=engine.on_cpu)
    evaluated = perplexity(plain) if unrounded else expected.perplexity
    rounding = expected.rounding
    notes = {
        **{flaw.what: True for flaw in flaws},
        "inputs stay as they are, also for the perplexity it is held to": unrounded,
    }
    found = {"difference": difference(logprobs, plain), "perplexity": perplexity(logprobs)}
    rounded_anyway = not engine.on_cpu and inputs_are_rounded(case)
    notes["inputs are rounded, though the scheme rounds none"] = rounded_anyway
    rounds = case.rounds_activations or rounded_anyway
    limit = WITH_ACTIVATIONS if rounds else WEIGHTS_ONLY
    if SATURATES in flaws:
        limit *= 2  # a wrong scale or layout still gives a multiple
    if PER_TOKEN in flaws:
        folder = with_inputs_per_token(expected.folder, tmp_path / "per_token")
        rounded = read(folder, prompts)
        rounding, evaluated = difference(rounded, plain), perplexity(rounded)
    if cuts_cache(case, engine):
        rounding = difference(read(served.folder(case), prompts, cut_cache=True), plain)
    if not unrounded:  # it is no nearer to who does not round than the reader is once it does
        limit = max(limit, OWN_ROUNDING * rounding)
    limits = {"difference": limit, "perplexity": PERPLEXITY * evaluated}
    away = {**found, "perplexity": abs(found["perplexity"] - evaluated)}
    beyond = [name for name, most in limits.items() if away[name] >= most]
    notes[f"{BEYOND}: {' and '.join(beyond)}"] = bool(beyond)
    row = {
        "case": str(case),
        "model": case.model,
        "algorithm": case.algo,
        "scheme": case.scheme,
        "group size": case.group_size or PRESETS[case.scheme].weights.group_size,
        "backend": case.backend,
        "difference": found["difference"],
        "rounding": round(rounding, 4),
        "perplexity": round(found["perplexity"], 4),
        "qplug eval": round(evaluated, 4),
        "emulated": ", ".join(answer["emulated"]),
        "note": ", ".join(note for note, true in notes.items() if true),
        "seconds": answer["seconds"],
    }
    results.rows.append(row)
    results.write()
    assert not beyond, row


def test_activations_in_float32(
    case: Case, engine: RealEngine, served: Served, prompts: Tensor
) -> None:
    """In float32, the engine rounds activations as the reader does."""
    if not in_float32(case, engine):
        pytest.skip("rounds no activations, not exactly on this CPU, or is like another case")
    folder = served.folder(case)
    rounded = read(folder, prompts, cut_cache=cuts_cache(case, engine))
    plain = read(folder, prompts, quantize_activations=False)
    exact = served.logprobs(case, "float32")
    assert difference(exact, rounded) < WITH_ACTIVATIONS
    assert difference(exact, rounded) < difference(exact, plain)
    assert alike_at_first(exact, rounded)


def alike_at_first(one: Tensor, other: Tensor) -> bool:
    """Whether a twentieth of all tokens, those before a value rounds differently, are almost equal.

    A scale that is off by a few percent in one layer changes every token. Seen with an fp8 cache on
    a CPU with AMX: 3e-5, and 2e-3 with such a scale.
    """
    return (one - other).abs().quantile(0.05).item() < 3e-4


def test_enough_was_computed(served: Served) -> None:
    """Whatever this machine lacks: integers and floats, weights alone and inputs too."""
    schemes = {case.scheme for case in served.written}
    assert {"W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC"} <= schemes
    if os.environ.get("QPLUG_ENGINE_TESTS") != "full":
        assert not [why for why in served.left_out.values() if "qplug refuses" in why]


# --- the measure can fail: faults in one projection of one layer are seen -------------------------


def swap_nibbles(tensors: dict[str, Tensor]) -> None:
    codes = tensors["weight_packed"].view(torch.uint8)
    tensors["weight_packed"] = ((codes >> 4) | (codes << 4)).view(torch.int32)


def shift_zero_points(tensors: dict[str, Tensor]) -> None:
    zeros = tensors["weight_zero_point"]
    tensors["weight_zero_point"] = (zeros.view(torch.uint8) + 1).view(torch.int32)


def scales_of_the_row_before(tensors: dict[str, Tensor]) -> None:
    tensors["weight_scale"] = tensors["weight_scale"].roll(1, 0)


def scales_of_the_group_before(tensors: dict[str, Tensor]) -> None:
    tensors["weight_scale"] = tensors["weight_scale"].roll(1, 1)


def scales_too_large(tensors: dict[str, Tensor]) -> None:
    tensors["weight_scale"] = tensors["weight_scale"] * 1.05


FAULTS = [
    (Case("W4A16"), swap_nibbles),
    (Case("W4A16"), scales_of_the_row_before),
    (Case("W4A16"), scales_of_the_group_before),
    (Case("W4A16_ASYM"), shift_zero_points),
    (Case("W8A8"), scales_of_the_row_before),
    (Case("FP8_DYNAMIC"), scales_of_the_row_before),
]


@pytest.mark.parametrize(
    ("spoilt", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_fault_is_seen(
    spoilt: Case,
    fault: Callable[[dict[str, Tensor]], None],
    served: Served,
    prompts: Tensor,
    tmp_path: Path,
) -> None:
    """Reader and engine on two folders that differ: as if one of them read the tensors wrongly."""
    faulty = read(plant(fault, served.folder(spoilt), tmp_path / "faulty"), prompts)
    found = difference(served.logprobs(spoilt), faulty)
    assert found > (WITH_ACTIVATIONS if spoilt.rounds_activations else WEIGHTS_ONLY)


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
def test_a_small_fault_is_seen_in_float32(
    scheme: str, engine: RealEngine, served: Served, prompts: Tensor, tmp_path: Path
) -> None:
    spoilt = Case(scheme)
    if not in_float32(spoilt, engine):
        pytest.skip("this engine does not compute so in float32, or not exactly on this CPU")
    faulty = read(plant(scales_too_large, served.folder(spoilt), tmp_path / "faulty"), prompts)
    assert not alike_at_first(served.logprobs(spoilt, "float32"), faulty)


def test_biases_matter(served: Served, prompts: Tensor, tmp_path: Path) -> None:
    """An engine that left out the biases of q, k and v would be seen."""
    whole = served.folder(Case("W4A16", model="qwen2"))
    without = Path(shutil.copytree(whole, tmp_path / "without"))
    tensors = load_file(whole / "model.safetensors")
    for name in tensors:
        if name.endswith("bias"):
            tensors[name].zero_()
    save_file(tensors, without / "model.safetensors", metadata={"format": "pt"})
    found = difference(served.logprobs(Case("W4A16", model="qwen2")), read(without, prompts))
    assert found > WEIGHTS_ONLY


def plant(fault: Callable[[dict[str, Tensor]], None], folder: Path, copy: Path) -> Path:
    """A copy of ``folder`` with one of its linears spoilt."""
    shutil.copytree(folder, copy)
    prefix = "model.layers.1.mlp.down_proj."
    tensors = load_file(copy / "model.safetensors")
    linear = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    fault(linear)
    tensors.update({prefix + name: tensor.contiguous() for name, tensor in linear.items()})
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
