"""Compares a quantized folder with its float model: outputs of blocks, and predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qplug.calibration.tokens import calibration_tokens
from qplug.checkpoint.config_file import CONFIG
from qplug.errors import QplugError
from qplug.machine.memory import naming_memory
from qplug.machine.session import Session
from qplug.model.block_call import BlockCall, hidden_states
from qplug.model.foreign import naming_file
from qplug.model.hooks import hooked
from qplug.model.kv_cache import RoundedCache
from qplug.reading.folder import Folder, open_folder
from qplug.reading.predictions import divergence, logits_of
from qplug.reading.streamed import stream_folder
from qplug.recipe.recipe import Calibration
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: A folder outside these bounds counts as broken. The demo model in int4 has 0.12 and 0.81.
MAX_KL, MIN_TOP1 = 0.3, 0.7

#: Largest relative error of the rotation between two embeddings; bfloat16 causes 0.002.
_SAME_STREAM = 0.02


@dataclass(frozen=True)
class BlockDifference:
    """The errors of a quantized block, ``||x' - x|| / ||x||`` over all tokens.

    ``alone``: both blocks read the float model's hidden states; ``x`` is what the float block adds
    to them. ``total``: the quantized block reads the hidden states of the quantized model, which
    contain the errors of the blocks before it; ``x`` is the hidden states after the float block.
    """

    alone: float
    total: float


@dataclass(frozen=True)
class Comparison:
    """The difference between ``folder`` and its float model ``against`` on ``tokens`` tokens.

    ``kl``: the mean KL divergence of the folder's next-token probabilities from the float model's,
    in nats. ``top1``: the share of tokens, 0 to 1, for which both models predict the same token.
    ``blocks``: the errors of each block by name; empty if the hidden states of the two models
    cannot be compared, and then ``note`` says why.
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
        return self.kl <= self.max_kl and self.top1 >= self.min_top1  # False for NaN

    def worst(self, count: int = 3) -> list[str]:
        """The names of the ``count`` blocks with the largest ``alone`` error, largest first."""
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
    """Run ``folder`` and the float model ``against`` on calibration windows, and compare them.

    Both compute in float32 on ``windows`` windows of ``seq_len`` tokens of ``dataset``. Memory
    contains one block, the embedding, the head, the hidden states after every block, and the logits
    of both models. Raises QplugError for mistakes that the user can mend.
    """
    session = Session.alone(device, registry=registry, trust_remote_code=trust_remote_code)
    opened = open_folder(folder, session, backend=backend)
    source = open_folder(against, session, or_float=True)
    if source.view.blocks != opened.view.blocks:
        raise QplugError(f"{against}: has other blocks than {folder}; it is a different model")
    samples = calibration_tokens(
        Calibration(dataset, dataset_options or {}, windows, seq_len),
        against,
        source.view,
        session,
        seed=seed,
    )
    if samples.extra:
        raise QplugError(f"dataset {dataset}: has pictures, but models are compared on text alone")
    tokens = samples.tokens
    real = tokens >= 0  # shorter samples are padded on the right with -1
    stream = _Stream(source, opened)
    with (
        torch.inference_mode(),
        naming_memory(
            lambda: (
                f"{len(tokens)} windows of {tokens.shape[1]} tokens on {session.device}, with the "
                "hidden states after every block; use fewer --windows, a shorter --seq-len, or "
                "another --device"
            )
        ),
        naming_file(opened.checkpoint.folder / CONFIG, "the model does not run"),
    ):
        model = stream_folder(source, session.device)
        with stream.recording(model):
            float_logits = logits_of(model, tokens, real)
        embedding = _embedding(model)
        del model
        model = stream_folder(opened, session.device)
        note = stream.align(embedding, _embedding(model))
        with stream.comparing(model, real):
            logits = logits_of(model, tokens, real)
    kl, top1 = divergence(float_logits, logits)
    return Comparison(
        folder, against, int(real.sum()), kl, top1, stream.blocks, note, max_kl, min_top1
    )


