"""Text from the Hugging Face Hub, or from a local copy of what is there.

Needs the package ``datasets``, which turns files of any size into rows that are read from disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from qplug.api.params import Param
from qplug.errors import QplugError

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Seconds to wait for the Hub's first answer.
_PATIENCE = 10.0

_INSTALL = "pip install 'qplug[datasets]'"


@dataclass(frozen=True)
class HubParams:
    """The options of a dataset that lives on the Hub."""

    path: Annotated[
        Path | None,
        Param(
            "A folder to read instead of the Hub: the downloaded repository, or what "
            "`save_to_disk` of the package datasets wrote."
        ),
    ] = None


@dataclass(frozen=True)
class HubText:
    """A column of text in one file of a dataset on the Hub.

    ``file`` is its path in the repository ``repo``, parquet or (compressed) JSON lines. ``split``
    is what a saved copy of the whole dataset calls these rows.
    """

    repo: str
    file: str
    split: str
    column: str = "text"

    def rows(self, path: Path | None = None) -> Sequence[str]:
        """The text of every row, each read from disk when it is asked for.

        ``path``: a local copy; without one the file is taken from the Hub's cache on this machine,
        or downloaded into it. Raises QplugError if that cannot be done, within seconds if there
        is no network.
        """
        table = self._file(self._download()) if path is None else self._local(path.expanduser())
        if self.column not in table.column_names:
            where = self.repo if path is None else path
            has = ", ".join(table.column_names) or "none"
            raise QplugError(f"{where}: no column {self.column!r}; its columns: {has}")
        return cast("Sequence[str]", table[self.column])

    def _local(self, folder: Path) -> Any:
        if (folder / self.file).is_file():
            return self._file(folder / self.file)
        if not folder.is_dir():
            raise QplugError(f"{folder}: no such folder")
        datasets = _datasets()
        try:
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:  # as in _file
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
        table = _datasets().Dataset
        read = table.from_parquet if path.suffix == ".parquet" else table.from_json
        try:
            return read(str(path))
        except Exception as error:  # on a broken file datasets lets anything out, StopIteration too
            hint = ""
            if path.suffix == ".zst" and find_spec("zstandard") is None:
                hint = f": the package zstandard is needed: {_INSTALL}"
            raise QplugError(
                f"{path}: cannot be read ({_first_line(error.__cause__ or error)}){hint}"
            ) from error

    def _download(self) -> Path:
        _datasets()  # a missing package is better heard of before hundreds of megabytes come
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
            # hf_hub_download tries for half a minute where there is no network; this tries once.
            get_hf_file_metadata(
                hf_hub_url(self.repo, self.file, repo_type="dataset"), timeout=_PATIENCE
            )
            return Path(hf_hub_download(self.repo, self.file, repo_type="dataset"))
        except Exception as error:  # the HTTP library, and so its exceptions, changed twice
            raise QplugError(
                f"{self.repo} cannot be had from the Hub ({_first_line(error)}). Give a local "
                "copy: --dataset-opt path=FOLDER, with the downloaded repository or what "
                "save_to_disk wrote"
            ) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise QplugError(f"the package datasets is needed: {_INSTALL} ({error})") from error
    return datasets


def _first_line(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
