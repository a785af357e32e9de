"""Says why the Hub gave no file, in qplug's words: those of the HTTP library tell users nothing."""

from __future__ import annotations

from collections.abc import Iterator

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
    statuses = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
    status = next(filter(None, statuses), None)
    if status is not None:
        return (
            "the Hub has no such file"
            if status == 404
            else f"the Hub answers with status {status}; try again later"
        )
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"the Hub's cache cannot be written: {error.strerror}"
    return "the Hub cannot be reached; check the network"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields ``error`` and the errors that it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
