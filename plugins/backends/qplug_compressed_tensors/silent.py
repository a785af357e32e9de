"""What engines load without a word, or with one that misleads, and then serve wrongly.

Rules like those in ``qplug_compressed_tensors.rules``; each stands for failures that users met.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qplug import Problem
from qplug_compressed_tensors.fusing import fused_groups, merged_matrices, with_merged_names
from qplug_compressed_tensors.rules import Case, Rule

#: The fields of compressed-tensors' QuantizationArgs that the oldest supported engines know.
_FIELDS = frozenset(
    (
        *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"),
        *("actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
    )
)
#: Orders of columns that need nothing at load. Others are refused by vLLM from 0.32 on.
_ORDERS = (None, False, "static", "weight")
#: What is wrong with the parts of a ``quantization_config`` that qplug never writes.
_PARTS = {
    "transform_config": "asks for rotations as the model runs, which SGLang leaves out in silence",
    "sparsity_config": "asks for sparse weights, which engines no longer read",
}


def config_is_understood(case: Case) -> Iterator[Problem]:
    """Nothing in the configuration is newer, or older, than the engines that read it."""
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
            yield Problem("config", f"{where}.{field}", "is a field that engines may not know")
    if args.get("actorder") not in _ORDERS:
        yield Problem(
            "config", f"{where}.actorder", f"{args['actorder']!r} needs weight_g_idx: no longer run"
        )


def merged_linears_keep_their_group(case: Case) -> Iterator[Problem]:
    """No group by class takes what another group means by the names of its parts.

    Engines look for q, k and v under the name of the matrix that they make of them, then under its
    class, and only then (vLLM before 0.32, SGLang) under the names of its parts.
    """
    by_class = [group for group in case.config.groups if "Linear" in group.targets]
    if not by_class:
        return
    for names in fused_groups(case.model.linears):
        group = case.config.group(names[0])
        if group is not None and group.scheme != by_class[0].scheme:
            told = f"is meant to be {group.scheme.name}, but `Linear` is matched first"
            yield Problem("order", ", ".join(names[:3]), told)


def merged_matrices_are_named(case: Case) -> Iterator[Problem]:
    """What holds for q, k and v holds for ``qkv_proj`` by its own name, and so for others.

    SGLang asks for the merged matrix, and of most models it does not know of what that is made.
    """
    for parts in merged_matrices(name for name in case.model.linears if ".experts." not in name):
        said = case.config.group(parts[0])
        for name in with_merged_names(parts)[len(parts) :]:
            if case.config.group(name) != said:
                told = "is not ignored as" if said is None else "is in no group, or in another than"
                yield Problem("merged", name, f"{told} {', '.join(parts)} are: SGLang looks for it")


def ignored_names_are_linears(case: Case) -> Iterator[Problem]:
    """No entry of ``ignore`` names a part of a linear: it is the linear that engines look for."""
    for entry in case.config.ignore:
        if entry.rpartition(".")[0] in case.model.linears:
            yield Problem("ignore", entry, "names a part of a linear, so the linear is not ignored")


def embedding_is_float(case: Case) -> Iterator[Problem]:
    """Embeddings are a plain table: SGLang serves memory that nobody filled where they are not."""
    for name, found in case.present.items():
        if name not in case.model.linears and "weight_scale" in found:
            yield Problem("embedding", name, "is no linear, so it must not be quantized")


#: Rules of every engine.
SILENT: tuple[Rule, ...] = (
    config_is_understood,
    merged_linears_keep_their_group,
    ignored_names_are_linears,
    embedding_is_float,
)


def int8_experts_have_no_kernel(case: Case) -> Iterator[Problem]:
    """SGLang has no product of experts in int8 with inputs in int8 for compressed-tensors."""
    for name, scheme in case.schemes.items():
        inputs = scheme.activations
        if ".experts." in name and inputs is not None and inputs.dtype == "int8":
            yield Problem("kernel", name, f"SGLang runs no experts in {scheme.name}")
