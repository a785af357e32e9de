"""The rules of compressed-tensors folders and of their loaders, checked on the files alone.

A rule is a function that yields the problems it finds. Its docstring states what must be true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qplug import (
    Capability,
    Format,
    ModelView,
    Problem,
    QuantArgs,
    Scheme,
    TensorSpec,
    kernel_problems,
)
from qplug_compressed_tensors import byte_codes
from qplug_compressed_tensors.configuration import (
    EMBEDDING,
    FLOAT_QUANTIZED,
    INT_QUANTIZED,
    MXFP4_PACKED,
    MXFP8_QUANTIZED,
    NAIVE_QUANTIZED,
    NVFP4_PACKED,
    PACK_QUANTIZED,
    Configuration,
    cache_of,
    format_of,
    matches,
    stores,
)
from qplug_compressed_tensors.fusing import fused_problems
from qplug_compressed_tensors.loader import Loader

if TYPE_CHECKING:
    from torch import Tensor

    from qplug import Checkpoint

_FORMATS = (
    *(PACK_QUANTIZED, INT_QUANTIZED, FLOAT_QUANTIZED, NAIVE_QUANTIZED),
    *(NVFP4_PACKED, MXFP4_PACKED, MXFP8_QUANTIZED),
)
_FLOATS = ("bfloat16", "float16", "float32")
_SCALES = ("weight_scale", "input_scale", "weight_global_scale", "input_global_scale")
_ONE = {(), (1,)}  # a single number may have an axis or none: loaders reshape it
_CACHE_SCALES = ("k_scale", "v_scale")
_QUERY_SCALE = "q_scale"
_CACHE = QuantArgs("e4m3", "tensor")
_CACHE_BY_HEAD = QuantArgs("e4m3", "attn_head")


@dataclass(frozen=True)
class Case:
    """A folder to check, with its configuration.

    ``kernels``: the kernels of the engine whose loader is checked; empty to check no limits.
    ``loader``: what this loader reads; ``engine`` is its name in messages.
    """

    folder: Checkpoint
    model: ModelView
    config: Configuration
    format: Format
    kernels: Sequence[Capability] = ()
    loader: Loader = field(default_factory=Loader)
    engine: str = "an engine"

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each linear that the configuration quantizes, by name."""
        groups = {name: self.config.group(name) for name in self.model.linears}
        return {name: group.scheme for name, group in groups.items() if group is not None}

    def layout(self, name: str) -> dict[str, TensorSpec]:
        """The tensors of the quantized linear ``name``, by local name, in its group's format."""
        scheme, shape = self.schemes[name], self.model.linears[name]
        if self.fills_bytes(name):
            return byte_codes.layout(shape, scheme)
        return self.format.layout(shape, scheme, self.model.dtype)

    def fills_bytes(self, name: str) -> bool:
        """Whether config.json says that the codes of linear ``name`` fill a byte each.

        The format of its group does so for codes of any width.
        """
        group = self.config.group(name)
        if group is None or group.format not in (INT_QUANTIZED, NAIVE_QUANTIZED):
            return False
        return stores(group.format, group.scheme)

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
        if group.format not in _FORMATS or not stores(group.format, group.scheme):
            where, fitting = ", ".join(group.targets), format_of(group.scheme)
            yield Problem(
                "format", where, f"{group.format!r} does not store {group.scheme.name} ({fitting})"
            )


def codes_are_laid_out(case: Case) -> Iterator[Problem]:
    """A quantized linear has exactly the tensors of its layout, in their dtypes and shapes."""
    for name, scheme in case.schemes.items():
        present = case.present.get(name, {})
        layout = case.layout(name)
        for local in sorted(layout.keys() - present.keys()):
            yield Problem("missing", name, f"there is no {local}")
        for local in sorted(present.keys() - layout.keys()):
            yield Problem("unexpected", name, f"{local} does not belong to {scheme.name}")
        for local in sorted(present.keys() & layout.keys()):
            stored, planned = case.folder.tensors[present[local]].spec, layout[local]
            if stored.shape != planned.shape and not {stored.shape, planned.shape} <= _ONE:
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
    schemes = without_embedding(case.model, case.schemes)
    yield from kernel_problems(case.model, schemes, case.kernels)


