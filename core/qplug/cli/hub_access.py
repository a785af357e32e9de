"""Whether the Hub answers this machine. Imports no torch, and no client of the Hub."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from http.client import HTTPException


def is_offline() -> bool:
    """Whether the user forbids requests to the Hub, by HF_HUB_OFFLINE."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str:
    """The address of the Hub."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def hub_answers(seconds: float) -> bool:
    """Whether the Hub answers a request within ``seconds``; no request is made if offline."""
    if is_offline():
        return False
    try:
        request = urllib.request.Request(endpoint(), method="HEAD")  # noqa: S310 - the user's own
        with urllib.request.urlopen(request, timeout=seconds):  # noqa: S310
            return True
    except urllib.error.HTTPError:
        return True  # it answers
    except (OSError, ValueError, HTTPException):
        return False
