"""Does a quantized folder still compute what the float model does? Blocks, and predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from qplug.calibration.tokens import calibration_tokens
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.hooks import hooked
from qplug.model.kv_cache import RoundedCache
from qplug.model.parameters import first_tensor
from qplug.reading.folder import Folder, open_folder
from qplug.reading.streamed import stream_folder
from qplug.recipe.recipe import Calibration
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Past these a folder is taken to be broken. The demo model rounded to int4 is at 0.12 and 0.81.
MAX_KL, MIN_TOP1 = 0.3, 0.7

#: Tokens whose probabilities are compared at a time: they are as wide as the vocabulary.
_CHUNK = 256
#: How well one embedding must be a linear image of the other: that in bfloat16 is off by 0.002.
_SAME_STREAM = 0.02


@dataclass(frozen=True)
class BlockDifference:
    """``alone``: what the block makes of the float model's input, in relation to what that adds.

    ``total``: the hidden states behind it, with all that comes before, in relation to the float
    ones. Both are ``||x' - x|| / ||x||``.
    """

    alone: float
    total: float


@dataclass(frozen=True)
class Comparison:
    """How far a folder is from its float model on some tokens.

    ``kl``: the mean divergence of its next-token probabilities from the float ones, in nats;
    ``top1``: how often both find the same token likeliest. ``blocks`` is empty where the hidden
    states of the two cannot be compared; ``note`` says why.
    """

    folder: str
    against: str
    tokens: int
    kl: float
    top1: float
    blocks: Mapping[str, BlockDifference]
    note: str | None
    max_kl: float
    min_top1: float

    @property
    def ok(self) -> bool:
        """Whether both measures are within their bounds."""
        return self.kl <= self.max_kl and self.top1 >= self.min_top1  # not where either is NaN

    def worst(self, count: int = 3) -> list[str]:
        """The blocks that alone are furthest off."""
        return sorted(self.blocks, key=lambda name: -self.blocks[name].alone)[:count]


def compare(
    folder: str,
    against: str,
    *,
    backend: str | None = None,
    dataset: str = "demo",
    dataset_options: Mapping[str, Any] | None = None,
    windows: int = 4,
    seq_len: int = 256,
    seed: int = 0,
    max_kl: float = MAX_KL,
    min_top1: float = MIN_TOP1,
    device: str = "auto",
    trust_remote_code: bool = False,
    registry: Registry | None = None,
) -> Comparison:
    """Run ``folder`` and the float model ``against`` on calibration windows, in float32.

    In memory are one block, embedding and head, the hidden states behind every block, and the
    logits of both. Raises QplugError for what the user can mend.
    """
    session = Session.alone(device, registry=registry, trust_remote_code=trust_remote_code)
    opened = open_folder(folder, session, backend=backend)
    source = open_folder(against, session)
    if source.view.blocks != opened.view.blocks:
        raise QplugError(f"{against}: has other blocks than {folder}; it is another model")
    tokens = calibration_tokens(
        Calibration(dataset, dataset_options or {}, windows, seq_len),
        against,
        source.view,
        session,
        seed=seed,
    )
    real = tokens >= 0  # a sample that is shorter is filled up behind its end
    stream = _Stream(source, opened)
    with torch.inference_mode():
        model = stream_folder(source, session.device)
        with stream.recording(model):
            wanted = _logits(model, tokens, real)
        embedding = _embedding(model)
        del model
        model = stream_folder(opened, session.device)
        note = stream.align(embedding, _embedding(model))
        with stream.comparing(model, real):
            found = _logits(model, tokens, real)
    kl, top1 = _divergence(wanted, found)
    return Comparison(
        folder, against, int(real.sum()), kl, top1, stream.blocks, note, max_kl, min_top1
    )


def _embedding(model: PreTrainedModel) -> Tensor:
    """``[vocabulary, width]``."""
    module = model.get_input_embeddings()
    assert isinstance(module, nn.Embedding)
    return module.weight.cpu()


def _logits(model: PreTrainedModel, tokens: Tensor, real: Tensor) -> Tensor:
    """Those of all ``real`` tokens, ``[tokens, vocabulary]``."""
    logits: Tensor = model(input_ids=tokens.clamp(min=0).to(model.device), use_cache=False).logits
    return logits.float().cpu()[real]


def _divergence(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean KL divergence of ``found`` from ``wanted``, and how often the likeliest is the same."""
    total = 0.0
    for one, other in zip(wanted.split(_CHUNK), found.split(_CHUNK), strict=True):
        p, q = one.log_softmax(-1), other.log_softmax(-1)
        total += kl_div(q, p, reduction="sum", log_target=True).item()
    agreed = (wanted.argmax(-1) == found.argmax(-1)).double().mean().item()
    return total / len(wanted), agreed