def head_is_as_the_loader_takes_it(case: Case) -> Iterator[Problem]:
    """Outside the decoder blocks only a head is quantized, in a format that the loader has for it.

    Engines do not class a head as ``Linear``: without a target of its own, its codes have no place.
    """
    for name, scheme in case.schemes.items():
        if name in case.model.quantizable or name == case.model.embedding:
            continue
        if name != case.model.head:
            yield Problem("head", name, "is a router, and must stay float")
        elif not loads_head(case.loader, scheme):
            yield Problem("head", name, f"{case.engine} does not load a head in {scheme.name}")
        elif not any(matches(target, name) for g in case.config.groups for target in g.targets):
            sentence = f"is named in no config group: {case.engine} cannot place its codes"
            yield Problem("head", name, sentence)


def loads_head(loader: Loader, scheme: Scheme) -> bool:
    """Whether ``loader`` loads a head in ``scheme``: scales of blocks do not fit a vocabulary."""
    return format_of(scheme) in loader.heads and scheme.weights.strategy != "block"


def embedding_is_as_the_loader_takes_it(case: Case) -> Iterator[Problem]:
    """An embedding is quantized only as the loader looks it up, and with a target that it finds."""
    name = case.model.embedding
    if name is None or name not in case.schemes:
        return
    sentence = refuses_embedding(case.loader, case.model, case.schemes[name])
    if sentence is None and case.model.is_tied(name):
        sentence = "computes the head with the same tensor, which has to be float"
    if sentence is not None:
        yield Problem("embedding", name, f"{case.engine} {sentence}")
        return
    group, models = case.config.group(name), architectures(case.model)
    by_class = group is not None and EMBEDDING in group.targets
    if not by_class and models & case.loader.unnamed_embeddings:
        sentence = f"needs the target {EMBEDDING}: {case.engine} builds that of {min(models)}"
        yield Problem("embedding", name, f"{sentence} without a name")


def refuses_embedding(loader: Loader, model: ModelView, scheme: Scheme) -> str | None:
    """Why ``loader`` does not take a quantized embedding of ``model``, as the end of a sentence."""
    weights, models = scheme.weights, architectures(model)
    if loader.embeddings is None:
        return None
    if not loader.embeddings:
        return "serves no quantized embedding"
    if not models & loader.embeddings:
        return f"builds the embedding of {', '.join(sorted(models)) or 'this model'} float"
    whole = weights.bits in (2, 4, 8)  # it looks for the codes of a column in one word
    if format_of(scheme) != PACK_QUANTIZED or not (weights.symmetric and whole):
        return f"looks up embeddings in W2A16, W4A16 or W8A16, not {scheme.name}"
    return None


