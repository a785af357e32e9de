"""Asks a model the prompts of the suite, and counts the answers that pass each check."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qplug.api import Conversation
from qplug.evaluation.behaviour.checks import loop, open_thoughts, wrong_call
from qplug.files.json_text import read_json
from qplug.text.chat_template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The most tokens of the text around a needle.
LONGEST = 8192
#: The fewest for which a needle means something.
_SHORTEST = 200
#: Where the needles are, as shares of the text.
_DEPTHS = (0.1, 0.5, 0.9)
#: The part of the window that an answer may take.
_SHARE = 4


@dataclass(frozen=True)
class Part:
    """How many of ``count`` answers pass one check of the suite.

    ``failures`` says what is wrong with each of the others. ``absent`` says why the check does not
    apply to the model, None if it does.
    """

    name: str
    passed: int = 0
    count: int = 0
    failures: tuple[str, ...] = ()
    absent: str | None = None


@dataclass(frozen=True)
class Speaker:
    """A model that writes text.

    ``write`` returns up to so many tokens that the model writes greedily after the given ones,
    without the token that ends a text. ``window``: the tokens that the model reads.
    """

    tokenizer: PreTrainedTokenizerBase
    window: int
    write: Callable[[Sequence[int], int], list[int]]

    @property
    def template(self) -> str | None:
        """The source of the chat template, None if there is none."""
        source: Any = self.tokenizer.chat_template
        return "\n".join(source.values()) if isinstance(source, dict) else source

    def prompt(self, text: str, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Returns the user's ``text`` as the chat template writes it, ready for an answer."""
        message = {"role": "user", "content": text}
        asked = Conversation([message], tools, where="the suite of behaviour")
        return Template(self.tokenizer, asked).text([message], prompt=True)

    def encoded(self, prompt: str) -> list[int]:
        """Returns the tokens of a prompt, with special tokens only if no template wrote them."""
        special = self.template is None
        tokens: list[int] = self.tokenizer.encode(prompt, add_special_tokens=special)
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """Returns ``tokens`` as text, with special tokens."""
        text: Any = self.tokenizer.decode(list(tokens), skip_special_tokens=False)
        return str(text)


@dataclass(frozen=True)
class Suite:
    """The prompts of the suite, and the most ``tokens`` of an answer."""

    prompts: Mapping[str, Any]
    tokens: int

    @classmethod
    def shipped(cls, tokens: int) -> Suite:
        """Returns the suite with the prompts that ship with qplug."""
        folder = Path(str(files("qplug.evaluation.behaviour")))
        return cls(read_json(folder / "prompts.json"), tokens)

    def parts(self, speaker: Speaker, watch: Callable[[int, int, str], None]) -> Iterator[Part]:
        """Yields the parts of the suite for ``speaker``.

        ``watch`` is called with the answers written, all answers, and the part.
        """
        limit = min(self.tokens, speaker.window // _SHARE)
        answers = list(self._answers(speaker, limit, watch))
        yield _thoughts(speaker, answers)
        yield self._calls(speaker, limit, watch)
        wrong = [loop(tokens) for _, tokens in answers]
        yield _counted("no loop", wrong)
        yield self._needles(speaker, limit, watch)

    def _answers(
        self, speaker: Speaker, limit: int, watch: Callable[[int, int, str], None]
    ) -> Iterator[tuple[str, list[int]]]:
        """Yields the prompt and the answer to each question, or to each beginning of a text."""
        chats = speaker.template is not None
        texts = self.prompts["questions" if chats else "beginnings"]
        for number, text in enumerate(texts, 1):
            prompt = speaker.prompt(text) if chats else text
            yield prompt, speaker.write(speaker.encoded(prompt), limit)
            watch(number, len(texts), "questions")

    def _calls(self, speaker: Speaker, limit: int, watch: Callable[[int, int, str], None]) -> Part:
        name = "valid tool calls"
        template = speaker.template
        if template is None:
            return Part(name, absent="there is no chat template")
        if not re.search(r"\btools\b", template):
            return Part(name, absent="the chat template takes no tools")
        if "<function=" in template or "<arg_key>" in template:
            return Part(name, absent="the model writes calls in XML, not in JSON")
        wrong = []
        texts, tools = self.prompts["requests"], self.prompts["tools"]
        for number, text in enumerate(texts, 1):
            tokens = speaker.write(speaker.encoded(speaker.prompt(text, tools)), limit)
            wrong.append(wrong_call(speaker.text(tokens), tools))
            watch(number, len(texts), "tool calls")
        return _counted(name, wrong)

    def _needles(
        self, speaker: Speaker, limit: int, watch: Callable[[int, int, str], None]
    ) -> Part:
        length = min(LONGEST, speaker.window - limit)
        name = f"needle in {length} tokens"
        if length < _SHORTEST:
            return Part(name, absent=f"the model reads {speaker.window} tokens")
        wrong = []
        answers = self.prompts["needle"]["answers"]
        for number, (depth, answer) in enumerate(zip(_DEPTHS, answers, strict=True), 1):
            tokens = self._haystack(speaker, length, depth, answer)
            text = speaker.text(speaker.write(tokens, limit))
            wrong.append(None if answer in text else f"not found at {depth:.0%} of the text")
            watch(number, len(answers), "needles")
        return _counted(name, wrong)

    def _haystack(self, speaker: Speaker, length: int, depth: float, answer: str) -> list[int]:
        """Returns a prompt of up to ``length`` tokens with the needle at ``depth`` of its text."""
        needle = self.prompts["needle"]
        filler, sentence = needle["filler"], needle["sentence"].format(answer=answer)

        def prompt(count: int) -> list[int]:
            sentences = [filler[n * 5 % len(filler)] for n in range(count)]
            sentences.insert(round(depth * count), sentence)
            text = " ".join(sentences)
            if speaker.template is None:
                return speaker.encoded(f"{text}\n{needle['beginning']}")
            return speaker.encoded(speaker.prompt(f"{text}\n\n{needle['question']}"))

        one, many = len(prompt(0)), len(prompt(len(filler)))
        count = max(0, int((length - one) * len(filler) / (many - one)))
        while len(found := prompt(count)) > length and count:
            count -= 1
        return found


def _thoughts(speaker: Speaker, answers: Sequence[tuple[str, list[int]]]) -> Part:
    name = "closes </think>"
    template = speaker.template
    if template is None:
        return Part(name, absent="there is no chat template")
    if "think>" not in template and "</think>" not in speaker.tokenizer.get_added_vocab():
        return Part(name, absent="the model does not think: no </think> in its chat template")
    wrong = [open_thoughts(prompt, speaker.text(tokens)) for prompt, tokens in answers]
    return _counted(name, wrong)


def _counted(name: str, wrong: Sequence[str | None]) -> Part:
    """Returns the part for answers, each with what is wrong with it."""
    failures = tuple(
        f"answer {number}: {problem}" for number, problem in enumerate(wrong, 1) if problem
    )
    return Part(name, len(wrong) - len(failures), len(wrong), failures)
