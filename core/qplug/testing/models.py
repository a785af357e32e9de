"""A model and a tokenizer of a few thousand numbers, created in memory without a download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qplug.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

#: The characters that have a token each; every other character is token 0.
_CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
_SIZES: dict[str, Any] = {
    "vocab_size": 1 + len(_CHARACTERS),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
}


class ByteTokenizer:
    """A fast tokenizer with a token for each byte of UTF-8; it has the methods datasets call."""

    size = 256
    chat_template = "messages"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The bytes of ``text`` in UTF-8, as ids; there are no special tokens."""
        return list(text.encode())

    def get_chat_template(self, name: str | None, tools: object) -> str:
        """The words that ``apply_chat_template`` knows."""
        return self.chat_template

    def apply_chat_template(
        self, messages: list[dict[str, Any]], tools: object, *, tokenize: bool, **variables: Any
    ) -> str:
        """The role and the content of each message, on a line of its own."""
        return "".join(f"{m['role']}: {m.get('content')}\n" for m in messages)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with a token for each printable ASCII character, 97 tokens in all."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    numbers = {token: number for number, token in enumerate(["<unk>", *_CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # noqa: S106


def tiny_model(seed: int = 0, dtype: str = "float32") -> PreTrainedModel:
    """Returns a random Llama of two blocks, 64 wide, with the vocabulary of ``tiny_tokenizer``.

    The same ``seed`` gives the same weights. ``dtype`` is torch's name of their dtype.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.random.fork_rng(devices=[])
    with generator, quiet_transformers():
        torch.manual_seed(seed)
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**_SIZES))
        model.to(getattr(torch, dtype)).eval()
        return model


def write_tiny_model(folder: Path, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Writes ``tiny_model`` and ``tiny_tokenizer`` into the new ``folder``; returns it."""
    with quiet_transformers():
        tiny_model(seed, dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
