"""The model that qplug's reader loads, as lm-eval asks models."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from qplug.errors import QplugError
from qplug.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

#: A text with its answer, both as tokens, as lm-eval passes them: the first element is not used.
Request = tuple[Any, list[int], list[int]]

#: Tokens that a task may generate where it names no number.
_GENERATED = 256


class ReaderModel(TemplateLM):
    """The transformers model ``net``, asked by lm-eval in batches of up to ``batch_size`` texts.

    Log-likelihoods are those of lm-eval's own ``HFLM``: a text gets the special tokens that its
    tokenizer adds, and no second BOS if it begins with one; too long a text loses tokens on the
    left, never the answer's. ``watch`` is called with the requests done, all requests, and their
    kind.
    """

    def __init__(
        self,
        net: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        watch: Callable[[int, int, str], None] = lambda *_: None,
    ) -> None:
        super().__init__()
        self.net: Any = net
        self.tokenizer: Any = tokenizer
        self.batch_size = batch_size
        self.max_length: int = resolve_max_length(net.config)
        self._watch = watch
        self._keeps = "logits_to_keep" in inspect.signature(net.forward).parameters
        self._device = net.device
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if eos is None and bos is None:
            raise QplugError("the model's tokenizer has no token that ends or begins a text")
        self._eos: int = bos if eos is None else eos
        self._prefix: int = self._eos if bos is None else bos

    # --- tokens -----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it: BOS, or EOS if there is no BOS."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval caches the texts of chats."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Returns the tokens of ``string``.

        Unless ``add_special_tokens`` says so, the tokenizer decides on special tokens, but a text
        that begins with BOS gets none.
        """
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self._prefix)
        ):
            add_special_tokens = False
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens: list[int] = self.tokenizer.encode(string, **how)
        return tokens

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of ``chat_history``; without a prompt the last message stays open."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the chat template, for lm-eval's record of a run."""
        template: str | None = self.tokenizer.chat_template if chat_template else ""
        return template

    # --- likelihoods ------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Returns, for each context and answer, the log-probability in nats of the answer.

        The second value says whether greedy decoding gives the answer.
        """
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Returns the log-probability in nats of each text, which may be longer than the window.

        Every token is predicted once, from as many tokens before it as its window has.
        """
        owners: list[int] = []
        windows: list[Request] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self._prefix,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, answer in map(make_disjoint_window, pairs):
                owners.append(number)
                windows.append((None, context, answer))
        totals = [0.0] * len(requests)
        for owner, (loss, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += loss
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **_: object
    ) -> list[tuple[float, bool]]:
        answers: dict[int, tuple[float, bool]] = {}
        # Choices of one letter differ in the token that is predicted alone: one row serves them.
        rows: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for number, (_, context, answer) in enumerate(requests):
            if len(answer) > self.max_length:
                raise QplugError(
                    f"an answer of the task has {len(answer)} tokens, more than the "
                    f"{self.max_length} that the model reads"
                )
            row = tuple((context + answer)[-(self.max_length + 1) :][:-1])
            rows.setdefault(row, []).append((number, answer))
        for batch in self._batches(sorted(rows, key=lambda row: (-len(row), row))):
            padded = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
            for place, row in enumerate(batch):  # what stands right of a token changes nothing
                padded[place, : len(row)] = torch.tensor(row)
            # All logits of long texts would be larger than the model.
            first = min(len(row) - max(len(answer) for _, answer in rows[row]) for row in batch)
            few = {"logits_to_keep": padded.shape[1] - first} if self._keeps else {}
            logits = self.net(input_ids=padded.to(self.device), use_cache=False, **few).logits
            skipped = padded.shape[1] - logits.shape[1]
            for place, row in enumerate(batch):
                end = len(row) - skipped
                for number, answer in rows[row]:
                    answers[number] = _score(logits[place, end - len(answer) : end], answer)
            self._watch(len(answers), len(requests), "likelihoods")
        return [answers[number] for number in range(len(requests))]

    # --- generation -------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Returns the text that the model writes after each context, up to a stop sequence.

        Raises QplugError if a task wants more tokens than the model reads.
        """
        written: dict[int, str] = {}
        numbered = [(n, request.args[0], request.args[1]) for n, request in enumerate(requests)]

        def settings(request: tuple[int, str, Mapping[str, Any]]) -> str:
            return json.dumps(request[2], sort_keys=True, default=str)

        for _, alike in groupby(sorted(numbered, key=settings), settings):
            group = [(n, self.tok_encode(text), how) for n, text, how in alike]
            group.sort(key=lambda request: -len(request[1]))
            for batch in self._batches(group):
                texts = self._continued([tokens for _, tokens, _ in batch], batch[0][2])
                written.update(zip((n for n, _, _ in batch), texts, strict=True))
                self._watch(len(written), len(requests), "answers")
        return [written[number] for number in range(len(requests))]

    def _continued(self, contexts: list[list[int]], how: Mapping[str, Any]) -> list[str]:
        """Returns the text behind each of ``contexts``, the longest of which is first."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(how), _GENERATED))
        count = options.pop("max_gen_toks")
        room = self.max_length - count
        if room <= 0:
            raise QplugError(
                f"the task generates {count} tokens, but the model reads {self.max_length} in all"
            )
        eos = self.tokenizer.decode(self._eos)
        stop = handle_stop_sequences(options.pop("until", None), eos=eos)
        if not options.get("do_sample"):
            options.pop("temperature", None)
        padding = self.tokenizer.pad_token_id
        padding = self._eos if padding is None else padding
        contexts = [tokens[-room:] for tokens in contexts]
        width = len(contexts[0])
        inputs = torch.full((len(contexts), width), padding)
        mask = torch.zeros_like(inputs)
        for place, tokens in enumerate(contexts):
            inputs[place, width - len(tokens) :] = torch.tensor(tokens)
            mask[place, width - len(tokens) :] = 1
        criteria = stop_sequences_criteria(self.tokenizer, stop, width, len(contexts))
        with quiet_transformers():
            found = self.net.generate(
                input_ids=inputs.to(self.device),
                attention_mask=mask.to(self.device),
                max_length=width + count,
                stopping_criteria=criteria,
                pad_token_id=padding,
                use_cache=True,
                **options,
            )
        texts = [self.tokenizer.decode(row[width:], skip_special_tokens=True) for row in found]
        return [postprocess_generated_text(text, stop, None) for text in texts]

    def _batches(self, items: list[T]) -> Iterator[list[T]]:
        for start in range(0, len(items), self.batch_size):
            yield items[start : start + self.batch_size]


def _score(logits: Tensor, answer: list[int]) -> tuple[float, bool]:
    """Returns the log-probability of ``answer`` and whether it is the most likely text.

    ``logits``: ``[answer, vocabulary]``.
    """
    logprobs = logits.float().log_softmax(-1)
    tokens = torch.tensor(answer, device=logprobs.device)
    chosen = logprobs.gather(1, tokens[:, None])
    return chosen.sum().item(), bool((logprobs.argmax(-1) == tokens).all())
