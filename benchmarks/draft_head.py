"""Train a head that drafts tokens (MTP) for a trained Llama, and write both as one model.

    python benchmarks/draft_head.py MODEL TEXT OUT [--layout mimo] [--passes 8] [--threads 1]

MODEL is a folder with a Llama without biases, TEXT a file to learn from. The model is frozen; the
head learns what the model predicts for the token after next. OUT has the names and the config.json
of the layout, so that engines draft with the head:

- ``mimo``: MiMo (``model.mtp_layers.0``). The model becomes a Qwen2 whose biases are 0.
- ``glm4_moe``: GLM-4.5 (``model.layers.N``). The last decoder block and the head become mixtures of
  experts that compute what the dense layers did: each token goes to all experts, with weight 1.

``benchmarks/acceptance.py`` measures how many drafted tokens an engine accepts.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

WINDOW = 256
WINDOWS_A_STEP = 16
RATE = 2e-3
ROUTED = 3  # experts besides the shared one, in the layout glm4_moe

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How engines build a head: what they feed it, and what they call its parts."""

    #: Whether the head gets the model's hidden states after the model's last norm.
    after_norm: bool
    #: Whether the joined input has the embedding of the next token before the hidden state.
    embedding_first: bool
    #: Names of parts, by their names in ``Head``.
    parts: dict[str, str]


LAYOUTS = {
    "mimo": Layout(
        after_norm=False,
        embedding_first=False,
        parts={
            "token_norm": "token_layernorm",
            "hidden_norm": "hidden_layernorm",
            "join": "input_proj",
            "last_norm": "final_layernorm",
        },
    ),
    "glm4_moe": Layout(
        after_norm=True,
        embedding_first=True,
        parts={
            "token_norm": "enorm",
            "hidden_norm": "hnorm",
            "join": "eh_proj",
            "last_norm": "shared_head.norm",
        },
    ),
}


class Head(nn.Module):
    """One decoder block over the model's hidden states and the embeddings of the next tokens.

    It starts as the model's last block, which gets the hidden states alone.
    """

    def __init__(self, model: LlamaForCausalLM, layout: Layout) -> None:
        super().__init__()
        config, width = model.config, model.config.hidden_size
        self.embedding_first = layout.embedding_first
        self.token_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.join = nn.Linear(2 * width, width, bias=False)
        self.block = LlamaDecoderLayer(config, 0)
        self.last_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.rotary = LlamaRotaryEmbedding(config)
        self.block.load_state_dict(model.model.layers[-1].state_dict())
        self.last_norm.load_state_dict(model.model.norm.state_dict())
        with torch.no_grad():
            start = width if layout.embedding_first else 0
            self.join.weight.normal_(0, 0.02)
            self.join.weight[:, start : start + width] += torch.eye(width)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """The states from which the model's head drafts.

        ``hidden``, ``embeddings``: [windows, tokens, width], of tokens t and t + 1. The states,
        [windows, tokens, width], are for tokens t + 2.
        """
        # Engines mask the embedding at position 0 of a sequence.
        embeddings = torch.cat([torch.zeros_like(embeddings[:, :1]), embeddings[:, 1:]], 1)
        pair = [self.hidden_norm(hidden), self.token_norm(embeddings)]
        joined = self.join(torch.cat(pair[::-1] if self.embedding_first else pair, -1))
        positions = torch.arange(joined.shape[1]).unsqueeze(0)
        states = self.block(joined, position_embeddings=self.rotary(joined, positions))
        return self.last_norm(states)


# --- training -------------------------------------------------------------------------------------


def windows_of(folder: Path, text: Path) -> Tensor:
    """Returns the tokens of ``text`` in windows: int64 [windows, WINDOW]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text.read_text("utf-8"), verbose=False)["input_ids"]
    count = len(tokens) // WINDOW
    return torch.tensor(tokens[: count * WINDOW]).view(count, WINDOW)


@torch.no_grad()
def states_of(model: LlamaForCausalLM, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the hidden states before and after the last norm: [windows, WINDOW, width] each."""
    kept: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    parts = windows.split(WINDOWS_A_STEP)
    after = [model.model(part, use_cache=False).last_hidden_state for part in parts]
    hook.remove()
    return torch.cat(kept), torch.cat(after)


