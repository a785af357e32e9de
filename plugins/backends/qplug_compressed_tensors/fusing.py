"""Finds the linears that engines merge into one matrix when they load a model.

Engines merge linears by name. The table of this module is the only one that knows these names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from qplug import Problem, Scheme


@dataclass(frozen=True)
class Merge:
    """A row: linears with the names ``members`` in one module are one matrix in an engine.

    ``names`` are the names that engines give to the matrix, and look up. With ``whole`` the linears
    are merged only if the module has all of them, since their names are common. ``parents`` are the
    names of the modules that merge them; empty for all.
    """

    members: tuple[str, ...]
    names: tuple[str, ...]
    whole: bool = False
    parents: tuple[str, ...] = ()


#: What decoder blocks merge in vLLM 0.32, by ``packed_modules_mapping`` and ``load_weights`` in
#: models/*.py, and in SGLang 0.5.16 to 0.5.23, by the stacked parameters of models/*.py. The first
#: row that fits a linear holds for it. What engines merge only without quantization is left out.
MERGES = (
    Merge(  # vLLM models/kimi_k3
        ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "f_a_proj"),
        ("in_proj_qkvgfab",),
        whole=True,
    ),
    Merge(  # vLLM olmo_hybrid.py
        ("q_proj", "k_proj", "v_proj", "g_proj"),
        ("in_proj_qkvg",),
        whole=True,
        parents=("linear_attn",),
    ),
    Merge(  # vLLM models/minimax_m3: its sparse attention has an indexer inside
        ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"),
        ("qkv_proj",),
        whole=True,
    ),
    Merge(  # cross attention of Whisper and its like: queries are of other tokens
        ("k_proj", "v_proj"),
        ("kv_proj",),
        parents=("encoder_attn",),
    ),
    Merge(("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    Merge(("gate_proj", "up_proj"), ("gate_up_proj",)),
    Merge(("c_fc_0", "c_fc_1"), ("gate_up_proj",)),  # exaone.py
    Merge(("w1", "w3"), ("gate_up_proj", "w13")),  # internlm2.py; lfm2.py of vLLM
    Merge(  # vLLM models/kimi_k3
        ("q_a_proj", "kv_a_proj_with_mqa", "g_proj"),
        ("fused_qkv_a_g_proj",),
        whole=True,
    ),
    Merge(  # deepseek_v2.py: vLLM has the first name, SGLang the second
        ("q_a_proj", "kv_a_proj_with_mqa"),
        ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
    ),
    Merge(("in_proj_qkv", "in_proj_z"), ("in_proj_qkvz",)),  # qwen3_5.py
    Merge(("in_proj_b", "in_proj_a"), ("in_proj_ba",)),  # qwen3_5.py
    Merge(("wq_a", "wkv"), ("fused_wqa_wkv",)),  # vLLM models/deepseek_v4
    Merge(("key_proj", "value_proj"), ("kv_proj",), whole=True),  # vLLM models/qwen4_exp
    Merge(("wq_du", "wk_dv", "wv_dv", "wr_du"), ("qkvr",)),  # vLLM models/inkling
    Merge(("wq", "wk", "wv"), ("qkv_proj", "merged_qkv"), whole=True),
    Merge(("query", "key", "value"), ("qkv_proj",), whole=True),  # bert.py
)


def _merges(names: Iterable[str]) -> Iterator[tuple[str, Merge, list[str]]]:
    """Yields the modules that merge some of ``names``: the module, the row, and these names.

    A name is in one row of a module at most. A row may have a single name.
    """
    local_names: dict[str, dict[str, None]] = {}
    for name in names:
        parent, _, local = name.rpartition(".")
        local_names.setdefault(parent, {})[local] = None
    for parent, present in local_names.items():
        left = dict(present)
        module = parent.rpartition(".")[2]
        for row in MERGES:
            found = [local for local in left if local in row.members]
            fits = len(found) == len(row.members) if row.whole else found
            if fits and (not row.parents or module in row.parents):
                yield parent, row, [f"{parent}.{local}" if parent else local for local in found]
                left = {local: None for local in left if local not in row.members}


def merged_matrices(names: Iterable[str]) -> list[list[str]]:
    """The groups of ``names`` that engines merge into one matrix, each with two or more names."""
    return [group for _, _, group in _merges(names) if len(group) > 1]


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The groups of ``names`` that must share one scheme, each with two or more names.

    All experts of a layer are one group too, because engines stack them.
    """
    experts: dict[str, list[str]] = {}
    dense = []
    for name in names:
        layer, expert, _ = name.partition(".experts.")
        if expert:
            experts.setdefault(layer, []).append(name)
        else:
            dense.append(name)
    stacked = [group for group in experts.values() if len(group) > 1]
    return merged_matrices(dense) + stacked


def with_partners(reasons: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Returns ``reasons`` to keep linears float, and one for each linear that is fused with them.

    ``names`` are the linears that may be fused.
    """
    extended = dict(reasons)
    for group in fused_groups(names):
        first = next((name for name in group if name in reasons), None)
        for name in group if first is not None else ():
            extended.setdefault(name, f"engines merge it with {first}, which stays float")
    return extended


def divided_groups(names: Iterable[str], schemes: Mapping[str, Scheme]) -> Iterator[list[str]]:
    """Yield the groups of ``names`` that engines fuse although their schemes differ.

    A name without a scheme is float, which differs from every scheme.
    """
    for group in fused_groups(names):
        if len({schemes.get(name) for name in group}) > 1:
            yield group


def fused_problems(names: Iterable[str], schemes: Mapping[str, Scheme]) -> Iterator[Problem]:
    """Yield a problem for each group of ``names`` that engines fuse although schemes differ."""
    for group in divided_groups(names, schemes):
        different = {schemes.get(name) for name in group}
        kinds = " and ".join(sorted(scheme.name if scheme else "float" for scheme in different))
        yield Problem("fused", ", ".join(group[:3]), f"engines merge them, but they are {kinds}")


def with_merged_names(names: Iterable[str]) -> list[str]:
    """``names``, followed by the names that engines give to the matrices merged from them."""
    extended = dict.fromkeys(names)
    for parent, row, _ in list(_merges(extended)):
        for merged in row.names:
            extended[f"{parent}.{merged}" if parent else merged] = None
    return list(extended)
