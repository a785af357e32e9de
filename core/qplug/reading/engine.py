"""Start the real engine on a folder, and ask it how likely it finds the tokens of some text."""

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
from qplug.reading.folder import open_folder
from qplug.reading.perplexity import evaluation_tokens
from qplug.reading.server import Serving, find_serving
from qplug.reading.streamed import stream_folder
from qplug.registry.registry import Registry

#: The mean |difference| of log-probabilities that is allowed. Engines compute in bfloat16, which
#: alone makes 0.01 to 0.02; where activations are rounded, each may fall to the other side.
WEIGHTS_ONLY, WITH_ACTIVATIONS = 0.03, 0.1
#: How much further than the reader's rounding of activations an engine's may move them.
OWN_ROUNDING = 1.1

#: Seconds until a server that was started must answer, and until one that was asked has ended.
_READY, _GRACE = 900, 20


@dataclass(frozen=True)
class EngineCheck:
    """What an engine made of a folder.

    ``difference``: the mean of ``|log p - log q|`` over all tokens, ``p`` being the engine's
    probability and ``q`` that of qplug's reader, which rounds no activations: where the engine's
    fall to is chance. ``limit`` is what it must be below: where rounding moves the reader itself
    further than ``WITH_ACTIVATIONS``, ``OWN_ROUNDING`` times that, for the engine does round. The
    perplexities are of the same tokens. ``warnings``: what the engine is known to compute worse on
    this machine.
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
        return self.difference < self.limit  # not where it is NaN


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
    """Serve ``folder`` on a free port of this machine, and compare with qplug's reader.

    ``backend``, ``python`` and ``arguments`` are those of ``qplug serve``. Raises QplugError if the
    engine is not installed, or does not get ready; then with the end of what it said.
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


def _distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().mean().item()


def _perplexity(logprobs: Tensor) -> float:
    return math.exp(-logprobs.double().mean().item())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- a server, for a while ------------------------------------------------------------------------


@contextmanager
def serve(serving: Serving) -> Iterator[str]:
    """Within it, the server of ``serving`` answers at the address that is given.

    It is stopped by its own process id, whatever happens. Raises QplugError if it ends too soon.
    """
    with tempfile.TemporaryDirectory(prefix="qplug-") as scratch:
        log = Path(scratch) / "log.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(  # noqa: S603
                serving.command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its workers are of its group, and of no other
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
        with suppress(OSError), urlopen(url, timeout=5):  # noqa: S310 - it is ours
            return
        time.sleep(0.5)
    raise QplugError(f"{engine} does not answer after {_READY} s: {_last_words(log)}")


def _last_words(log: Path) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it said nothing"])[-1].strip()[-400:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then make it; its engine may run in other processes of its group."""
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):  # as it should be: nothing is left of the group
        os.killpg(process.pid, signal.SIGKILL)


def prompt_logprobs(url: str, model: str, tokens: Sequence[int]) -> list[float]:
    """The log-probability of each of ``tokens`` but the first, as a server of OpenAI's API has it.

    Raises QplugError if it refuses.
    """
    asked = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    answer = post_json(f"{url}/v1/completions", {"model": model, **asked})
    found: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(tokens)]
    return found


def post_json(url: str, body: dict[str, Any]) -> Any:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urlopen(request, timeout=600) as response:  # noqa: S310 - it is ours
            return json.load(response)
    except HTTPError as error:
        raise QplugError(f"the engine refuses: {error.read().decode()[:300]}") from error
    except URLError as error:
        raise QplugError(f"the engine does not answer: {error.reason}") from error
