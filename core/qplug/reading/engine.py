"""Starts the real engine on a folder, and compares its log-probabilities with qplug's reader."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.reading.folder import Folder, open_folder
from qplug.reading.perplexity import evaluation_tokens
from qplug.reading.server import Serving, find_serving
from qplug.reading.streamed import stream_folder
from qplug.registry.registry import Registry

#: The largest mean |difference| of log-probabilities, in nats. Engines compute in bfloat16, which
#: alone causes 0.01 to 0.02; rounded activations may be rounded up here and down there.
WEIGHTS_ONLY, WITH_ACTIVATIONS = 0.03, 0.1
#: How much more an engine's rounding of activations may change the result than the reader's does.
OWN_ROUNDING = 1.1

#: Seconds until a started server must answer, and until a terminated server must have ended.
_READY, _GRACE = 900, 20


@dataclass(frozen=True)
class EngineCheck:
    """The comparison of an engine with qplug's reader on the same folder and tokens.

    ``difference``: the mean of ``|log p - log q|`` over all tokens, in nats, where ``p`` is the
    engine's probability and ``q`` the reader's. The reader rounds no activations, because small
    differences decide at random in which direction the engine rounds them. ``limit``: the bound for
    ``difference``, from the constants of this module. If rounding the activations changes the
    reader's own result by more than ``WITH_ACTIVATIONS``, the bound is ``OWN_ROUNDING`` times that
    change. ``perplexity`` is the engine's, ``perplexity_read`` the reader's. ``warnings``: known
    faults of the engine on this machine.
    """

    folder: str
    engine: str
    tokens: int
    difference: float
    limit: float
    perplexity: float
    perplexity_read: float
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether ``difference`` is below ``limit``."""
        return self.difference < self.limit  # False for NaN


def check_engine(
    folder: str,
    *,
    backend: str | None = None,
    python: str | None = None,
    arguments: Sequence[str] = (),
    dataset: str = "demo",
    dataset_options: Mapping[str, Any] | None = None,
    windows: int = 8,
    seq_len: int = 128,
    device: str = "auto",
    trust_remote_code: bool = False,
    registry: Registry | None = None,
) -> EngineCheck:
    """Serve ``folder`` on a free port of this machine, and compare the engine with qplug's reader.

    ``backend``, ``python`` and ``arguments`` mean the same as in ``qplug serve``. Both compute the
    log-probabilities of ``windows`` windows of ``seq_len`` tokens of ``dataset``. Raises QplugError
    if the engine is not installed, or if it ends or does not answer; the message then quotes the
    engine's log.
    """
    session = Session.alone(device, registry=registry, trust_remote_code=trust_remote_code)
    serving = find_serving(folder, session, backend=backend, python=python, port=free_port())
    serving.require_engine()
    opened = open_folder(folder, session, backend=serving.rules)
    tokens = evaluation_tokens(
        folder,
        session,
        dataset=dataset,
        dataset_options=dataset_options,
        seq_len=seq_len,
        windows=windows,
    )
    brief = (*serving.arguments, *serving.server.brief, *arguments)
    with serve(replace(serving, arguments=brief)) as url:
        served = torch.tensor(
            [prompt_logprobs(url, serving.name, window) for window in tokens.tolist()]
        )

    @torch.inference_mode()
    def logprobs(*, rounding: bool) -> Tensor:
        model = stream_folder(opened, session.device, quantize_activations=rounding)
        inputs = tokens.to(session.device)
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits.float().cpu()
        return logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)

    read = logprobs(rounding=False)
    difference = _distance(served, read)
    inputs = any(scheme.activations for scheme in opened.schemes.values())
    inputs = inputs or _kernel_rounds_inputs(opened)
    limit = WITH_ACTIVATIONS if inputs or opened.kv_cache else WEIGHTS_ONLY
    if limit == WITH_ACTIVATIONS and difference >= limit:
        limit = max(limit, OWN_ROUNDING * _distance(logprobs(rounding=True), read))
    return EngineCheck(
        folder=folder,
        engine=serving.backend,
        tokens=tokens.numel(),
        difference=difference,
        limit=limit,
        perplexity=_perplexity(served),
        perplexity_read=_perplexity(read),
        warnings=serving.warnings,
    )


def _kernel_rounds_inputs(opened: Folder) -> bool:
    """Whether a kernel of the newest version rounds inputs of a scheme that rounds none."""
    engine = opened.exporter.engine if opened.exporter else None
    names = {scheme.name for scheme in opened.schemes.values()}
    rows = engine.capabilities() if engine else []
    return any(row.rounds_inputs and row.scheme in names for row in rows)


def _distance(logprobs: Tensor, read: Tensor) -> float:
    """The mean ``|logprobs - read|`` in nats; both are ``[windows, seq_len - 1]``."""
    return (logprobs - read).abs().mean().item()


def _perplexity(logprobs: Tensor) -> float:
    return math.exp(-logprobs.double().mean().item())


def free_port() -> int:
    """A port of 127.0.0.1 that no server listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- a server, for a while ------------------------------------------------------------------------


@contextmanager
def serve(serving: Serving) -> Iterator[str]:
    """Start the server of ``serving``; within the context it answers at the URL that is yielded.

    The server is stopped at the end, also after an error. Raises QplugError if the server ends or
    does not answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="qplug-") as scratch:
        log = Path(scratch) / "log.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(  # noqa: S603
                serving.command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, for its workers too
            )
        try:
            url = f"http://{serving.host}:{serving.port}"
            _wait(process, f"{url}/health", log, serving.backend)
            yield url
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, engine: str) -> None:
    deadline = time.monotonic() + _READY
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise QplugError(f"{engine} ended while it started: {_last_words(log)}")
        with suppress(OSError), urlopen(url, timeout=5):  # noqa: S310 - the URL is ours
            return
        time.sleep(0.5)
    raise QplugError(f"{engine} does not answer after {_READY} s: {_last_words(log)}")


def _last_words(log: Path) -> str:
    """The last line of ``log`` that contains "Error", else its last line."""
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["its log is empty"])[-1].strip()[-400:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate the server, kill it after a grace period, and kill the rest of its group."""
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):  # the group has already ended
        os.killpg(process.pid, signal.SIGKILL)


def prompt_logprobs(url: str, model: str, tokens: Sequence[int]) -> list[float]:
    """The log-probability in nats of each of ``tokens`` but the first.

    ``url`` is the address of a server with OpenAI's API. Raises QplugError if the server refuses
    or does not answer.
    """
    body = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    answer = post_json(f"{url}/v1/completions", {"model": model, **body})
    logprobs: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(tokens)]
    return logprobs


def post_json(url: str, body: dict[str, Any]) -> Any:
    """Post ``body`` to an engine and return its JSON answer. Raises QplugError if it refuses."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urlopen(request, timeout=600) as response:  # noqa: S310 - the URL is ours
            return json.load(response)
    except HTTPError as error:
        raise QplugError(f"the engine refuses {url}: {error.read().decode()[:300]}") from error
    except URLError as error:
        raise QplugError(f"the engine does not answer at {url}: {error.reason}") from error