def without_embedding(model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """Returns ``schemes`` without that of the embedding, which no kernel multiplies with."""
    return {name: scheme for name, scheme in schemes.items() if name != model.embedding}


def architectures(model: ModelView) -> set[str]:
    """The architectures that config.json names."""
    return {str(name) for name in model.config.get("architectures") or ()}


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
    yield from cache_problems(case.folder, case.model, args)


def cache_problems(
    folder: Checkpoint, model: ModelView, args: QuantArgs | None
) -> Iterator[Problem]:
    """Yields what is wrong with the scales of the KV cache, which config.json stores as ``args``.

    ``args``: None if config.json says that the cache is float.
    """
    stored = {
        block: [
            tensor
            for tensor in folder.tensors
            if tensor.startswith(f"{block}.")
            and tensor.rpartition(".")[2] in (*_CACHE_SCALES, _QUERY_SCALE)
        ]
        for block in model.blocks
    }
    if args is None:
        for tensor in sorted(name for names in stored.values() for name in names):
            yield Problem("unexpected", tensor, "config.json has no cache for it")
        return
    if args not in (_CACHE, _CACHE_BY_HEAD):
        yield Problem(
            "cache",
            "config.json",
            f"no engine reads a KV cache of {args.dtype} per {args.strategy}",
        )
        return
    for block, names in stored.items():
        keys_and_values = [name for name in names if not name.endswith(f".{_QUERY_SCALE}")]
        local = sorted(name.rpartition(".")[2] for name in keys_and_values)
        if local != sorted(_CACHE_SCALES) or len({_attention_of(name) for name in names}) != 1:
            present = " and ".join(sorted(n.removeprefix(f"{block}.") for n in names)) or "none"
            yield Problem("missing", block, f"needs one k_scale and one v_scale, but has {present}")
        for name in sorted(names):
            spec, count = folder.tensors[name].spec, 1
            if args == _CACHE_BY_HEAD:
                count = _heads(model, of_queries=name.endswith(f".{_QUERY_SCALE}"))
            shapes = ((count,), (count, 1, 1), *(((),) if count == 1 else ()))
            if spec.dtype not in _FLOATS or spec.shape not in shapes:
                stated = f"is {spec.dtype} {list(spec.shape)}, not float32 [{count}]"
                yield Problem("shape", name, stated)
            elif not _is_sound(folder.read(name)):
                yield Problem("scale", name, "a scale is zero, negative, or not finite")


def _attention_of(scale: str) -> str:
    """The module of attention of the scale of a cache, which ModelOpt stores in ``k_proj``."""
    module, _, local = scale.rpartition(".")
    return module.removesuffix(f".{local[0]}_proj")


def text_part(model: ModelView) -> Mapping[str, Any]:
    """The part of config.json on the language model; all of it if there is no such part."""
    inner = model.config.get("text_config")
    return inner if isinstance(inner, Mapping) else model.config


def _heads(model: ModelView, *, of_queries: bool) -> int:
    """The number of heads of queries, or of keys and values, by config.json."""
    text = text_part(model)
    heads = text.get("num_attention_heads")
    found = heads if of_queries else text.get("num_key_value_heads") or heads
    return found if type(found) is int else 1


def cache_scales_are_read(case: Case) -> Iterator[Problem]:
    """If the KV cache has stored scales, the loader reads them: others are dropped in silence."""
    args = cache_of(case.folder.config["quantization_config"])
    if args is not None and args.strategy not in case.loader.caches:
        sentence = f"{case.engine} ignores this kv_cache_scheme and drops its scales"
        yield Problem("cache", "config.json", sentence)
    elif args is not None and (name := without_cache_scales(case.loader, case.model)):
        yield Problem("cache", "config.json", f"{case.engine} drops the scales of {name}")


def without_cache_scales(loader: Loader, model: ModelView) -> str | None:
    """The architecture of ``model`` if ``loader`` drops the scales of its cache, else None."""
    names = [str(name) for name in model.config.get("architectures") or ()]
    if loader.cache_models is None or not names or loader.cache_models & {*names}:
        return None
    return names[0]


def formats_of_groups_count(case: Case) -> Iterator[Problem]:
    """All groups have the format of the folder, where the loader ignores the formats of groups.

    Some loaders have this limit for experts alone.
    """
    loader = case.loader
    global_format = case.folder.config["quantization_config"].get("format")
    for group in case.config.groups:
        if not loader.own_formats and group.format != global_format:
            sentence = f"{case.engine} ignores a group's own format"
            yield Problem("format", ", ".join(group.targets), sentence)
    for name, scheme in case.schemes.items():
        one = ".experts." in name and format_of(scheme) in loader.one_format_for_experts
        if one and global_format != format_of(scheme):
            sentence = f"{case.engine} runs experts in {scheme.name} only if the whole folder is so"
            yield Problem("format", name, f"{sentence}: format is {global_format}")


def formats_are_read(case: Case) -> Iterator[Problem]:
    """The loader reads the formats of all linears."""
    for name, scheme in case.schemes.items():
        if format_of(scheme) in case.loader.unread:
            yield Problem("format", name, f"{case.engine} does not load {format_of(scheme)}")
        elif case.fills_bytes(name) and not scheme.weights.is_float:
            narrow, alone = scheme.weights.bits < 8, scheme.activations is None
            loader, group = case.loader, case.config.group(name)
            if (narrow and not loader.int4_in_bytes) or (alone and not loader.weights_in_bytes):
                layout = "bytes" if group is None else group.format
                sentence = f"{case.engine} does not run {scheme.name} in {layout}"
                yield Problem("format", name, f"{sentence}; pack the codes with qplug convert")


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
    formats_are_read,
    formats_of_groups_count,
    fused_linears_agree,
    head_is_as_the_loader_takes_it,
    embedding_is_as_the_loader_takes_it,
    cache_scales_are_read,
    kernels_take_the_shapes,
)
