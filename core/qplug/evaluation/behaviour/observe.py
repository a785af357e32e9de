"""Takes a quantized model and its float model through the suite of behaviour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qplug.evaluation.behaviour.suite import Part, Speaker, Suite
from qplug.evaluation.end_tokens import end_tokens
from qplug.machine.memory import naming_memory
from qplug.machine.session import Session
from qplug.model.quiet import quiet_transformers
from qplug.model.tokenizer import load_tokenizer
from qplug.reading.folder import Folder, open_folder
from qplug.reading.load import load_folder
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The tokens that a model reads, where its configuration does not say.
_WINDOW = 2048


@dataclass(frozen=True)
class Behaviour:
    """The behaviour of ``model``, and of ``base`` if it was given, part by part in one order."""

    model: str
    base: str | None
    parts: tuple[Part, ...]
    base_parts: tuple[Part, ...] | None


def observe(
    model: str,
    *,
    base: str | None = None,
    tokens: int = 512,
    device: str = "auto",
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    watch: Callable[[str, int, int, str], None] = lambda *_: None,
) -> Behaviour:
    """Ask ``model``, and the float model ``base`` if it is given, the prompts of the suite.

    Answers are greedy, in float32, and have up to ``tokens`` tokens, or a quarter of what the model
    reads. ``watch`` is called with the model, the answers written, all answers, and the part.
    Nothing is downloaded but models. Raises QplugError for mistakes that the user can mend.
    """
    session = Session.alone(device, registry=registry, trust_remote_code=trust_remote_code)
    names = [model] if base is None else [model, base]
    opened = [(name, open_folder(name, session, or_float=True)) for name in names]
    suite = Suite.shipped(tokens)
    found = [_parts(name, folder, suite, session, watch) for name, folder in opened]
    return Behaviour(model, base, found[0], found[1] if base is not None else None)


def _parts(
    name: str,
    folder: Folder,
    suite: Suite,
    session: Session,
    watch: Callable[[str, int, int, str], None],
) -> tuple[Part, ...]:
    """Returns the parts of ``suite`` for the model in ``folder``."""
    tokenizer = load_tokenizer(name, trust_remote_code=session.trust_remote_code)
    what = f"{name} is held whole on {session.device}; use another --device"
    with naming_memory(lambda: what):
        net = load_folder(folder)
        net.to(session.device)  # type: ignore[arg-type]
        speaker = speaker_of(net, tokenizer, folder.checkpoint.folder)
        return tuple(suite.parts(speaker, lambda *progress: watch(name, *progress)))


def speaker_of(net: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Speaker:
    """Returns the transformers model ``net``, loaded from ``folder``, as one that writes text."""
    config = net.config.get_text_config()
    window = getattr(config, "max_position_embeddings", None) or _WINDOW
    ends = end_tokens(folder, net, tokenizer)
    pad = tokenizer.pad_token_id
    padding = pad if pad is not None else min(ends, default=0)

    @torch.inference_mode()
    def write(prompt: Sequence[int], count: int) -> list[int]:
        inputs = torch.tensor([list(prompt)], device=net.device)
        with quiet_transformers():
            found = net.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=sorted(ends) or None,
                pad_token_id=padding,
            )
        new: list[int] = found[0, len(prompt) :].tolist()
        return new[:-1] if new and new[-1] in ends else new

    return Speaker(tokenizer, int(window), write)
