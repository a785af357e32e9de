"""``qplug serve`` and ``verify --engine``, with a stand-in for the engine that computes like it."""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from spoilt import forget_checksums

import qplug
from qplug.machine.session import Session
from qplug.reading.engine import check_engine
from qplug.reading.perplexity import evaluation_tokens
from qplug_sglang.engine import SGLang
from qplug_vllm.cpu import cpu_flags
from qplug_vllm.engine import VLLM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from click.testing import Result
    from conftest import Starter

    Cli = Callable[..., Result]

#: A server that answers as engines do. Probabilities are those of the process of the test, which
#: has torch imported.
STAND_IN = """
import argparse, json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Client

words = argparse.ArgumentParser()
for option in ("--model", "--model-path"):
    words.add_argument(option, dest="folder")
words.add_argument("--served-model-name")
words.add_argument("--host")
words.add_argument("--port", type=int)
told, rest = words.parse_known_args()
with open(os.environ["STAND_IN_SAW"], "w") as file:
    json.dump({"arguments": sys.argv[1:], "pid": os.getpid()}, file)
if "--break" in rest:
    sys.exit("ValueError: this engine cannot load it")

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == told.served_model_name and asked["echo"], asked
        with Client(("127.0.0.1", int(os.environ["STAND_IN_ASKS"]))) as reader:
            reader.send((told.folder, asked["prompt"]))
            logprobs = {"token_logprobs": [None, *reader.recv(), -1.0]}
        self.answer({"choices": [{"logprobs": logprobs}]})

    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *words):
        pass


HTTPServer((told.host, told.port), Handler).serve_forever()
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The demo model quantized, once for each choice of options."""
    made: dict[str, Path] = {}

    def quantize(**options: Any) -> Path:
        key = str(sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("served") / "demo-small"
            made[key] = qplug.quantize("qplug:demo", out, **options).out
        return made[key]

    return quantize


@pytest.fixture
def saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """Installs the stand-in as vLLM and SGLang; gives what it was started with."""
    for module in ("vllm/entrypoints/openai/api_server.py", "sglang/launch_server.py"):
        file = tmp_path / "engines" / module
        file.parent.mkdir(parents=True)
        file.write_text(STAND_IN)
    told = tmp_path / "saw.json"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "engines"))
    monkeypatch.setenv("STAND_IN_SAW", str(told))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for engine in ("VLLM", "SGLANG"):
        monkeypatch.delenv(f"QPLUG_{engine}_PYTHON", raising=False)
    return lambda: json.loads(told.read_text())


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Answers the stand-in; what is in this list is added to all log-probabilities."""
    added: list[float] = []
    models: dict[str, Any] = {}

    def logprobs(folder: str, prompt: list[int]) -> list[float]:
        if folder not in models:
            models[folder] = qplug.load(folder, quantize_activations=False)
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            found = models[folder](tokens).logits.log_softmax(-1)[0, :-1]
        told: list[float] = (found.gather(1, tokens[0, 1:, None]).flatten() + sum(added)).tolist()
        return told

    def answer(listener: Listener) -> None:
        while True:
            with listener.accept() as asked:
                question = asked.recv()
                if question is None:
                    return
                asked.send(logprobs(*question))

    with Listener(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("STAND_IN_ASKS", str(listener.address[1]))
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        yield added
        with Client(listener.address) as end:
            end.send(None)
        thread.join()


# --- the options that a folder needs --------------------------------------------------------------


@pytest.mark.parametrize("kind", [VLLM, SGLang], ids=lambda kind: kind.__name__)
def test_float32_is_served_in_bfloat16(kind: type[VLLM | SGLang]) -> None:
    engine = kind()
    assert engine.serve_arguments({"dtype": "float32"}) == ("--dtype", "bfloat16")
    assert engine.serve_arguments({"torch_dtype": "float32"}) == ("--dtype", "bfloat16")
    assert engine.serve_arguments({"dtype": "bfloat16", "quantization_config": {}}) == ()


def test_options_for_caches_and_nvfp4() -> None:
    cache = {"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}
    assert VLLM().serve_arguments(cache) == ("--kv-cache-dtype", "fp8")
    nvfp4 = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    assert SGLang().serve_arguments(nvfp4) == ()  # it finds the kernel itself
    old = SGLang().at("0.5.16")
    assert old.serve_arguments(nvfp4) == ("--fp4-gemm-backend", "marlin")
    assert SGLang().serve_arguments(cache) == ()


def test_the_card_has_the_options(folder: Callable[..., Path]) -> None:
    path = folder(scheme="W8A8", backend="vllm", kv_cache="fp8", samples=2, seq_len=32)
    told = (path / "README.md").read_text()
    assert "serve it with `vllm serve . --kv-cache-dtype fp8`" in told


# --- qplug serve ----------------------------------------------------------------------------------


@pytest.fixture
def this_cpu(
    declare_cpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Declares the features of this CPU; there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return declare_cpu


def test_tests_see_a_declared_cpu(declare_cpu: Callable[..., None]) -> None:
    """A test that passes on one host's CPU passes on any other's."""
    assert cpu_flags() == {"avx2", "avx512f", "avx512_vnni"}
    declare_cpu("avx2")
    assert cpu_flags() == {"avx2"}
    declare_cpu()
    assert cpu_flags() == set()


def test_dry_run(cli: Cli, folder: Callable[..., Path], this_cpu: Callable[..., None]) -> None:
    this_cpu()  # nothing is known of it
    path = folder(scheme="W8A8", backend="vllm", kv_cache="fp8", samples=2, seq_len=32)
    result = cli("serve", path, "--dry-run", "--port", 8123, "--", "--max-model-len", 64)
    assert (result.exit_code, result.stderr) == (0, "")
    command, curl = result.stdout.splitlines()
    assert shlex.split(command)[1:] == [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(path)),
        *("--served-model-name", "demo-small", "--host", "127.0.0.1", "--port", "8123"),
        *("--kv-cache-dtype", "fp8", "--max-model-len", "64"),
    ]
    words = shlex.split(curl.removeprefix("when the server is ready: "))
    assert words[:2] == ["curl", "http://127.0.0.1:8123/v1/completions"]
    assert json.loads(words[-1])["model"] == "demo-small"


def test_what_a_cpu_computes_worse_is_told(
    cli: Cli, folder: Callable[..., Path], this_cpu: Callable[..., None]
) -> None:
    path = folder(scheme="W8A8", backend="vllm", kv_cache="fp8", samples=2, seq_len=32)
    this_cpu("avx2")
    result = cli("serve", path, "--dry-run", "--no-verify")
    assert result.exit_code == 0
    products, cache = result.stderr.splitlines()
    worse = "Warning: on this CPU answers will be worse than on a GPU: "
    assert products.startswith(f"{worse}W8A8: int8 products saturate on this CPU (vLLM 0.32 on ")
    assert cache.startswith(f"{worse}fp8 cache: keys and values are cut to fp8, not rounded (vLLM")
    this_cpu("avx512f", "avx512_vnni")
    assert cli("serve", path, "--dry-run", "--no-verify").stderr == f"{cache}\n"
    assert cli("serve", path, "--dry-run", "--no-verify", "--backend", "sglang").stderr == ""
    assert cli("serve", folder(scheme="W4A16"), "--dry-run", "--backend", "vllm").stderr == ""


def test_a_cpu_that_ignores_the_scales_of_inputs_is_told(
    cli: Cli, folder: Callable[..., Path], this_cpu: Callable[..., None]
) -> None:
    """vLLM's product for AMX has no argument for the scale of static inputs."""
    path = folder(scheme="W8A8_STATIC", backend="vllm", samples=2, seq_len=32)
    this_cpu("avx512f", "avx512_vnni", "amx_tile", "amx_int8")
    warning = cli("serve", path, "--dry-run", "--no-verify").stderr
    assert warning.startswith(
        "Warning: on this CPU answers will differ from the answers on a GPU: W8A8_STATIC: "
        "static inputs are rounded per token"
    )
    this_cpu("avx512f", "avx512_vnni")
    assert cli("serve", path, "--dry-run", "--no-verify").stderr == ""


