"""A stand-in for the Hub on this machine: it takes what ``huggingface_hub`` uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

#: The token that may write.
TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """Keeps repositories in memory: their files by path, and the titles of their commits.

    ``refuses``: the status with which it answers each request that makes a repository.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, str]] = []
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.refuses = 0


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    #: Files that are uploaded as large ones, by the end of their names.
    LARGE: ClassVar[tuple[str, ...]] = (".safetensors", ".json")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self._answer(200, {"files": [self._mode(file) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer(200, {"transfer": "basic", "objects": self._places(json.loads(body))})
        elif "/commit/" in self.path:
            self._commit(self.path.split("/commit/")[0].removeprefix("/api/models/"), body)
        else:
            self._answer(404, {"error": self.path})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def do_GET(self) -> None:
        self._answer(404, {"error": "Repository not found"})

    def _create(self, told: dict[str, Any]) -> None:
        name = f"{told['organization']}/{told['name']}"
        if self.server.refuses:
            self._answer(self.server.refuses, {"error": "You have no rights here, says httpx"})
            return
        status = 409 if name in self.server.files else 200
        self.server.files.setdefault(name, {})
        self.server.private.setdefault(name, told.get("visibility") == "private")
        self._answer(status, {"url": f"{self.server.url}/{name}", "name": name})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(self.LARGE) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _places(self, told: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {**item, "actions": {"upload": {"href": f"{self.server.url}/store/{item['oid']}"}}}
            for item in told["objects"]
        ]

    def _commit(self, repository: str, body: bytes) -> None:
        files = self.server.files[repository]
        for line in body.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "header":
                self.server.commits.append((repository, value["summary"]))
            elif told["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.large[value["oid"]]
        address = f"{self.server.url}/{repository}/commit/{'0' * 40}"
        self._answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": address})

    def _answer(self, status: int, told: dict[str, Any]) -> None:
        content = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub without a repository, which answers until the test ends."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
