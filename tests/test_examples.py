"""examples/: the commands of the READMEs, and the scripts against stand-ins for the engines."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from qplug.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).parents[1] / "examples"
ENGINES = {
    "vllm": (
        "class Text:\n    text = 'tail'\n"
        "class Answer:\n    outputs = [Text]\n"
        "class LLM:\n"
        "    def __init__(self, folder, **options):\n        self.folder = folder\n"
        "    def generate(self, texts, sampling, use_tqdm):\n        return [Answer]\n"
        "def SamplingParams(temperature, max_tokens):\n    assert max_tokens == 3\n"
    ),
    "sglang": (
        "class Engine:\n"
        "    def __init__(self, model_path, mem_fraction_static):\n        pass\n"
        "    def generate(self, text, sampling):\n"
        "        assert sampling['max_new_tokens'] == 3\n        return {'text': 'tail'}\n"
        "    def shutdown(self):\n        pass\n"
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_commands_of_the_page_run(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (EXAMPLES / f"serve_with_{engine}/README.md").read_text()
    commands = re.findall(r"^\$ qplug (.*)$", page, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["quantize", "serve", "serve"]
    for command in commands[:2]:  # the third one starts the engine
        result = CliRunner().invoke(main, shlex.split(command))
        assert result.exit_code == 0, f"{command}: {result.output}"
    scripts = set(re.findall(r"^\$ python (\S+)", page, re.MULTILINE))
    assert scripts == {path.name for path in (EXAMPLES / f"serve_with_{engine}").glob("*.py")}


@pytest.mark.parametrize("engine", ENGINES)
def test_offline(engine: str, tmp_path: Path) -> None:
    (tmp_path / f"{engine}.py").write_text(ENGINES[engine])
    script = EXAMPLES / f"serve_with_{engine}/offline.py"
    said = subprocess.run(
        [sys.executable, script, "FOLDER", "head", "--tokens", "3"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert said.stdout == "tail\n"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.answer({"data": [{"id": "small"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked == {"model": "small", "prompt": "head", "max_tokens": 3, "temperature": 0}
        self.answer({"choices": [{"text": "tail"}]})

    def answer(self, body: object) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


@pytest.mark.parametrize("engine", ENGINES)
def test_ask(engine: str, server: str) -> None:
    script = EXAMPLES / f"serve_with_{engine}/ask.py"
    said = subprocess.run(
        [sys.executable, script, "head", "--url", server, "--tokens", "3"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "tail\n"
