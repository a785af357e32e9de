"""Reads text from a dataset on the Hugging Face Hub, or from a local copy of the dataset.

This needs the package ``datasets``, which reads single rows of files of any size from disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from qplug.api.params import Param
from qplug.errors import QplugError
from qplug.files.hub_problem import hub_problem

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Seconds to wait for the Hub's first answer.
_TIMEOUT = 10.0

_INSTALL = "pip install 'qplug[datasets]'"


@dataclass(frozen=True)
class HubParams:
    """The options of a dataset on the Hub."""

    path: Annotated[
        Path | None,
        Param(
            "A folder to read instead of the Hub: the downloaded repository, or a folder that "
            "`save_to_disk` of the package datasets wrote."
        ),
    ] = None


@dataclass(frozen=True)
class HubText:
    """A text column in one file of a dataset on the Hub.

    ``file`` is the path of the file in the repository ``repo``; it is parquet or JSON lines, plain
    or compressed. ``split`` is the name that these rows have in a saved copy of the whole dataset.
    """

    repo: str
    file: str
    split: str
    column: str = "text"

    def rows(self, path: Path | None = None) -> Sequence[str]:
        """Returns the text of every row; a row is read from disk when it is accessed.

        ``path`` is a local copy of the dataset. Without it the file comes from the Hub's cache on
        this machine, or is downloaded into that cache. Raises QplugError if the file cannot be
        read or downloaded (without a network within seconds), or if it has no such column.
        """
        table = self._file(self._download()) if path is None else self._local(path.expanduser())
        if self.column not in table.column_names:
            where = self.repo if path is None else path
            has = ", ".join(table.column_names) or "none"
            raise QplugError(f"{where}: no column {self.column!r}; its columns: {has}")
        return cast("Sequence[str]", table[self.column])

    def _local(self, folder: Path) -> Any:
        """Returns the rows in a local copy, as a ``datasets.Dataset``."""
        if (folder / self.file).is_file():
            return self._file(folder / self.file)
        if not folder.is_dir():
            raise QplugError(f"{folder}: no such folder")
        datasets = _datasets()
        try:
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:  # datasets raises anything, as in _file
            raise QplugError(
                f"{folder}: neither a copy of {self.repo} (it has no {self.file}) nor a folder "
                f"that save_to_disk wrote ({_first_line(error)})"
            ) from error
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if self.split in saved:
            return saved[self.split]
        if len(saved) == 1:
            return next(iter(saved.values()))
        raise QplugError(f"{folder}: no split {self.split!r}; its splits: {', '.join(saved)}")

    def _file(self, path: Path) -> Any:
        """Returns the rows of one file, as a ``datasets.Dataset``."""
        table = _datasets().Dataset
        read = table.from_parquet if path.suffix == ".parquet" else table.from_json
        try:
            return read(str(path))
        except Exception as error:  # for a broken file datasets raises anything, even StopIteration
            hint = ""
            if path.suffix == ".zst" and find_spec("zstandard") is None:
                hint = f": the package zstandard is needed: {_INSTALL}"
            raise QplugError(
                f"{path}: cannot be read ({_first_line(error.__cause__ or error)}){hint}"
            ) from error

    def _download(self) -> Path:
        """Returns the file in the Hub's cache, after downloading it if it is not there."""
        _datasets()  # reports a missing package before the download of hundreds of megabytes
        from huggingface_hub import (
            get_hf_file_metadata,
            hf_hub_download,
            hf_hub_url,
            try_to_load_from_cache,
        )

        cached = try_to_load_from_cache(self.repo, self.file, repo_type="dataset")
        if isinstance(cached, str):
            return Path(cached)
        try:
            # Without a network hf_hub_download retries for half a minute; this request fails once.
            get_hf_file_metadata(
                hf_hub_url(self.repo, self.file, repo_type="dataset"), timeout=_TIMEOUT
            )
            return Path(hf_hub_download(self.repo, self.file, repo_type="dataset"))
        except Exception as error:  # the HTTP library, and so its exceptions, changed twice
            raise QplugError(
                f"{self.repo}: cannot be downloaded from the Hub ({hub_problem(error)}). Or give a "
                "local copy: --dataset-opt path=FOLDER, with the downloaded repository or a folder "
                "that save_to_disk wrote"
            ) from error


def _datasets() -> Any:
    """Returns the module ``datasets``. Raises QplugError if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise QplugError(f"the package datasets is needed: {_INSTALL} ({error})") from error
    return datasets


def _first_line(error: BaseException) -> str:
    """Returns the type of ``error`` and the first line of its message."""
    line = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
