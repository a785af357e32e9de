"""A model is opened by its headers, in a folder or on the Hub, and no weight is read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from published import LLAMA_3_8B

from qplug.errors import QplugError
from qplug.planning.headers import open_headers
from qplug.planning.outline import find_outline


def test_a_folder(tmp_path: Path) -> None:
    folder = LLAMA_3_8B.write(tmp_path / "model")
    outline = find_outline(open_headers(str(folder), ()))
    assert (outline.blocks, outline.parameters) == (32, 8_030_261_248)


def test_a_quantized_model_that_no_reader_reads(tmp_path: Path) -> None:
    folder = LLAMA_3_8B.write(tmp_path / "model")
    config = {**LLAMA_3_8B.config, "quantization_config": {"quant_method": "strange"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QplugError, match="no reader reads its quant_method 'strange'"):
        find_outline(open_headers(str(folder), ()))


# --- the Hub --------------------------------------------------------------------------------------


class NotASafetensorsRepoError(Exception):
    """The error of huggingface_hub for a model without safetensors files."""


@pytest.fixture
def on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Hub that gives config.json, and the headers that the test sets."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B.config))
    tensors = {
        name: SimpleNamespace(dtype="BF16", shape=list(spec.shape))
        for name, spec in LLAMA_3_8B.specs()
    }
    hub = SimpleNamespace(files={"model.safetensors": SimpleNamespace(tensors=tensors)}, error=None)

    def metadata(model: str) -> SimpleNamespace:
        if hub.error is not None:
            raise hub.error
        return SimpleNamespace(files_metadata=hub.files)

    def missing(*_: object, **__: object) -> str:
        raise OSError("not in the cache")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tmp_path / "config.json"))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.snapshot_download", missing)
    return hub


def test_headers_of_the_hub(on_hub: SimpleNamespace) -> None:
    checkpoint = open_headers("meta/llama", ())
    assert find_outline(checkpoint).parameters == 8_030_261_248
    tensor = checkpoint.tensors["model.norm.weight"]
    assert tensor.paths[0].name == "model.safetensors"
    for read in (tensor.read, tensor.chunks):
        with pytest.raises(QplugError, match="only its header was read"):
            read()


def test_what_the_hub_does_not_have(on_hub: SimpleNamespace) -> None:
    on_hub.error = NotASafetensorsRepoError("'meta/llama' is not a safetensors repo")
    with pytest.raises(QplugError, match="from the Hub: it has no weights in safetensors"):
        open_headers("meta/llama", ())
    on_hub.error = ConnectionError("Name or service not known")
    with pytest.raises(QplugError, match="the Hub cannot be reached; check the network; or pass"):
        open_headers("meta/llama", ())
    on_hub.error = None
    on_hub.files["model.safetensors"].tensors["model.norm.weight"].dtype = "F4"
    with pytest.raises(QplugError, match=r"meta/llama: model\.safetensors: dtype F4 is not known"):
        open_headers("meta/llama", ())


class Hub(BaseHTTPRequestHandler):
    """``/OWNER/NAME/resolve/REVISION/FILE`` of the Hub, out of one folder, with ranges of bytes."""

    protocol_version = "HTTP/1.1"
    sent: list[int]

    def __init__(self, folder: Path, sent: list[int], *args: object) -> None:
        self.folder, self.sent = folder, sent
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        file = self.folder / re.sub(r"^.*/resolve/[^/]+/", "", self.path)
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = file.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        start, stop = (int(wanted[1]), min(int(wanted[2]) + 1, size)) if wanted else (0, size)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if with_body:
            with file.open("rb") as stream:
                stream.seek(start)
                self.wfile.write(stream.read(stop - start))
            self.sent.append(stop - start)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[int]]]:
    """The address of a stand-in for the Hub, and the numbers of bytes that it sent."""
    sent: list[int] = []
    handler = partial(Hub, LLAMA_3_8B.write(tmp_path / "model"), sent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", sent
        running.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_plan_downloads_no_weights(tmp_path: Path, server: tuple[str, list[int]]) -> None:
    address, sent = server
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "*",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    words = [sys.executable, "-m", "qplug", "plan", "meta-llama/Meta-Llama-3-8B", "--gpu", "H100"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "8.0 billion weights in 32 blocks" in done.stdout
    assert "qplug quantize meta-llama/Meta-Llama-3-8B --algo" in done.stdout
    assert "--out ./Meta-Llama-3-8B-W4A16" in done.stdout
    assert sum(sent) < 300_000