def train(
    model: LlamaForCausalLM, windows: Tensor, layout: Layout, passes: int
) -> tuple[Head, float]:
    """Returns a head, and the share of held-back tokens that it drafts as the model predicts."""
    model.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        before, after = states_of(model, windows)
    given = after if layout.after_norm else before
    embed, classify = model.model.embed_tokens, model.lm_head
    head = Head(model, layout)
    held = max(1, len(windows) // 50)
    steps = passes * ((len(windows) - held) // WINDOWS_A_STEP)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)

    def drafted(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the head and of the model for the same tokens: [windows, WINDOW - 1, all]."""
        states = head(given[chosen, :-1], embed(windows[chosen, 1:]))
        return classify(states), classify(after[chosen, 1:])

    began = time.monotonic()
    for step, chosen in enumerate(batches(len(windows) - held, steps)):
        part = step / steps
        rate = RATE * min(1.0, 20 * part) * (0.5 + 0.5 * math.cos(math.pi * part))
        optimizer.param_groups[0]["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            logits, wanted = drafted(chosen)
        loss = functional.kl_div(
            logits.float().log_softmax(-1).flatten(0, 1),
            wanted.float().log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            seconds = time.monotonic() - began
            print(f"step {step} of {steps}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    with torch.no_grad():
        logits, wanted = drafted(torch.arange(len(windows) - held, len(windows)))
    return head, (logits.argmax(-1) == wanted.argmax(-1)).float().mean().item()


def batches(count: int, steps: int) -> Iterator[Tensor]:
    """Yields numbers of windows, ``steps`` times, in a new order for each pass."""
    order = torch.randperm(count)
    for _ in range(steps):
        if len(order) < WINDOWS_A_STEP:
            order = torch.randperm(count)
        yield order[:WINDOWS_A_STEP]
        order = order[WINDOWS_A_STEP:]


# --- writing --------------------------------------------------------------------------------------


def head_tensors(head: Head, layout: Layout, prefix: str) -> Tensors:
    """Returns the tensors of ``head``, named as ``layout`` names them."""
    found = {}
    for name, tensor in head.state_dict().items():
        part, _, rest = name.partition(".")
        named = rest if part == "block" else f"{layout.parts[part]}.{rest}"
        found[f"{prefix}.{named}"] = tensor.bfloat16()
    return found


def as_mimo(model: Tensors, config: dict[str, Any], head: Head) -> tuple[Tensors, dict[str, Any]]:
    """Returns the tensors and the config.json of a MiMo that computes what ``model`` does."""
    tensors = model | head_tensors(head, LAYOUTS["mimo"], "model.mtp_layers.0")
    for name in [*tensors]:
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            bias = name.removesuffix("weight") + "bias"
            tensors[bias] = torch.zeros(len(tensors[name]), dtype=torch.bfloat16)
    named = {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2"}
    return tensors, config | named | {"use_sliding_window": False, "num_nextn_predict_layers": 1}


def as_glm4_moe(
    model: Tensors, config: dict[str, Any], head: Head
) -> tuple[Tensors, dict[str, Any]]:
    """Returns the tensors and the config.json of a GLM-4 MoE that computes what ``model`` does."""
    blocks = config["num_hidden_layers"]
    tensors = model | head_tensors(head, LAYOUTS["glm4_moe"], f"model.layers.{blocks}")
    for layer in (blocks - 1, blocks):
        split_into_experts(tensors, f"model.layers.{layer}.mlp")
    mixture = {
        "first_k_dense_replace": blocks - 1,
        "n_routed_experts": ROUTED,
        "n_shared_experts": 1,
        "num_experts_per_tok": ROUTED,
        "moe_intermediate_size": config["intermediate_size"] // (ROUTED + 1),
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": float(ROUTED),
    }
    named = {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe"}
    rope = {"partial_rotary_factor": 1.0}
    named |= {"use_qk_norm": False, **rope, "num_nextn_predict_layers": 1}
    named["rope_parameters"] = config["rope_parameters"] | rope
    return tensors, config | named | mixture


def split_into_experts(tensors: Tensors, mlp: str) -> None:
    """Replaces the dense layers ``mlp`` by experts, each with a part of the intermediate width.

    All experts get the same router logit, 0, so that each weight is 1 / ROUTED before scaling.
    """
    names = ["shared_experts", *(f"experts.{number}" for number in range(ROUTED))]
    for linear, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        whole = tensors.pop(f"{mlp}.{linear}.weight")
        for name, part in zip(names, whole.chunk(ROUTED + 1, dim), strict=True):
            tensors[f"{mlp}.{name}.{linear}.weight"] = part.contiguous()
    tensors[f"{mlp}.gate.weight"] = torch.zeros(ROUTED, whole.shape[0], dtype=torch.bfloat16)
    tensors[f"{mlp}.gate.e_score_correction_bias"] = torch.zeros(ROUTED)


WRITERS = {"mimo": as_mimo, "glm4_moe": as_glm4_moe}


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("model", type=Path)
    words.add_argument("text", type=Path)
    words.add_argument("out", type=Path)
    words.add_argument("--layout", choices=[*LAYOUTS], default="mimo")
    words.add_argument("--passes", type=int, default=8)
    words.add_argument("--threads", type=int, default=1)
    told = words.parse_args()
    torch.set_num_threads(told.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(told.model, dtype=torch.float32)
    head, share = train(model, windows_of(told.model, told.text), LAYOUTS[told.layout], told.passes)
    print(f"{share:.1%} of the held-back tokens are drafted as the model predicts")
    config = json.loads((told.model / "config.json").read_text("utf-8"))
    stored = load_file(told.model / "model.safetensors")
    stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"].clone())
    tensors, config = WRITERS[told.layout](stored, config | {"tie_word_embeddings": False}, head)
    told.out.mkdir(parents=True)
    save_file(tensors, told.out / "model.safetensors", {"format": "pt"})
    (told.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(told.model / file, told.out / file)


if __name__ == "__main__":
    main()
