"""Rules for folders that engines load without an error, or with a misleading one, and serve wrong.

They are rules as in ``qplug_compressed_tensors.rules``; each comes from failures that users met.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qplug import Problem, Scheme
from qplug_compressed_tensors.configuration import NAIVE_QUANTIZED, format_of
from qplug_compressed_tensors.fusing import fused_groups, merged_matrices, with_merged_names
from qplug_compressed_tensors.loader import Loader
from qplug_compressed_tensors.rules import Case, Rule

#: The fields of compressed-tensors' QuantizationArgs that the oldest supported engines know.
_FIELDS = frozenset(
    (
        *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"),
        *("actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
    )
)
#: Orders of columns that need no extra tensor. vLLM refuses all others from 0.32 on.
_ORDERS = (None, False, "static", "weight")
#: Why a ``quantization_config`` must not contain these parts, which qplug never writes.
_PARTS = {
    "transform_config": "asks for rotations as the model runs, which SGLang skips in silence",
    "sparsity_config": "asks for sparse weights, which engines no longer read",
}


def config_is_understood(case: Case) -> Iterator[Problem]:
    """The configuration contains no part or field that an engine ignores or no longer reads."""
    config = case.folder.config["quantization_config"]
    for part, sentence in _PARTS.items():
        if config.get(part):
            yield Problem("config", part, sentence)
    for name, group in config["config_groups"].items():
        for kind in ("weights", "input_activations"):
            yield from _fields(f"{name}.{kind}", group.get(kind) or {})


def _fields(where: str, args: Mapping[str, Any]) -> Iterator[Problem]:
    for field in sorted(args.keys() - _FIELDS):
        if args[field] is not None:
            yield Problem("config", f"{where}.{field}", "is unknown to some engines")
    if args.get("actorder") not in _ORDERS:
        yield Problem(
            "config",
            f"{where}.actorder",
            f"{args['actorder']!r} needs weight_g_idx, which engines no longer support",
        )


def merged_linears_keep_their_group(case: Case) -> Iterator[Problem]:
    """A group for the class ``Linear`` matches no merged matrix that belongs to another group.

    Engines look up q, k and v by the name of their merged matrix. Some look it up by its class
    next, and only then by their own names.
    """
    if not case.loader.classes_first:
        return
    by_class = [group for group in case.config.groups if "Linear" in group.targets]
    if not by_class:
        return
    for names in fused_groups(case.model.linears):
        group = case.config.group(names[0])
        if group is not None and group.scheme != by_class[0].scheme:
            what = f"is meant to be {group.scheme.name}, but engines match `Linear` first"
            yield Problem("order", ", ".join(names[:3]), what)


def merged_matrices_are_named(case: Case) -> Iterator[Problem]:
    """A merged matrix such as ``qkv_proj`` is in the same group as its members, by its own name.

    SGLang looks up the merged matrix, and for most models it does not know its members.
    """
    for members in merged_matrices(name for name in case.model.linears if ".experts." not in name):
        group, names = case.config.group(members[0]), ", ".join(members)
        for name in with_merged_names(members)[len(members) :]:
            if case.config.group(name) != group:
                verb = "be in ignore" if group is None else "be in the same config group"
                yield Problem("merged", name, f"must {verb} like {names}: SGLang looks it up")


def ignored_names_are_linears(case: Case) -> Iterator[Problem]:
    """No entry of ``ignore`` names a tensor of a linear: engines look up the linear itself."""
    for entry in case.config.ignore:
        if entry.rpartition(".")[0] in case.model.linears:
            yield Problem("ignore", entry, "names a tensor, not a linear, so it ignores no linear")


def embedding_is_float(case: Case) -> Iterator[Problem]:
    """Embeddings are float: SGLang serves uninitialized memory for a quantized embedding."""
    for name, present in case.present.items():
        if name not in case.model.linears and "weight_scale" in present:
            yield Problem("embedding", name, "is no linear, so it must not be quantized")


def merged_scales_agree(case: Case) -> Iterator[Problem]:
    """Linears that engines merge have one global scale: engines keep one, or refuse the folder."""
    for names in merged_matrices(case.schemes):
        for local in ("weight_global_scale", "input_global_scale"):
            tensors = [f"{name}.{local}" for name in names]
            if all(tensor in case.folder.tensors for tensor in tensors):
                values = {case.folder.read(tensor).flatten()[0].item() for tensor in tensors}
                if len(values) > 1:
                    yield Problem("fused", ", ".join(names), f"have more than one {local}")


def experts_have_a_kernel(case: Case) -> Iterator[Problem]:
    """No expert has int8 inputs, or float inputs of fp8, unless the engine has kernels for them."""
    for name, scheme in case.schemes.items():
        if lacks_expert(case.loader, name, scheme):
            yield Problem("kernel", name, f"{case.engine} runs no experts in {scheme.name}")


def lacks_expert(loader: Loader, name: str, scheme: Scheme) -> bool:
    """Whether the linear ``name`` is of an expert in a ``scheme`` that ``loader`` has no place for.

    Loaders place experts by weights and inputs, apart from dense linears.
    """
    inputs = scheme.activations
    if ".experts." not in name:
        return False
    if inputs is None:
        return format_of(scheme) == NAIVE_QUANTIZED and not loader.fp8_a16_experts
    return inputs.dtype == "int8" and not loader.int8_experts


#: The rules of this module that hold for every engine.
SILENT: tuple[Rule, ...] = (
    config_is_understood,
    merged_linears_keep_their_group,
    ignored_names_are_linears,
    embedding_is_float,
    merged_scales_agree,
    experts_have_a_kernel,
)
