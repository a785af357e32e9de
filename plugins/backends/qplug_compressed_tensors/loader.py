"""How loaders of engines read compressed-tensors folders: data, which rules ask for.

An engine has a row for each release whose loader differs from the release before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

#: What a plain entry of ``ignore`` must be of a module's name: the whole name, the end of it after
#: a dot, or any part of it.
Plain: TypeAlias = Literal["whole", "end", "part"]


def plain_match(entry: str, name: str, plain: Plain) -> bool:
    """Whether the plain ``entry`` matches the module ``name`` as ``plain`` says."""
    if plain == "part":
        return entry in name
    return entry == name or (plain == "end" and name.endswith(f".{entry}"))


@dataclass(frozen=True)
class Loader:
    """A row: what a loader of compressed-tensors folders reads; the defaults refuse only heads.

    ``plain``: how plain entries of ``ignore`` match. ``own_formats``: whether the format that a
    group has of its own counts; otherwise all groups have the format of the folder.
    ``one_format_for_experts``: formats that experts may have only if the whole folder has them.
    ``classes_first``: whether a target that is a class, ``Linear``, comes before the names of the
    parts of merged matrices. ``heads``: the formats in which a head is loaded. ``unread``: formats
    that are not loaded. ``caches``: the strategies of stored scales of a KV cache that are read;
    ``cache_models``: the architectures of config.json whose scales are read, None for all.
    ``int8_experts``: whether experts run with int8 weights and int8 inputs. ``fp8_a16_experts``:
    whether they do with fp8 weights and float inputs. ``row_experts``: the
    schemes of packed integers, with devices, in which experts run that have one scale a row; None
    for all. ``embeddings``: the architectures whose embedding is looked up if it is quantized,
    None for all; ``unnamed_embeddings``: those among them that are found by their class alone.
    ``int4_in_bytes``: whether integers of fewer than 8 bits run that fill a byte each;
    ``weights_in_bytes``: whether integers of any width do whose inputs are float. ``source`` is
    where this was read.
    """

    plain: Plain = "whole"
    own_formats: bool = True
    one_format_for_experts: frozenset[str] = frozenset()
    classes_first: bool = False
    heads: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    caches: frozenset[str] = frozenset({"tensor"})
    cache_models: frozenset[str] | None = None
    int8_experts: bool = True
    fp8_a16_experts: bool = True
    row_experts: frozenset[tuple[str, str]] | None = None
    embeddings: frozenset[str] | None = None
    unnamed_embeddings: frozenset[str] = frozenset()
    int4_in_bytes: bool = True
    weights_in_bytes: bool = True
    source: str = ""


#: What holds for every loader: the backend of the bare format has no other row.
COMMON = Loader(classes_first=True, caches=frozenset({"tensor", "attn_head"}))

#: Rows by release (``SGLang 0.5.23``), as in ``Engine.releases``. A release without a row has the
#: row of the next older one.
Loaders: TypeAlias = Mapping[str, Loader]
