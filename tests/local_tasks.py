"""Tasks of lm-eval as files, and a stand-in for an engine's server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import yaml

_MODULES = ("json", "os", "sys", "re", "math", "random", "time", "shutil")

_KINDS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": " a",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path, *, long: bool = False) -> dict[str, Path]:
    """Writes a task of each kind of request and their items; ``long`` texts exceed the window."""
    choices = [" a module", " banana the", " used to provide"]
    items = [
        {
            "question": f"The {name} module of Python is" * (150 if long and not number else 1),
            "choices": choices,
            "answer": number % 3,
            "text": f"import {name}\n\nThe {name} module has functions." * (90 if long else 1),
        }
        for number, name in enumerate(_MODULES)
    ]
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    files = {}
    for name, kind in _KINDS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(
            yaml.safe_dump({"task": name, "test_split": "test", **source, **kind})
        )
    group = {
        "group": "local_group",
        "task": ["local_choice", "local_answer"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    files["local_group"] = folder / "local_group.yaml"
    files["local_group"].write_text(yaml.safe_dump(group))
    return files


@contextmanager
def serving(net: Any, tokenizer: Any, name: str = "small") -> Iterator[str]:
    """The address of a server that answers as engines do: /v1/models and /v1/completions."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"data": [{"id": name}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["model"] == name
            with lock:
                choices = [
                    {"index": number, **_choice(net, tokenizer, prompt, asked)}
                    for number, prompt in enumerate(asked["prompt"])
                ]
            self._answer({"choices": choices})

        def _answer(self, body: object) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *words: object) -> None:
            pass

    lock = threading.Lock()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@torch.inference_mode()
def _choice(net: Any, tokenizer: Any, prompt: list[int], asked: dict[str, Any]) -> dict[str, Any]:
    tokens = torch.tensor([prompt])
    if not asked.get("echo"):
        new = net.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=asked["max_tokens"],
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        for stop in filter(None, asked["stop"]):
            text = text.split(stop)[0]
        return {"text": text}
    logprobs = net(tokens).logits[0].float().log_softmax(-1)
    best = logprobs.max(-1).values.tolist()
    said = logprobs[:-1].gather(1, tokens[0, 1:, None]).squeeze(1).tolist()
    return {
        "text": "",
        "logprobs": {
            "token_logprobs": [None, *said, best[-1]],  # and the token that is generated
            "top_logprobs": [None, *({"t": value} for value in best)],
        },
    }
