"""Read a folder back with qplug's own code, and make a model that computes with its codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qplug.api import Exporter, ModelView
from qplug.api.scheme import QuantArgs, Scheme
from qplug.api.tensors import Checkpoint
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.names import by_module, is_within, split_name
from qplug.checkpoint.open import open_checkpoint
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.architectures import find_packed_view
from qplug.model.kv_cache import SCALES
from qplug.output.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Folder:
    """A model's folder, opened: float or quantized."""

    checkpoint: Checkpoint
    view: ModelView
    manifest: Manifest | None
    exporter: Exporter[Any] | None
    schemes: dict[str, Scheme]
    kv_cache: QuantArgs | None = None
    trust_remote_code: bool = False

    @cached_property
    def _stored(self) -> dict[str, list[str]]:
        return by_module(self.checkpoint.tensors)  # which may be a hundred thousand

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as a float checkpoint would have it, by name.

        Of codes it is what an engine multiplies with, float32.
        """
        packed: dict[str, dict[str, Tensor]] = {}
        for tensor in self.checkpoint.tensors:
            name, local = split_name(tensor)
            if name in self.schemes and local != "bias":
                packed.setdefault(name, {})[local] = self.checkpoint.read(tensor)
            elif self.kv_cache is None or local not in SCALES:
                yield tensor, self.checkpoint.read(tensor)
        for name, tensors in packed.items():
            yield f"{name}.weight", self._effective(name, tensors)

    def dequantized(self, name: str) -> Tensor:
        """The float32 weight ``[out, in]`` that is stored of a quantized linear."""
        assert self.exporter is not None
        return self.exporter.format.dequantize(self.packed(name), self.schemes[name])

    def _effective(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        assert self.exporter is not None
        return self.exporter.effective_weight(tensors, self.schemes[name])

    def holds(self, parameter: str) -> bool:
        """Whether there is a tensor, or codes, for a parameter by its name in a model."""
        name, local = split_name(parameter)
        return parameter in self.checkpoint.tensors or (local == "weight" and name in self.schemes)

    def parameter(self, name: str) -> Tensor:
        """A parameter by its name in a model, float32."""
        linear, local = split_name(name)
        if local == "weight" and linear in self.schemes:
            return self._effective(linear, self.packed(linear))
        return self.checkpoint.read(name).float()

    def packed(self, name: str) -> dict[str, Tensor]:
        """What is stored of a quantized linear, its bias aside, by local name."""
        return {
            local: self.checkpoint.read(f"{name}.{local}")
            for local in self._stored.get(name, ())
            if local != "bias"
        }

    def input_scale(self, name: str) -> Tensor | None:
        """The scale of a linear's static inputs, float32 ``[1]``; None if they have none.

        Raises QplugError if the scheme wants one that is not there.
        """
        if self.exporter is None or not self.schemes[name].static_inputs:
            return None
        stored = {
            local: self.checkpoint.read(f"{name}.{local}")
            for local in self._stored.get(name, ())
            if local.startswith("input_")
        }
        scale = self.exporter.format.input_scale(stored, self.schemes[name])
        if scale is None:
            raise QplugError(f"{name}: its inputs are static, but no scale of them is there")
        return scale

    def cache_scales(self) -> dict[int, tuple[Tensor, ...]]:
        """The scales of keys and of values, float32 ``[1]``, by the number of the block.

        Raises QplugError if those of a block are not there.
        """
        scales = {}
        for number, block in enumerate(self.view.blocks):
            found = [
                [n for n in self.checkpoint.tensors if is_within(block, n) and n.endswith(e)]
                for e in (f".{local}" for local in SCALES)
            ]
            if any(len(names) != 1 for names in found):
                raise QplugError(f"{block}: has not just one {' and one '.join(SCALES)}")
            scales[number] = tuple(self.checkpoint.read(n).float().reshape(1) for (n,) in found)
        return scales


def open_folder(model: str, session: Session, *, backend: str | None = None) -> Folder:
    """Open a float or quantized model, without reading weights.

    ``backend`` reads the folder as another exporter would. Raises QplugError if the folder is not
    sound, or no exporter reads its format.
    """
    folder = find_model(model)
    manifest = read_manifest(folder)
    exporters, trusted = session.registry.exporters, session.trust_remote_code
    name = backend or (manifest.backend if manifest else None)
    checkpoint = open_checkpoint(folder, exporters[name].format.single_file if name else None)
    config = checkpoint.config.get("quantization_config")
    exporter: Exporter[Any] | None = None
    if manifest is not None or config is not None:
        method = config.get("quant_method") if config else None
        exporter = exporters.make(name or session.registry.reader_of(method))
    packed = exporter.format.stored_shapes(checkpoint) if exporter else {}
    view = find_packed_view(checkpoint, packed, session.registry, trust_remote_code=trusted)
    schemes, cache = {}, None
    if exporter is not None and config is not None:
        schemes = exporter.format.read_schemes(config, view)
        cache = exporter.format.read_cache(config)
    elif manifest is not None:
        schemes, cache = dict(manifest.schemes), manifest.kv_cache
    return Folder(checkpoint, view, manifest, exporter, schemes, cache, trusted)
