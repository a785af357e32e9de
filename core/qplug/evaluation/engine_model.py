"""The model that a running engine serves, as lm-eval asks models."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from qplug.errors import QplugError
from qplug.files.json_text import parse_json

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedTokenizerBase

#: Requests that the engine has at a time.
_AT_A_TIME = 16
#: The most bytes of a server's list of models.
_LONGEST = 2**20


def served_name(url: str) -> str:
    """Returns the name of the model that the server at ``url`` serves.

    Raises QplugError if no server of OpenAI's API answers there.
    """
    if not url.startswith(("http://", "https://")):
        raise QplugError(f"{url!r}: give the address of a server, such as http://127.0.0.1:8000")
    try:
        with urlopen(f"{url.rstrip('/')}/v1/models", timeout=30) as answer:  # noqa: S310
            text = answer.read(_LONGEST).decode("utf-8", errors="replace")
    except HTTPError as error:
        raise QplugError(f"{url}: /v1/models answers {error.code}") from error
    except (URLError, OSError) as error:
        raise QplugError(f"{url}: no server answers: {getattr(error, 'reason', error)}") from error
    try:
        served = parse_json(text, f"{url}: /v1/models")["data"][0]["id"]
    except (LookupError, TypeError) as error:
        raise QplugError(f"{url}: /v1/models lists no model") from error
    return str(served)


def engine_model(
    url: str,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat: bool,
    trust_remote_code: bool,
) -> LM:
    """Returns lm-eval's ``local-completions`` for the server at ``url``.

    ``folder`` has the tokenizer. A text gets a BOS where ``tokenizer`` adds one, as in qplug's own
    reader; with ``chat`` the template writes it. Texts of more than ``max_length`` tokens are cut
    on the left.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    adds_bos = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return LocalCompletionsAPI(
        model=served_name(url),
        base_url=f"{url.rstrip('/')}/v1/completions",
        tokenizer=folder,
        tokenizer_backend="huggingface",
        add_bos_token=adds_bos and not chat,
        # lm-eval keeps a token for the one that the server must generate.
        max_length=max_length,
        num_concurrent=_AT_A_TIME,
        trust_remote_code=trust_remote_code,
    )
