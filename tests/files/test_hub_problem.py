"""The words of an HTTP library become what a user can do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from qplug.files.hub_problem import hub_problem


def from_cause(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class Refusal(OSError):
    """An answer of the Hub with a status."""

    def __init__(self, status: int) -> None:
        super().__init__("Server error for url: https://...")
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errors.HFValidationError("Repo id must be"), "cannot have this name"),
        (errors.OfflineModeIsEnabled("Cannot reach"), "HF_HUB_OFFLINE is set; unset"),
        (Refusal(503), "the Hub answers with status 503; try again later"),
        (from_cause(errors.LocalEntryNotFoundError("no"), Refusal(404)), "has no such file"),
        (OSError(28, "No space left on device"), "cache cannot be written: No space left"),
        (ConnectionRefusedError(111, "Connection refused"), "cannot be reached; check the network"),
        (ValueError("anything"), "cannot be reached; check the network"),
    ],
)
def test_a_problem(error: Exception, told: str) -> None:
    assert told in hub_problem(error)


@pytest.mark.parametrize("kind", ["GatedRepoError", "RepositoryNotFoundError"])
def test_a_repository_behind_a_door(kind: str) -> None:
    error = getattr(errors, kind).__new__(getattr(errors, kind))
    assert "log in with hf auth login" in hub_problem(error)
