"""Opens a model by its headers: names, dtypes and shapes of tensors, in a folder or on the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qplug.api import Checkpoint, Reader, StoredTensor, TensorSpec
from qplug.checkpoint.config_file import CONFIG, read_config
from qplug.checkpoint.locate import find_at_hand, find_model, may_be_on_hub
from qplug.checkpoint.open import open_checkpoint
from qplug.checkpoint.sources import read_as_float
from qplug.checkpoint.tensor_file import CODES
from qplug.errors import QplugError
from qplug.files.hub_problem import hub_problem

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class RemoteTensor(StoredTensor):
    """A tensor of a file on the Hub, of which only the header was read."""

    file: Path
    spec: TensorSpec

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.file,)

    def read(self) -> Tensor:
        raise QplugError(f"{self.file}: was not downloaded: only its header was read")

    def chunks(self) -> Iterator[bytes]:
        raise QplugError(f"{self.file}: was not downloaded: only its header was read")


def open_headers(model: str, readers: Iterable[Reader]) -> Checkpoint:
    """Returns the checkpoint of ``model``, of which nothing but config.json and headers was read.

    ``model`` is a folder, ``qplug:demo`` or a Hub id, whose weights are not downloaded. A
    checkpoint that one of ``readers`` reads is opened as the float model that it stands for. Raises
    QplugError as ``open_checkpoint`` does, and if the Hub does not answer.
    """
    folder = find_at_hand(model)
    if folder is None and may_be_on_hub(model):
        return read_as_float(_on_hub(model), readers)
    if folder is not None and may_be_on_hub(model) and not any(folder.glob("*.safetensors")):
        return read_as_float(_on_hub(model), readers)
    return open_checkpoint(folder or find_model(model), readers=readers)


def _on_hub(model: str) -> Checkpoint:
    """Returns the checkpoint of a model on the Hub, from config.json and the headers of its files.

    Raises QplugError if the Hub does not give them.
    """
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.hf_hub_download(model, CONFIG)).parent
        files: dict[str, Any] = {**huggingface_hub.get_safetensors_metadata(model).files_metadata}
    except Exception as error:  # the HTTP library, and so its exceptions, changed twice
        raise QplugError(
            f"{model}: no folder on this machine, and its headers cannot be read from the Hub: "
            f"{hub_problem(error)}; or pass the path of a folder"
        ) from error
    tensors: dict[str, StoredTensor] = {}
    for file, header in files.items():
        for name, info in header.tensors.items():
            dtype = _DTYPES.get(info.dtype)
            if dtype is None:
                raise QplugError(f"{model}: {file}: dtype {info.dtype} is not known")
            tensors[name] = RemoteTensor(folder / file, TensorSpec(dtype, tuple(info.shape)))
    return Checkpoint(folder, read_config(folder), tensors)
