"""Opens a float or quantized folder, and reads its tensors with the format of its backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qplug.api import Exporter, ModelView, Reader
from qplug.api.scheme import QuantArgs, Scheme
from qplug.api.tensors import Checkpoint
from qplug.checkpoint.config_file import CONFIG
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.names import by_module, is_within, split_name
from qplug.checkpoint.open import open_checkpoint
from qplug.checkpoint.sources import read_as_float
from qplug.checkpoint.stacked import unstacked
from qplug.errors import QplugError
from qplug.files.damage import naming_damage
from qplug.machine.session import Session
from qplug.model.architectures import by_linear, find_packed_view, with_turned_matrices
from qplug.model.kv_cache import SCALES, STORED_SCALES
from qplug.model.queries import RoundedQueries
from qplug.model.skeleton import Skeleton
from qplug.model.view import refuse_quantized, with_embedding
from qplug.output.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Folder:
    """An open model folder, float or quantized.

    ``schemes``: the scheme of each quantized linear by module name, empty for a float folder.
    ``kv_cache``: how the folder says that keys and values are stored, None for float.
    ``exporter`` is None for a float folder, ``manifest`` if qplug did not write the folder.
    """

    checkpoint: Checkpoint
    view: ModelView
    manifest: Manifest | None
    exporter: Exporter[Any] | None
    schemes: dict[str, Scheme]
    kv_cache: QuantArgs | None = None
    trust_remote_code: bool = False

    @cached_property
    def _stored(self) -> dict[str, list[str]]:
        return by_module(self.checkpoint.tensors)  # cached: there may be a hundred thousand

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by its name in a float checkpoint.

        A quantized linear is yielded as its effective weight: the float32 weight ``[out, in]`` that
        an engine multiplies with.
        """
        packed: dict[str, dict[str, Tensor]] = {}
        for tensor in self.checkpoint.tensors:
            name, local = split_name(tensor)
            if name in self.schemes and local != "bias":
                packed.setdefault(name, {})[local] = self.checkpoint.read(tensor)
            elif self.kv_cache is None or local not in STORED_SCALES:
                yield tensor, self.checkpoint.read(tensor)
        for name, tensors in packed.items():
            yield f"{name}.weight", self._effective(name, tensors)

    def dequantized(self, name: str) -> Tensor:
        """The dequantized weight of the quantized linear ``name``, float32 ``[out, in]``."""
        assert self.exporter is not None
        with self.unpacking(name):
            return self.exporter.format.dequantize(self.packed(name), self.schemes[name])

    def _effective(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        assert self.exporter is not None
        with self.unpacking(name):
            return self.exporter.effective_weight(tensors, self.schemes[name])

    def unpacking(self, name: str) -> AbstractContextManager[None]:
        """A context in which the exporter takes the tensors of the linear ``name`` apart.

        Tensors that do not fit each other raise QplugError.
        """
        assert self.exporter is not None
        return naming_damage(f"{self.checkpoint.folder}: {name}", self.exporter.name)

    def float_names(self) -> set[str]:
        """The names of the tensors that a float checkpoint of the model has."""
        return {f"{name}.weight" for name in self.schemes}.union(self.checkpoint.tensors)

    def holds(self, parameter: str) -> bool:
        """Whether the folder stores ``parameter``, a name in the model, as a tensor or as codes."""
        name, local = split_name(parameter)
        return parameter in self.checkpoint.tensors or (local == "weight" and name in self.schemes)

    def parameter(self, name: str) -> Tensor:
        """The parameter ``name`` of the model, float32; a quantized weight as it is multiplied."""
        linear, local = split_name(name)
        if local == "weight" and linear in self.schemes:
            return self._effective(linear, self.packed(linear))
        return self.checkpoint.read(name).float()

    def packed(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of a quantized linear without its bias, by local name."""
        return {
            local: self.checkpoint.read(f"{name}.{local}")
            for local in self._stored.get(name, ())
            if local != "bias"
        }

    def input_scale(self, name: str) -> Tensor | None:
        """The scale of the static inputs of linear ``name``, float32 ``[1]``.

        None if the scheme has no static inputs. Raises QplugError if the folder lacks the scale.
        """
        if self.exporter is None or not self.schemes[name].static_inputs:
            return None
        stored = {
            local: self.checkpoint.read(f"{name}.{local}")
            for local in self._stored.get(name, ())
            if local.startswith("input_")
        }
        with self.unpacking(name):
            scale = self.exporter.format.input_scale(stored, self.schemes[name])
        if scale is None:
            raise QplugError(f"{name}: its inputs are static, but the folder has no scale for them")
        return scale

    def cache_scales(self) -> dict[int, tuple[Tensor, ...]]:
        """The scales of keys and of values, by the number of the block.

        Each is float32 ``[1]``, or ``[heads]`` if each head of keys and values has its own.

        Raises QplugError for a block that has not exactly one scale of keys and one of values.
        """
        scales = {}
        for number, block in enumerate(self.view.blocks):
            stored = [
                [n for n in self.checkpoint.tensors if is_within(block, n) and n.endswith(e)]
                for e in (f".{local}" for local in SCALES)
            ]
            if any(len(names) != 1 for names in stored):
                raise QplugError(f"{block}: needs exactly one {' and one '.join(SCALES)}")
            scales[number] = tuple(self.checkpoint.read(n).float().flatten() for (n,) in stored)
        return scales

    def queries(self) -> dict[str, RoundedQueries]:
        """How queries are rounded, by the module of attention; empty if they have no scales.

        Raises QplugError for scales that do not fit the heads of keys.
        """
        found = {}
        args, keys = self.kv_cache, self.cache_scales() if self.kv_cache is not None else {}
        for tensor in self.checkpoint.tensors if args is not None else ():
            name, local = split_name(tensor)
            if local != STORED_SCALES[-1]:
                continue
            for number in (
                n for n, block in enumerate(self.view.blocks) if is_within(block, tensor)
            ):
                assert args is not None
                scale, groups = self.checkpoint.read(tensor), keys[number][0].numel()
                if scale.numel() % groups:
                    raise QplugError(f"{tensor}: {scale.numel()} scales do not fit {groups} keys")
                found[name.removesuffix(".q_proj")] = RoundedQueries(args, scale, groups)
        return found


def open_folder(
    model: str,
    session: Session,
    *,
    backend: str | None = None,
    engine: str | None = None,
    or_float: bool = False,
) -> Folder:
    """Open a float or quantized model without reading its weights.

    ``model`` is a folder, a Hub id, or ``qplug:demo``. ``backend`` names the exporter that reads
    the folder; by default it is the one that wrote it, else one for its format. ``engine``: the
    version of the exporter's engine, by default the newest. A folder that
    another tool wrote, in a format that no exporter has, is opened as float if a reader reads it;
    with ``or_float`` also if its exporter refuses it. Raises QplugError if files are missing or
    damaged, or if neither an exporter nor a reader reads the folder's format.
    """
    folder = find_model(model)
    manifest = read_manifest(folder)
    exporters = session.registry.exporters
    name = backend or (manifest.backend if manifest else None)
    checkpoint = open_checkpoint(folder, exporters[name].format.single_file if name else None)
    is_foreign = name is None and Reader.quantization(checkpoint.config)
    if not is_foreign:
        return _opened(checkpoint, manifest, name, session, engine)
    config = checkpoint.config.get("quantization_config") or {}
    name = session.registry.backend_of(config.get("quant_method"))
    if name is not None:
        try:
            return _opened(checkpoint, None, name, session, engine)
        except QplugError:
            if not or_float:
                raise
    checkpoint = read_as_float(checkpoint, session.registry.sources)
    refuse_quantized(checkpoint)
    return _opened(checkpoint, None, None, session, None)


def _opened(
    checkpoint: Checkpoint,
    manifest: Manifest | None,
    backend: str | None,
    session: Session,
    engine: str | None,
) -> Folder:
    """Returns the folder of ``checkpoint``, read by the exporter ``backend`` if it is quantized."""
    folder, trusted = checkpoint.folder, session.trust_remote_code
    config = checkpoint.config.get("quantization_config")
    exporter: Exporter[Any] | None = None
    if backend is not None and (manifest is not None or config is not None):
        exporter = session.registry.exporters.make(backend, {"engine": engine} if engine else {})
    skeleton = Skeleton(folder, trust_remote_code=trusted)
    checkpoint = with_turned_matrices(checkpoint, session.registry, skeleton)
    with naming_damage(str(folder), exporter.name if exporter else ""):
        if exporter is not None:
            checkpoint = unstacked(checkpoint, exporter.format)
        packed = exporter.format.stored_shapes(checkpoint) if exporter else {}
    if exporter is None:
        checkpoint = by_linear(checkpoint, session.registry, skeleton)
    view = find_packed_view(checkpoint, packed, session.registry, skeleton)
    schemes, cache = {}, None
    if exporter is not None and config is not None:
        with naming_damage(f"{folder / CONFIG}: quantization_config", exporter.name):
            schemes = exporter.format.read_schemes(config, view)
            cache = exporter.format.read_cache(config)
    elif manifest is not None:
        schemes, cache = dict(manifest.schemes), manifest.kv_cache
        if view.embedding in schemes:  # floats that are to be measured as if they were codes
            view = with_embedding(view, checkpoint)
    return Folder(checkpoint, view, manifest, exporter, schemes, cache, trusted)
