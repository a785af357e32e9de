"""Changes the format of a quantized folder and keeps its codes, where both formats have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qplug.api import (
    Block,
    Checkpoint,
    CodedTensor,
    ComputedTensor,
    ModelView,
    QuantizedWeight,
    Reader,
)
from qplug.api.events import Result
from qplug.api.groups import dequantize
from qplug.api.scheme import QuantArgs, Scheme
from qplug.checkpoint.config_file import read_config
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.float_share import float_share
from qplug.recipe.recipe import DEFAULT_QUANTIZER, Recipe
from qplug.registry.registry import Registry
from qplug.run.quantize import SHARD_BYTES, run
from qplug.run.refuse import Decision
from qplug.run.stages import Stages
from qplug.run.watchers import Watcher

if TYPE_CHECKING:
    from torch import Tensor

_ASYMMETRIC = "_ASYM"
_CACHE = "the scales of the KV cache are not kept: engines compute with a float cache"
#: The word that a converted folder records in place of an algorithm.
CONVERT = "convert"


def convert(
    folder: str,
    out: str | Path,
    *,
    backend: str,
    backend_options: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    watch: Watcher | None = None,
) -> Result:
    """Write the quantized ``folder`` into the new folder ``out`` in the format of ``backend``.

    The codes and scales stay the same, to the bit, and each weight is checked as it is written:
    the dequantized float32 weights of both folders are equal. Symmetric codes become asymmetric
    ones where the backend stores only those, and the reverse if all zero points are the middle
    code. ``folder`` may be any that a reader reads; it need not be qplug's. The scales of a KV
    cache are not kept. If a run was killed, the same call continues it.

    Returns the folder, its size, and the distance of each weight from the float model that readers
    make of ``folder``, which rounds weights to its dtype. Raises QplugError if ``folder`` is not
    quantized, or if the backend has no place for its codes.
    """
    with (
        Session.joined("cpu", registry=registry, trust_remote_code=trust_remote_code) as session,
        session.registry.blaming(),
    ):
        path = session.processes.from_first(lambda: find_model(folder))
        source = open_checkpoint(path, readers=session.registry.sources)
        quantization = Reader.quantization(read_config(path))
        cache = any(quantization.get(key) for key in ("kv_cache_scheme", "kv_cache_quant_algo"))
        kinds = Counter(tensor.scheme for tensor in coded_linears(source, folder).values())
        recipe = Recipe(
            (DEFAULT_QUANTIZER,),
            kinds.most_common(1)[0][0],
            backend,
            backend_options=backend_options or {},
        )
        return run(
            folder,
            Path(out),
            KeptCodes(recipe, session, folder, (_CACHE,) if cache else ()),
            session,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            dry_run=dry_run,
            watch=watch or (lambda *_: None),
        )


class KeptCodes(Stages):
    """The stages of a run that keeps the codes of ``folder``, which is quantized."""

    def __init__(
        self, recipe: Recipe, session: Session, folder: str, notes: Sequence[str] = ()
    ) -> None:
        """Creates the exporter of ``recipe``. Raises QplugError if it stores no codes.

        ``notes`` are messages to the user.
        """
        super().__init__(recipe, session)
        self._instead = (
            f"quantize {folder} again: qplug quantize {folder} --backend {self.exporter.name}"
        )
        if self.exporter.format.stores_float:
            raise QplugError(f"{self.exporter.name}: stores float weights; {self._instead}")
        self.recipe = replace(self.recipe, algorithms=(CONVERT,))
        self._folder, self._notes = folder, notes
        self._coded: dict[str, CodedTensor] = {}
        self._schemes: dict[str, Scheme] = {}

    @property
    def needs_data(self) -> bool:
        """Whether data are needed: never, since the scales of inputs are kept too."""
        return False

    @property
    def efforts(self) -> None:
        """The time of a change of the format is not known."""
        return None

    @property
    def by_group(self) -> bool:
        """Whether input groups may come one after another: there are none."""
        return False

    def decide(self, source: Checkpoint, view: ModelView) -> Decision:
        """Returns the scheme of each linear that has codes, as the exporter stores it.

        A linear that the engine builds float is left out. Raises QplugError if the exporter has no
        place for the codes.
        """
        built_float = self.exporter.built_float(view)
        coded = coded_linears(source, self._folder)
        self._coded = {name: tensor for name, tensor in coded.items() if name not in built_float}
        sentences = []
        for symmetric in (None, False, True):
            self._schemes = {
                name: _with_zero_points(tensor.scheme, symmetric)
                for name, tensor in self._coded.items()
            }
            sentence = self.exporter.refuses(view, self._schemes)
            if sentence is None:
                share = float_share(view, self._schemes, lambda name: name in built_float)
                return Decision(self._schemes, {}, share)
            sentences.append(sentence)
        raise QplugError(f"{self.exporter.name}: {sentences[0]}; {self._instead}")

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """Returns the stored codes of the linears in ``block``.

        Raises QplugError if the exporter would store codes that stand for another weight.
        """
        first = next(iter(self._schemes))
        if any(linear.name == first for linear in block.linears):
            block.notes.extend(self._notes)
        return {linear.name: self._kept(linear.name) for linear in block.linears}

    def _kept(self, name: str) -> QuantizedWeight:
        scheme, layout = self._schemes[name], self.exporter.format
        stored = self._coded[name].codes()
        kept = _regridded(stored, scheme.weights)
        if kept is None:
            raise QplugError(
                f"{name}: {self.exporter.name} stores no zero points, and its zero points are not "
                f"all the middle code; {self._instead}"
            )
        if _is_exact(kept):
            with self._naming_in_errors(self.exporter, name):
                packed = layout.pack(kept, scheme, self._coded[name].spec.dtype)
                weight = layout.dequantize(packed, scheme)
                inputs = layout.input_scale(packed, scheme)
            if _is_same(weight, dequantize(stored)) and _is_same(inputs, stored.input_scale):
                return kept
        raise QplugError(
            f"{name}: {self.exporter.name} stores its scales otherwise, which would change the "
            f"weight; {self._instead}"
        )


def coded_linears(source: Checkpoint, folder: str) -> dict[str, CodedTensor]:
    """Returns the weights of ``source`` that are stored as codes, by linear.

    Raises QplugError if there are none, or if some are quantized in a way that no scheme describes.
    """
    coded = {}
    for name, tensor in source.tensors.items():
        if isinstance(tensor, CodedTensor):
            coded[name.removesuffix(".weight")] = tensor
        elif isinstance(tensor, ComputedTensor):
            raise QplugError(
                f"{folder}: {name} is quantized ({source.quantized}) as qplug stores no weight; "
                f"quantize it again: qplug quantize {folder}"
            )
    if not coded:
        state = "no weight has codes that can be kept" if source.quantized else "is not quantized"
        raise QplugError(f"{folder}: {state}; quantize it: qplug quantize {folder}")
    return coded


def _with_zero_points(scheme: Scheme, symmetric: bool | None) -> Scheme:
    """Returns ``scheme`` with weights of integers ``symmetric`` or not; None leaves it as it is."""
    weights = scheme.weights
    is_fixed = symmetric is None or weights.is_float or scheme.activations is not None
    if is_fixed or symmetric == weights.symmetric:
        return scheme
    name = scheme.name.removesuffix(_ASYMMETRIC) if symmetric else scheme.name + _ASYMMETRIC
    return Scheme(name, replace(weights, symmetric=bool(symmetric)))


def _regridded(weight: QuantizedWeight, args: QuantArgs) -> QuantizedWeight | None:
    """Returns ``weight`` with codes as ``args`` count them; None if they have no such codes."""
    if weight.args.symmetric == args.symmetric:
        return replace(weight, args=args)
    middle = 2 ** (args.bits - 1)
    if args.symmetric:
        if weight.zero is None or not (weight.zero == middle).all():
            return None
        codes = (weight.codes - middle).view(torch.int8)  # the wrap of bytes is intended
        return replace(weight, codes=codes, zero=None, args=args)
    codes = weight.codes.view(torch.uint8) + middle
    zero = torch.full_like(weight.scale, middle, dtype=torch.uint8)
    return replace(weight, codes=codes, zero=zero, args=args)


def _is_exact(weight: QuantizedWeight) -> bool:
    """Whether scales with two levels are what formats store: e4m3 times the global scale."""
    if weight.global_scale is None:
        return True
    ratio = weight.scale / weight.global_scale
    return torch.equal(ratio.to(torch.float8_e4m3fn).float(), ratio)


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two float32 tensors are equal to the bit; None is equal to None alone."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))
