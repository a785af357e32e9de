"""Reads conversations from records as the OpenAI API and its training files write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qplug import Conversation, QplugError


def conversation(item: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> Conversation:
    """Returns the conversation in ``item``, an object with ``messages``, perhaps ``tools``.

    ``options`` are variables of the chat template; the object's own ``chat_template_kwargs``
    replace those of the same name. Raises QplugError, which begins with ``where``, for a record of
    another form.
    """
    messages, tools = item["messages"], item.get("tools") or []
    own = item.get("chat_template_kwargs") or {}
    if not isinstance(messages, list) or not messages:
        raise QplugError(f"{where}: messages must be a list of one message or more")
    for number, message in enumerate(messages, 1):
        _check_message(message, f"{where}: message {number}")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise QplugError(f"{where}: tools must be a list of objects")
    if not isinstance(own, dict):
        raise QplugError(f"{where}: chat_template_kwargs must be an object")
    return Conversation(tuple(messages), tuple(tools), {**options, **own}, where=where)


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise QplugError(f"{where}: must be an object with a role")
    content, calls = message.get("content"), message.get("tool_calls") or []
    if isinstance(content, list):
        if not all(
            isinstance(part, dict) and isinstance(part.get("type"), str) for part in content
        ):
            raise QplugError(f"{where}: parts of its content must be objects with a type")
        if not all(isinstance(part.get("text", ""), str) for part in content):
            raise QplugError(f"{where}: the text of a part of its content must be a string")
    elif content is not None and not isinstance(content, str):
        raise QplugError(f"{where}: its content must be a string or a list")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise QplugError(f"{where}: its tool_calls must be a list of objects")
