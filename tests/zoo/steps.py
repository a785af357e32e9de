"""What qplug is asked to do with each tiny model, and how it ended."""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

import qplug
from qplug import QplugError
from qplug.checkpoint.names import kind_of

#: A search in few steps: whether a model is taken does not depend on how fine it is.
_COARSE_AWQ = {"awq": {"ratios": 3, "clip_steps": 2, "clip_in_search": 1}}
_COARSE_GPTQ = {"gptq": {"clip_steps": 2}}
#: The runs, by name: the words of each recipe. Each folder that a run writes is verified.
RUNS: dict[str, dict[str, Any]] = {
    "rtn W4A16 vllm": {"algo": "rtn", "scheme": "W4A16", "backend": "vllm"},
    "rtn W4A16 sglang": {"algo": "rtn", "scheme": "W4A16", "backend": "sglang"},
    "awq W4A16 vllm": {
        "algo": "awq",
        "scheme": "W4A16",
        "backend": "vllm",
        "algorithm_options": _COARSE_AWQ,
    },
    "gptq W4A16 vllm": {
        "algo": "gptq",
        "scheme": "W4A16",
        "backend": "vllm",
        "algorithm_options": _COARSE_GPTQ,
    },
    "quarot+rtn W8A8 vllm": {"algo": "quarot+rtn", "scheme": "W8A8", "backend": "vllm"},
    "rtn FP8_DYNAMIC sglang": {"algo": "rtn", "scheme": "FP8_DYNAMIC", "backend": "sglang"},
}
#: Runs of models that engines load in a layout of their own.
OWN_RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "gpt_oss": {
        "rtn MXFP4A16 gpt-oss": {"algo": "rtn", "scheme": "MXFP4A16", "backend": "gpt-oss"},
    },
}
#: Calibration is on so many windows of so many tokens.
SAMPLES, TOKENS = 2, 32


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    ``outcome``: ``ok``, ``refused`` (a sentence for the user), ``unsound`` (``verify`` found
    problems), ``crash`` (any other exception), or ``timeout``. ``says``: the sentence, the first
    problem, or the last line of the traceback and its place.
    """

    outcome: str
    says: str = ""
    seconds: float = 0.0
    float_share: float = 0.0


def tried(model: Path, runs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yields what became of each of ``runs`` of ``model``, and what ``inspect`` says, by name."""
    yield "inspect", inspected(model)
    for name, words in runs.items():
        with tempfile.TemporaryDirectory(dir=model.parent) as base:
            began = time.monotonic()
            ended, quantized = quantized_folder(model, Path(base) / "out", words)
            seconds = round(time.monotonic() - began, 1)
        if quantized:
            yield "quantized", quantized
        yield name, asdict(ended) | {"seconds": seconds}


def inspected(model: Path) -> dict[str, Any]:
    """Returns what ``qplug inspect`` says of ``model``: the linears, and what stays float."""
    from qplug.cli.main import main

    found = CliRunner().invoke(main, ["inspect", str(model), "--json"], prog_name="qplug")
    if found.exit_code:
        return {"error": _nameless(found.output.strip() or repr(found.exception), model)}
    plain = json.loads(found.stdout)
    return {"stays float": plain["stays float"]}


def quantized_folder(model: Path, out: Path, words: Mapping[str, Any]) -> tuple[Ended, list[str]]:
    """Quantizes ``model`` into ``out`` and verifies it: how that ended, and kinds of linears."""
    try:
        result = qplug.quantize(str(model), out, samples=SAMPLES, seq_len=TOKENS, **words)
        verified = qplug.verify(str(out))
    except QplugError as error:
        return Ended("refused", _nameless(str(error), model)), []
    except Exception as error:
        return Ended("crash", _nameless(_last_words(error), model)), []
    share = round(result.float_share, 3)
    kinds = sorted({kind_of(f"{name}.").removesuffix(".") for name in result.errors})
    if not verified.ok:
        first = verified.problems[0]
        says = f"{len(verified.problems)} problems: {first.check}: {first.where}: {first.message}"
        return Ended("unsound", _nameless(says, model), float_share=share), kinds
    return Ended("ok", float_share=share), kinds


def _last_words(error: BaseException) -> str:
    """Returns the exception in one line, with the last place in qplug, and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "qplug" in frame.filename]
    places = dict.fromkeys(
        f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*ours[-1:], *frames[-1:]]
    )
    return f"{type(error).__name__}: {str(error)[:300]} (at {', '.join(places)})"


def _nameless(text: str, model: Path) -> str:
    """Returns ``text`` in one line without the names of temporary folders."""
    return " ".join(text.replace(str(model), "MODEL").replace(str(model.parent), "").split())
