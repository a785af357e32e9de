"""The rules of compressed-tensors folders and of their loaders, checked on the files alone.

A rule is a function that yields the problems it finds. Its docstring states what must be true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from qplug import (
    Capability,
    Format,
    ModelView,
    Problem,
    QuantArgs,
    Scheme,
    kernel_problems,
)
from qplug_compressed_tensors.configuration import (
    FLOAT_QUANTIZED,
    INT_QUANTIZED,
    MXFP4_PACKED,
    MXFP8_QUANTIZED,
    NVFP4_PACKED,
    PACK_QUANTIZED,
    Configuration,
    cache_of,
    format_of,
)
from qplug_compressed_tensors.fusing import fused_problems

if TYPE_CHECKING:
    from torch import Tensor

    from qplug import Checkpoint

_FORMATS = (
    *(PACK_QUANTIZED, INT_QUANTIZED, FLOAT_QUANTIZED),
    *(NVFP4_PACKED, MXFP4_PACKED, MXFP8_QUANTIZED),
)
_FLOATS = ("bfloat16", "float16", "float32")
_SCALES = ("weight_scale", "input_scale", "weight_global_scale", "input_global_scale")
_CACHE_SCALES = ("k_scale", "v_scale")
_CACHE = QuantArgs("e4m3", "tensor")


@dataclass(frozen=True)
class Case:
    """A folder to check, with its configuration.

    ``kernels``: the kernels of the engine whose loader is checked; empty to check no limits.
    """

    folder: Checkpoint
    model: ModelView
    config: Configuration
    format: Format
    kernels: Sequence[Capability] = ()

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each linear that the configuration quantizes, by name."""
        groups = {name: self.config.group(name) for name in self.model.linears}
        return {name: group.scheme for name, group in groups.items() if group is not None}

    @cached_property
    def present(self) -> dict[str, dict[str, str]]:
        """Full names of the tensors of weights and inputs, by module name and then local name."""
        tensors: dict[str, dict[str, str]] = {}
        for tensor in self.folder.tensors:
            name, _, local = tensor.rpartition(".")
            if local.startswith(("weight", "input_")):
                tensors.setdefault(name, {})[local] = tensor
        return tensors


Rule = Callable[[Case], Iterator[Problem]]


def known_format(case: Case) -> Iterator[Problem]:
    """The format of each group can store the group's scheme."""
    for group in case.config.groups:
        fitting = format_of(group.scheme)
        if group.format not in _FORMATS or group.format != fitting:
            where = ", ".join(group.targets)
            yield Problem(
                "format", where, f"{group.format!r} does not store {group.scheme.name} ({fitting})"
            )


def codes_are_laid_out(case: Case) -> Iterator[Problem]:
    """A quantized linear has exactly the tensors of its layout, in their dtypes and shapes."""
    for name, scheme in case.schemes.items():
        present = case.present.get(name, {})
        layout = case.format.layout(case.model.linears[name], scheme, case.model.dtype)
        for local in sorted(layout.keys() - present.keys()):
            yield Problem("missing", name, f"there is no {local}")
        for local in sorted(present.keys() - layout.keys()):
            yield Problem("unexpected", name, f"{local} does not belong to {scheme.name}")
        for local in sorted(present.keys() & layout.keys()):
            stored, planned = case.folder.tensors[present[local]].spec, layout[local]
            if stored.shape != planned.shape:
                yield Problem(
                    "shape", name, f"{local} is {list(stored.shape)}, not {list(planned.shape)}"
                )
            loose = local in _SCALES and planned.dtype in _FLOATS
            allowed = _FLOATS if loose else (planned.dtype,)
            if stored.dtype not in allowed:
                yield Problem("dtype", name, f"{local} is {stored.dtype}, not {planned.dtype}")


def floats_are_float(case: Case) -> Iterator[Problem]:
    """A linear that is not quantized has float weights, and no scales."""
    for name in case.model.linears:
        if name in case.schemes:
            continue
        present = case.present.get(name, {})
        for local in sorted(present.keys() - {"weight"}):
            dtype = case.folder.tensors[present[local]].spec.dtype
            if dtype in _FLOATS and "scale" not in local:
                continue  # some routers have two float weights
            yield Problem("ignore", name, f"config.json says it is float, but it has {local}")
        if "weight" in present:
            dtype = case.folder.tensors[f"{name}.weight"].spec.dtype
            if dtype not in _FLOATS:
                yield Problem("ignore", name, f"config.json says it is float, but it is {dtype}")