def test_nothing_is_told_of_a_cpu_beside_a_gpu_or_unknown(
    cli: Cli,
    folder: Callable[..., Path],
    this_cpu: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = folder(scheme="W8A8", backend="vllm", kv_cache="fp8", samples=2, seq_len=32)
    this_cpu()
    assert cli("serve", path, "--dry-run", "--no-verify").stderr == ""
    this_cpu("avx2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli("serve", path, "--dry-run", "--no-verify").stderr == ""


def test_dry_run_for_another_engine(cli: Cli, folder: Callable[..., Path]) -> None:
    path = folder(scheme="W4A16")
    for backend, module in (("vllm", "vllm.entrypoints"), (None, "sglang.launch_server")):
        words = ("--backend", backend) if backend else ()
        assert module in cli("serve", path, "--dry-run", *words).stdout


def test_of_two_engines_an_installed_one_serves(
    cli: Cli, folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the first of the two, which is said."""
    path = folder(scheme="W4A16", backend="vllm+sglang")
    for engine in ("VLLM", "SGLANG"):
        monkeypatch.delenv(f"QPLUG_{engine}_PYTHON", raising=False)
    said = f"{path}: written for vllm+sglang, to be served with"
    python = tmp_path / "python"  # without the packages of the Python that runs this
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$ENGINES" exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)

    def served(*installed: str) -> tuple[str, str]:
        engines = tmp_path / "-".join(["engines", *installed])
        for name in installed:
            (engines / name).mkdir(parents=True)
            (engines / name / "__init__.py").touch()
        monkeypatch.setenv("ENGINES", str(engines))
        found = cli("serve", path, "--dry-run", "--no-verify", "--python", python)
        assert found.exit_code == 0
        return found.stdout.split()[2], found.stderr

    vllm, sglang = "vllm.entrypoints.openai.api_server", "sglang.launch_server"
    other = "; --backend sglang takes another one\n"
    assert served() == (vllm, f"{said} vllm, though no engine of them is installed{other}")
    assert served("vllm", "sglang") == (vllm, f"{said} vllm, which is installed{other}")
    assert served("sglang") == (
        sglang,
        f"{said} sglang, which is installed; --backend vllm takes another one\n",
    )
    named = cli("serve", path, "--dry-run", "--no-verify", "--backend", "sglang")
    assert (named.stdout.split()[2], named.stderr) == (sglang, "")


def test_a_folder_that_is_not_sound_is_not_served(
    cli: Cli, folder: Callable[..., Path], tmp_path: Path, saw: Any
) -> None:
    tensors = load_file(folder(scheme="W4A16") / "model.safetensors")
    for file in folder(scheme="W4A16").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors["model.layers.0.mlp.up_proj.weight_scale"][0].fill_(float("inf"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    forget_checksums(tmp_path)
    result = cli("serve", tmp_path, "--python", sys.executable)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "scale: model.layers.0.mlp.up_proj" in result.stderr
    assert result.stderr.splitlines()[-1].endswith("not served: 1 problems for sglang")
    with pytest.raises(FileNotFoundError):
        saw()


@pytest.mark.parametrize("python", [sys.executable, "/no/such/python"])
def test_an_engine_that_is_not_installed_is_one_line(
    cli: Cli, folder: Callable[..., Path], python: str
) -> None:
    result = cli("serve", folder(scheme="W4A16"), "--backend", "vllm", "--python", python)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: vllm is not installed for {python}: ")


def test_a_backend_that_is_no_engine_is_one_line(cli: Cli, folder: Callable[..., Path]) -> None:
    result = cli("serve", folder(scheme="W4A16", backend="compressed-tensors"))
    assert result.exit_code == 1
    assert "compressed-tensors, which is no engine; name one with --backend" in result.stderr


def test_serve_becomes_the_engine(
    folder: Callable[..., Path], saw: Any, start: Starter, tmp_path: Path
) -> None:
    """It has the process, so that signals reach it."""
    words = ["serve", folder(scheme="W4A16"), "--no-verify", "--", "--tp", "2", "--break"]
    told = {name: os.environ[name] for name in ("PYTHONPATH", "STAND_IN_SAW")}
    started = start(*words, **told)
    ended = started.wait()
    assert ended.codes == [1]
    assert ended.stderr == "ValueError: this engine cannot load it\n"
    assert saw()["arguments"][-3:] == ["--tp", "2", "--break"]
    assert saw()["pid"] == started.ids[0]
    assert ended.stdout.splitlines()[1].startswith(
        "when the server is ready: curl http://127.0.0.1:8000/"
    )


# --- verify --engine ------------------------------------------------------------------------------

FEW: dict[str, Any] = {"windows": 2, "seq_len": 32, "dataset": "text"}


@pytest.fixture
def few(tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and sleeps. " * 20)
    return {**FEW, "dataset_options": {"path": str(text)}}


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_an_engine_that_computes_alike(
    folder: Callable[..., Path], saw: Any, few: dict[str, Any], off: list[float], backend: str
) -> None:
    found = check_engine(str(folder(scheme="W4A16")), backend=backend, **few)
    assert (found.ok, found.tokens, found.engine) == (True, 64, backend)
    assert found.difference < 1e-4
    assert found.perplexity == pytest.approx(found.perplexity_read, rel=1e-4)
    with pytest.raises(ProcessLookupError):
        os.kill(saw()["pid"], 0)  # it is gone


def test_an_engine_may_be_as_far_off_as_rounding_moves_the_reader(
    folder: Callable[..., Path], saw: Any, few: dict[str, Any], off: list[float]
) -> None:
    path = folder(scheme="W8A8_STATIC", backend="vllm", samples=1, seq_len=32)
    first = check_engine(str(path), **few)
    assert (first.ok, first.limit, first.warnings) == (True, 0.1, ())
    off.append(-0.12)  # one scale for all inputs is coarser
    near = check_engine(str(path), **few)
    assert near.ok
    off.append(-near.limit)
    far = check_engine(str(path), **few)
    assert not far.ok
    assert far.limit == near.limit == pytest.approx(1.1 * rounding(path, few))


def rounding(path: Path, few: dict[str, Any]) -> float:
    """How far rounding of inputs moves log-probabilities of what ``check_engine`` reads."""
    tokens = evaluation_tokens(str(path), Session.alone(), **few)

    @torch.inference_mode()
    def logprobs(*, quantize_activations: bool) -> torch.Tensor:
        model = qplug.load(str(path), quantize_activations=quantize_activations)
        found = model(tokens).logits.log_softmax(-1)[:, :-1]
        return found.gather(2, tokens[:, 1:, None])

    one, other = (logprobs(quantize_activations=how) for how in (True, False))
    return (one - other).abs().mean().item()


def test_an_engine_that_computes_something_else(
    cli: Cli,
    folder: Callable[..., Path],
    saw: Any,
    few: dict[str, Any],
    off: list[float],
) -> None:
    off.append(-0.05)
    data = ["--dataset", "text", "--dataset-opt", f"path={few['dataset_options']['path']}"]
    words = ["--windows", 2, "--seq-len", 32, *data, "--engine", "--", "--mem-fraction-static", "1"]
    result = cli("verify", folder(scheme="W4A16"), *words)
    assert result.exit_code == 1
    told = result.stdout.splitlines()[-1]
    assert told.startswith("sglang does not serve alike: on 64 tokens, log-probabilities differ by")
    assert saw()["arguments"][-2:] == ["--mem-fraction-static", "1"]


def test_an_engine_that_is_known_to_compute_worse_here(
    cli: Cli,
    folder: Callable[..., Path],
    saw: Any,
    few: dict[str, Any],
    off: list[float],
    this_cpu: Callable[..., None],
) -> None:
    this_cpu("avx512f", "avx512_vnni")
    path = folder(scheme="W8A8", backend="vllm", kv_cache="fp8", samples=2, seq_len=32)
    data = ["--dataset", "text", "--dataset-opt", f"path={few['dataset_options']['path']}"]
    result = cli("verify", path, "--windows", 2, "--seq-len", 32, *data, "--engine")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("vllm serves alike: on 64 tokens")
    assert "fp8 cache: keys and values are cut to fp8, not rounded" in result.stderr


def test_an_engine_that_ends_while_it_starts_is_one_line(
    folder: Callable[..., Path], saw: Any, few: dict[str, Any]
) -> None:
    with pytest.raises(qplug.QplugError, match="sglang ended while it started: ValueError: this"):
        check_engine(str(folder(scheme="W4A16")), arguments=["--break"], **few)
    with pytest.raises(ProcessLookupError):
        os.kill(saw()["pid"], 0)
