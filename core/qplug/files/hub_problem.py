"""Says why the Hub gave or took no file: the words of the HTTP library tell users nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

#: What to do about each error of huggingface_hub, by the name of its class, narrower ones first.
_KNOWN = {
    "HFValidationError": "a repository on the Hub cannot have this name",
    "GatedRepoError": (
        "accept its license on its page on the Hub, then log in with hf auth login or set HF_TOKEN"
    ),
    "RepositoryNotFoundError": (
        "the Hub has no such repository, or it is private; check the name, or log in with "
        "hf auth login"
    ),
    "NotASafetensorsRepoError": "it has no weights in safetensors, which qplug reads",
    "OfflineModeIsEnabled": (
        "it is not in the Hub's cache, and HF_HUB_OFFLINE is set; unset the variable"
    ),
}


def hub_problem(error: BaseException) -> str:
    """Returns why a download from the Hub ended with ``error``, and what to do about it.

    The result is a clause that follows a colon, without a full stop.
    """
    causes = list(_causes(error))
    names = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    for name, sentence in _KNOWN.items():
        if name in names:
            return sentence
    status = _status(causes)
    if status is not None:
        return (
            "the Hub has no such file"
            if status == 404
            else f"the Hub answers with status {status}; try again later"
        )
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"the Hub's cache cannot be written: {error.strerror}"
    return "the Hub cannot be reached; check the network"


#: The modules of HTTP libraries, whose other errors mean that nobody answers.
_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3")

#: What to do about each status with which the Hub refuses an upload.
_REFUSED = {
    401: "the Hub does not know the token; log in with hf auth login, or set HF_TOKEN",
    403: "the token may not write there; choose your own name, or a token with the right to write",
    404: "the Hub has no such user or organization, or the token may not see it; check the name",
    413: "a file is larger than the Hub takes; quantize again with a smaller --shard-size",
    429: "the Hub takes no more requests from you for now; try again later",
}


def upload_problem(error: BaseException) -> str | None:
    """Returns why an upload to the Hub ended with ``error``, and what to do about it.

    The result is a clause that follows a colon, without a full stop. None is returned if neither
    the Hub nor the network nor a file is the cause: then the error is a bug.
    """
    causes = list(_causes(error))
    status = _status(causes)
    if status in _REFUSED:
        return _REFUSED[status]
    if status is not None:
        return f"the Hub answers with status {status}; try again later"
    for cause in causes:
        if isinstance(cause, OSError) and cause.filename:
            return f"{cause.filename}: {cause.strerror}"
        kinds = type(cause).__mro__
        if issubclass(kinds[0], OSError) or any(k.__module__.startswith(_LIBRARIES) for k in kinds):
            return hub_problem(error)
    return hub_problem(error) if type(error).__name__ in _KNOWN else None


def _status(causes: Iterable[BaseException]) -> int | None:
    """Returns the status of the first answer of the Hub among ``causes``; None without one."""
    statuses = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
    return next(filter(None, statuses), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields ``error`` and the errors that it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
