"""Says of a text that a model wrote whether something is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qplug.errors import QplugError
from qplug.files.json_text import parse_json

#: The longest period of a loop, in tokens; how often it comes, and over how many tokens at least.
_PERIOD, _TIMES, _LEAST = 100, 4, 32

_OPEN, _CLOSE = "<think>", "</think>"

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


def open_thoughts(prompt: str, text: str) -> str | None:
    """Returns why the thoughts in ``text`` have no end, or None if they have one.

    ``text`` follows ``prompt``, which may open the thoughts. A text without thoughts is in order.
    """
    thinks = prompt.rstrip().endswith(_OPEN) or _OPEN in text
    if not thinks:
        return None
    if text.rfind(_CLOSE) < max(0, text.rfind(_OPEN)):
        return f"no {_CLOSE}"
    return None if answer_of(text).strip() else f"nothing behind {_CLOSE}"


def answer_of(text: str) -> str:
    """Returns ``text`` behind its thoughts."""
    return text.rpartition(_CLOSE)[2]


def loop(tokens: Sequence[int]) -> str | None:
    """Returns how ``tokens`` end in a loop, or None if they do not.

    A loop is a group of up to 100 tokens that comes four times or more, and fills 32 tokens or
    more, up to the end.
    """
    for period in range(1, min(_PERIOD, len(tokens) // _TIMES) + 1):
        span = max(period * _TIMES, _LEAST)
        tail = tokens[-span:]
        if len(tail) == span and tail[period:] == tail[:-period]:
            return f"the same {period} tokens again and again"
    return None


def wrong_call(text: str, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns why ``text`` has no valid call of one of ``tools``, or None if its calls are valid.

    ``tools`` are functions with a JSON schema of their parameters, as in requests to the OpenAI
    API. A call is an object in JSON with a name and arguments, between whatever other text.
    """
    calls = 0
    for candidate in _objects(answer_of(text)):
        try:
            value = parse_json(candidate, "a tool call")
        except QplugError:
            return "a call is not JSON"
        value = value.get("function", value)
        if not isinstance(value, Mapping) or "name" not in value:
            continue
        calls += 1
        if problem := _problem(value, tools):
            return problem
    return None if calls else "no call"


def _problem(call: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> str | None:
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if call["name"] not in functions:
        return f"no tool is called {call['name']!r}"
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments, "arguments")
        except QplugError:
            return "the arguments are not JSON"
    if not isinstance(arguments, Mapping):
        return "the arguments are no mapping"
    return _beyond(arguments, functions[call["name"]]["parameters"])


def _beyond(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> str | None:
    """Returns how ``arguments`` break ``schema``; it has the keywords that the prompts use."""
    known = schema["properties"]
    for name in schema.get("required", ()):
        if name not in arguments:
            return f"argument {name!r} is missing"
    for name, value in arguments.items():
        if name not in known:
            return f"argument {name!r} is unknown"
        kinds = _TYPES[known[name]["type"]]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            return f"argument {name!r} is no {known[name]['type']}"
        choices = known[name].get("enum")
        if choices and value not in choices:
            return f"argument {name!r} is none of {', '.join(choices)}"
    return None


def _objects(text: str) -> Iterator[str]:
    """Yields each outermost ``{...}`` in ``text``, the last of which may have no end."""
    depth, start, quoted, escaped = 0, 0, False, False
    for place, character in enumerate(text):
        if depth and quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif depth and character == '"':
            quoted = True
        elif character == "{":
            start = start if depth else place
            depth += 1
        elif character == "}" and depth:
            depth -= 1
            if depth == 0:
                yield text[start : place + 1]
    if depth:
        yield text[start:]