class _Stream:
    """The hidden states of a float model, and how far those of a quantized one are from them."""

    def __init__(self, source: Folder, opened: Folder) -> None:
        self._names, self._opened = source.view.blocks, opened
        self._entering: dict[str, Tensor] = {}
        self._leaving: dict[str, Tensor] = {}
        self._turn: Tensor | None = None
        self._comparable = True
        self.blocks: dict[str, BlockDifference] = {}

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Within it, what enters and leaves each block of the float ``model`` is kept."""

        def keep(name: str, module: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
            self._entering[name], self._leaving[name] = inputs[0].cpu(), first_tensor(output).cpu()

        with _hooked(model, {name: partial(keep, name) for name in self._names}):
            yield

    def align(self, embedding: Tensor, other: Tensor) -> str | None:
        """Find what turns the float stream into the other; a sentence if nothing does.

        Algorithms that rotate the residual stream multiply embeddings, ``[vocabulary, width]``, by
        the same matrix as all that is added to it.
        """
        if torch.equal(embedding, other):
            return None
        self._comparable = False
        if embedding.shape != other.shape or len(embedding) < embedding.shape[1]:
            return "blocks are not compared: the embedding is another one"
        one, two = embedding.double(), other.double()
        turn = torch.linalg.lstsq(one.mT @ one, one.mT @ two).solution
        if not (one @ turn - two).norm() <= _SAME_STREAM * two.norm():
            return "blocks are not compared: the embedding is another one"
        self._turn, self._comparable = turn.float(), True
        return "blocks are compared after the rotation that turns one embedding into the other"

    @contextmanager
    def comparing(self, model: nn.Module, real: Tensor) -> Iterator[None]:
        """Within it, each block of the quantized ``model`` is held against the float one."""
        if not self._comparable:
            yield
            return
        scales = self._opened.cache_scales() if self._opened.kv_cache else {}

        def hold(
            number: int,
            name: str,
            module: nn.Module,
            inputs: tuple[Tensor],
            call: dict[str, Any],
            output: Any,
        ) -> None:
            before, after = (
                self._turned(kept.pop(name), inputs[0]) for kept in (self._entering, self._leaving)
            )
            if self._opened.kv_cache is not None:  # that of the run has this block's keys already
                cache = RoundedCache(self._opened.kv_cache, scales[number])
                call = {key: cache if _is_cache(value) else value for key, value in call.items()}
            alone = first_tensor(module.forward(before, **call))
            self.blocks[name] = BlockDifference(
                alone=_ratio(alone - after, after - before, real),
                total=_ratio(first_tensor(output) - after, after, real),
            )

        hooks = {name: partial(hold, number, name) for number, name in enumerate(self._names)}
        with _hooked(model, hooks, with_kwargs=True):
            yield

    def _turned(self, hidden: Tensor, like: Tensor) -> Tensor:
        hidden = hidden.to(like.device)
        return hidden if self._turn is None else hidden @ self._turn.to(like.device)


@contextmanager
def _hooked(
    model: nn.Module, hooks: Mapping[str, Any], *, with_kwargs: bool = False
) -> Iterator[None]:
    """Within it, blocks call their hook before they lose their weights."""
    handles = [
        model.get_submodule(name).register_forward_hook(hook, prepend=True, with_kwargs=with_kwargs)
        for name, hook in hooks.items()
    ]
    with hooked(handles):
        yield


def _is_cache(value: object) -> bool:
    from transformers import Cache

    return isinstance(value, Cache)


def _ratio(off: Tensor, of: Tensor, real: Tensor) -> float:
    one, other = (part[real.to(part.device)].double().norm().item() for part in (off, of))
    return float(one / max(other, torch.finfo().tiny))