def _embedding(model: PreTrainedModel) -> Tensor:
    """The embedding of ``model``, ``[vocabulary, width]``, on the CPU."""
    module = model.get_input_embeddings()
    assert isinstance(module, nn.Embedding)
    return module.weight.cpu()


class _Stream:
    """Records the hidden states of a float model, and compares a quantized model's with them."""

    def __init__(self, source: Folder, opened: Folder) -> None:
        self._names, self._opened = source.view.blocks, opened
        self._entering: dict[str, Tensor] = {}
        self._leaving: dict[str, Tensor] = {}
        self._turn: Tensor | None = None
        self._comparable = True
        self.blocks: dict[str, BlockDifference] = {}

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Within the context, record what enters and leaves each block of the float ``model``."""

        def keep(
            name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            self._entering[name] = BlockCall.of(args, kwargs).hidden.cpu()
            self._leaving[name] = hidden_states(output).cpu()

        hooks = {name: partial(keep, name) for name in self._names}
        with _hooked(model, hooks):
            yield

    def align(self, embedding: Tensor, quantized: Tensor) -> str | None:
        """Find the rotation from the float residual stream to the quantized model's.

        Arguments: the float model's and the quantized model's embedding, ``[vocabulary, width]``.
        Algorithms that rotate the residual stream multiply the embedding by the rotation, so least
        squares finds it. Returns a note for the user, None if the embeddings are equal.
        """
        if torch.equal(embedding, quantized):
            return None
        self._comparable = False
        if embedding.shape != quantized.shape or len(embedding) < embedding.shape[1]:
            return "blocks are not compared: the embeddings differ by more than a rotation"
        source, target = embedding.double(), quantized.double()
        turn = torch.linalg.lstsq(source.mT @ source, source.mT @ target).solution
        if not (source @ turn - target).norm() <= _SAME_STREAM * target.norm():
            return "blocks are not compared: the embeddings differ by more than a rotation"
        self._turn, self._comparable = turn.float(), True
        return "blocks are compared after the rotation between the two embeddings"

    @contextmanager
    def comparing(self, model: nn.Module, real: Tensor) -> Iterator[None]:
        """Within the context, compare each block of the quantized ``model`` with the float."""
        if not self._comparable:
            yield
            return
        scales = self._opened.cache_scales() if self._opened.kv_cache else {}

        def measure(
            number: int,
            name: str,
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,
        ) -> None:
            call = BlockCall.of(args, kwargs)
            before, after = (
                self._turned(states.pop(name), call.hidden)
                for states in (self._entering, self._leaving)
            )
            # The run's own cache already contains this block's keys: use a fresh cache.
            if self._opened.kv_cache is not None:
                cache = RoundedCache(self._opened.kv_cache, scales[number])
                for key in [key for key, value in kwargs.items() if _is_cache(value)]:
                    call = call.with_argument(key, cache)
            call = call.apart().with_hidden(before)
            alone = hidden_states(module.forward(*call.args, **call.kwargs))
            self.blocks[name] = BlockDifference(
                alone=_ratio(alone - after, after - before, real),
                total=_ratio(hidden_states(output) - after, after, real),
            )

        hooks = {name: partial(measure, number, name) for number, name in enumerate(self._names)}
        with _hooked(model, hooks):
            yield

    def _turned(self, hidden: Tensor, like: Tensor) -> Tensor:
        hidden = hidden.to(like.device)
        return hidden if self._turn is None else hidden @ self._turn.to(like.device)


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    """Within the context, blocks call their hook before the streaming hooks drop their weights."""
    handles = [
        model.get_submodule(name).register_forward_hook(hook, prepend=True, with_kwargs=True)
        for name, hook in hooks.items()
    ]
    with hooked(handles):
        yield


def _is_cache(value: object) -> bool:
    from transformers import Cache

    return isinstance(value, Cache)


def _ratio(error: Tensor, reference: Tensor, real: Tensor) -> float:
    """``||error|| / ||reference||`` over the ``real`` tokens, ``[batch, length, width]``."""
    above, below = (
        states[real.to(states.device)].double().norm().item() for states in (error, reference)
    )
    return float(above / max(below, torch.finfo().tiny))
