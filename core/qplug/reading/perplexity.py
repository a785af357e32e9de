"""Measures the perplexity of a model on a text."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qplug.checkpoint.config_file import CONFIG, read_config
from qplug.checkpoint.locate import find_model
from qplug.errors import QplugError
from qplug.machine.memory import gibibytes, naming_memory
from qplug.machine.session import Session
from qplug.model.foreign import naming_file
from qplug.model.tokenizer import load_tokenizer
from qplug.reading.folder import Folder, open_folder
from qplug.reading.load import load_folder
from qplug.registry.registry import Registry
from qplug.text.windows import first_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens in one forward pass: their float32 logits are as wide as the vocabulary.
_TOKENS = 2048


@dataclass(frozen=True)
class Evaluation:
    """The perplexity of ``model`` on ``windows`` windows of ``seq_len`` tokens of ``dataset``."""

    model: str
    perplexity: float
    dataset: str
    windows: int
    seq_len: int


def evaluate(
    model: str,
    *,
    dataset: str = "demo",
    dataset_options: Mapping[str, Any] | None = None,
    seq_len: int = 512,
    windows: int | None = 64,
    device: str = "auto",
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure the perplexity of ``model`` on the first ``windows`` windows of a text.

    ``windows=None`` takes the whole text. qplug tokenizes the text once, without special tokens,
    and cuts it into windows of ``seq_len`` tokens that do not overlap. The model predicts each
    token of a window but the first, in float32. Codes are dequantized, and activations rounded by
    their scheme. ``watch`` is called with the windows done and all windows after each batch. Raises
    QplugError for mistakes that the user can mend.
    """
    session = Session.alone(device, registry=registry, trust_remote_code=trust_remote_code)
    tokens = evaluation_tokens(
        model,
        session,
        dataset=dataset,
        dataset_options=dataset_options,
        seq_len=seq_len,
        windows=windows,
    )
    folder = open_folder(model, session, or_float=True)
    with naming_memory(lambda: _held(folder, session, seq_len)):
        net = load_folder(folder)
        net.to(session.device)  # type: ignore[arg-type]
        with naming_file(folder.checkpoint.folder / CONFIG, "the model does not run"):
            loss = mean_loss(net, tokens, watch or (lambda *_: None))
    return Evaluation(model, math.exp(loss), dataset, len(tokens), seq_len)


def _held(folder: Folder, session: Session, seq_len: int) -> str:
    """What memory is needed for, and what to change."""
    weights = 4 * sum(math.prod(shape) for shape in folder.view.linears.values())
    return (
        f"{folder.checkpoint.folder} is held whole on {session.device}, {gibibytes(weights)} in "
        f"float32, with the predictions of {max(_TOKENS, seq_len)} tokens; use a shorter --seq-len "
        "or another --device"
    )


def evaluation_tokens(
    model: str,
    session: Session,
    *,
    dataset: str,
    dataset_options: Mapping[str, Any] | None,
    seq_len: int,
    windows: int | None,
) -> Tensor:
    """The tokens that ``evaluate`` reads, int64 ``[windows, seq_len]``.

    Raises QplugError if ``dataset`` or its options are wrong, or if a window is longer than the
    model allows.
    """
    source = session.registry.datasets.make(dataset, dataset_options)
    limit = read_config(find_model(model)).get("max_position_embeddings")
    if isinstance(limit, int) and seq_len > limit:
        raise QplugError(f"--seq-len {seq_len}: the model takes {limit} tokens at most")
    tokenizer = load_tokenizer(model, trust_remote_code=session.trust_remote_code)
    count = sys.maxsize if windows is None else windows
    with (
        session.registry.blaming(source, "text for evaluation"),
        naming_file(Path(model) / "tokenizer.json", "its tokenizer does not work"),
    ):
        return first_windows(source, tokenizer, length=seq_len, count=count, split="evaluation")


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, tokens: Tensor, watch: Callable[[int, int], None]) -> float:
    """The mean cross-entropy in nats over ``tokens: [windows, length]``.

    Windows do not see each other. ``watch`` is called with the windows done and all windows.
    """
    total, count = 0.0, 0
    done = 0
    for batch in tokens.split(max(1, _TOKENS // tokens.shape[1])):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits.float()  # [batch, length, vocab]
        targets = batch[:, 1:].flatten()
        total += cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        count += targets.numel()
        done += len(batch)
        watch(done, len(tokens))
    return total / count
