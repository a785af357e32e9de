"""Uploads a result to the Hub."""

from __future__ import annotations

from pathlib import Path

from qplug.errors import QplugError
from qplug.files.hub_problem import upload_problem

#: Files that are not part of a result: hidden ones, and those that some program has not finished.
_LEFT_OUT = (".*", "*/.*", "*.partial", "*.partial/*", "*.incomplete", "*.tmp", "*.lock")


def publish(
    folder: Path, repository: str, *, private: bool = False, token: str | None = None, message: str
) -> str:
    """Uploads ``folder`` to ``repository`` (``USER/NAME``) on the Hub, and returns its address.

    The repository is made if it does not exist. ``private`` is for a new repository. ``token`` is
    by default the one that ``hf auth login`` stored, or ``HF_TOKEN``. ``message`` is the title of
    the commit. Hidden and unfinished files are left out. Raises QplugError if there is no token, or
    if the Hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    token = token or get_token()
    if token is None:
        raise QplugError(
            f"{repository}: the Hub asks who you are; log in with hf auth login, set HF_TOKEN, or "
            "pass --token"
        )
    api = HfApi(token=token)
    try:
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=[*_LEFT_OUT],
        )
    except Exception as error:  # the HTTP library, and so its exceptions, changed twice
        problem = upload_problem(error)
        if problem is None:
            raise
        raise QplugError(f"{repository}: not uploaded: {problem}") from error
    return str(address)