def float_linears_are_ignored(case: Case) -> Iterator[Problem]:
    """``ignore`` names every linear without a group: otherwise SGLang fails and vLLM guesses."""
    for name in case.model.linears:
        if name not in case.schemes and not case.config.ignored(name):
            yield Problem("ignore", name, "is neither in a config group nor in ignore")
    head = case.model.head
    if head is not None and head not in case.model.linears and case.config.group(head) is not None:
        yield Problem("ignore", head, "is tied to the embedding, but not in ignore")


def fused_linears_agree(case: Case) -> Iterator[Problem]:
    """Linears that engines merge share one scheme, or are all float."""
    yield from fused_problems(case.model.linears, case.schemes)


def kernels_take_the_shapes(case: Case) -> Iterator[Problem]:
    """The kernel for each weight takes the weight's shape."""
    yield from kernel_problems(case.model, case.schemes, case.kernels)


def head_and_embedding_are_float(case: Case) -> Iterator[Problem]:
    """Heads, embeddings and routers are float: SGLang serves garbage if they are quantized."""
    for name in case.schemes:
        if name not in case.model.quantizable:
            yield Problem("head", name, "is a head or a router, and must stay float")


def numbers_are_sound(case: Case) -> Iterator[Problem]:
    """Scales are finite and positive, and ``weight_shape`` is the shape of the linear."""
    for name in case.schemes:
        for local in (*_SCALES, "weight_shape"):
            if f"{name}.{local}" not in case.folder.tensors:
                continue
            values = case.folder.read(f"{name}.{local}")
            if local in _SCALES and not _is_sound(values):
                yield Problem("scale", name, "a scale is zero, negative, or not finite")
            shape = list(case.model.linears[name])
            if local == "weight_shape" and values.flatten().tolist() != shape:
                yield Problem(
                    "weight_shape", name, f"is {values.tolist()}, but the layer is {shape}"
                )


def _is_sound(scales: Tensor) -> bool:
    return bool((scales.float().isfinite() & (scales.float() > 0)).all())


def cache_scales_are_whole(case: Case) -> Iterator[Problem]:
    """If the KV cache has a scheme, every block has one scale of keys and one of values."""
    args = cache_of(case.folder.config["quantization_config"])
    stored = {
        block: [
            tensor
            for tensor in case.folder.tensors
            if tensor.startswith(f"{block}.") and tensor.rpartition(".")[2] in _CACHE_SCALES
        ]
        for block in case.model.blocks
    }
    if args is None:
        for tensor in sorted(name for names in stored.values() for name in names):
            yield Problem("unexpected", tensor, "config.json has no kv_cache_scheme for it")
        return
    if args != _CACHE:
        yield Problem(
            "cache",
            "config.json",
            f"no engine reads a KV cache of {args.dtype} per {args.strategy}",
        )
        return
    for block, names in stored.items():
        local = sorted(name.rpartition(".")[2] for name in names)
        if local != sorted(_CACHE_SCALES) or len({n.rpartition(".")[0] for n in names}) != 1:
            present = " and ".join(sorted(n.removeprefix(f"{block}.") for n in names)) or "none"
            yield Problem("missing", block, f"needs one k_scale and one v_scale, but has {present}")
        for name in sorted(names):
            spec = case.folder.tensors[name].spec
            if spec.dtype not in _FLOATS or spec.shape not in ((), (1,)):
                yield Problem("shape", name, f"is {spec.dtype} {list(spec.shape)}, not float32 [1]")
            elif not _is_sound(case.folder.read(name)):
                yield Problem("scale", name, "a scale is zero, negative, or not finite")


def no_cache_scales(case: Case) -> Iterator[Problem]:
    """The folder has no scales of a KV cache: SGLang drops them in silence."""
    if cache_of(case.folder.config["quantization_config"]) is not None:
        yield Problem("cache", "config.json", "SGLang ignores kv_cache_scheme and drops its scales")


def one_format(case: Case) -> Iterator[Problem]:
    """All groups have the global format: SGLang ignores the formats of groups."""
    global_format = case.folder.config["quantization_config"].get("format")
    for group in case.config.groups:
        if group.format != global_format:
            yield Problem("format", ", ".join(group.targets), "SGLang ignores a group's own format")


#: Rules of the format: the stored tensors agree with the configuration.
FORMAT_RULES: tuple[Rule, ...] = (
    known_format,
    codes_are_laid_out,
    floats_are_float,
    numbers_are_sound,
    cache_scales_are_whole,
)
#: Rules of every engine, in the order in which a loader would fail.
LOADER_RULES: tuple[Rule, ...] = (
    float_linears_are_ignored,
    fused_linears_agree,
    kernels_take_the_shapes,
)
