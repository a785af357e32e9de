"""Names that engines have for float modules, most of them outside of the decoder blocks: towers.

Engines rename modules of composite models, merge linears inside towers, and load draft layers under
prefixes of their own. vLLM and SGLang rename plain entries of ``ignore``, but not expressions, so
an expression here names the last part of a module's name alone, which all spellings share.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from qplug import ModelView

#: Where SGLang builds draft layers that have a number after the last block (``*_nextn.py``).
_DRAFT = "model.decoder"


def towers(model: ModelView) -> dict[str, list[str]]:
    """The linears outside of the decoder blocks, by the module that contains them.

    The module is the outermost that contains no block: ``model.visual``, ``mtp``, or
    ``model.layers.61`` for a draft layer that stands after the last block. A linear that is no part
    of such a module, such as a head, is left out.
    """
    around = {parent for block in model.blocks for parent in _parents(block)}
    blocks = {*model.blocks}
    found: dict[str, list[str]] = {}
    for name in model.linears:
        above = [*_parents(name)]
        tower = next((parent for parent in above if parent not in around), None)
        if tower is not None and tower not in blocks:
            found.setdefault(tower, []).append(name)
    return found


def tower_suffixes(model: ModelView, floats: Collection[str]) -> list[str]:
    """The ends of the names of towers whose linears are all in ``floats``: ``visual``.

    An end that names a part of another module is longer: ``layers.61``. Where an engine gives a
    draft layer a name of its own, that name is one of the ends.
    """
    others = [name for name in model.linears if name not in floats]
    ends: dict[str, None] = {}
    for tower, linears in towers(model).items():
        if all(name in floats for name in linears):
            end = tower.rpartition(".")[2]
            if end.isdigit():
                candidates = [".".join(tower.split(".")[-2:]), _DRAFT]
            else:
                candidates = [end, *_numbered_on(model, tower, linears)]
            for candidate in candidates:
                if not any(_contains(candidate, name) for name in others):
                    ends[candidate] = None
    return list(ends)


def _numbered_on(model: ModelView, tower: str, linears: Iterable[str]) -> list[str]:
    """The names in vLLM of draft layers that ``tower`` lists: ``layers.36`` for ``mtp_layers.0``.

    vLLM numbers such layers on after the last block (MiMo, ERNIE). A list inside of ``tower``
    (``mtp.layers``) keeps its name, so there is no other name for it.
    """
    inside = {name.removeprefix(f"{tower}.").partition(".")[0] for name in linears}
    if not model.drafts.intersection(linears) or not model.blocks:
        return []
    above = model.blocks[-1].split(".")[-2]
    last = len(model.blocks)
    return [f"{above}.{last + int(number)}" for number in sorted(inside) if number.isdigit()]


def tower_entries(model: ModelView, floats: Collection[str]) -> list[str]:
    """An expression for each of ``tower_suffixes``, which matches all names inside the tower."""
    return [rf"re:.*{re.escape(end)}\..*" for end in tower_suffixes(model, floats)]


def loose_ends(model: ModelView, floats: Collection[str]) -> list[str]:
    """The last parts of the names of linears in ``floats`` that are in no block, and in no tower.

    They stand beside the lists of blocks, where engines put modules around them: vLLM has
    ``model.self_decoder.per_layer_model_projection`` for Gemma 3n's
    ``model.per_layer_model_projection``, and ``model.multi_modal_projector`` for what Mllama has on
    top. An end that is in a quantized name is left out, and so is
    the head, which engines find by its whole name.
    """
    elsewhere = {name for linears in towers(model).values() for name in linears}
    elsewhere |= {name for name in model.linears if {*model.blocks}.intersection(_parents(name))}
    loose = [name for name in floats if name not in elsewhere and name != model.head]
    ends = {name.rpartition(".")[2] for name in loose}
    others = [name for name in model.linears if name not in floats]
    return [end for end in sorted(ends) if not any(end in name for name in others)]


def renamed(model: ModelView, floats: Collection[str]) -> list[str]:
    """The names that an engine has for linears in ``floats``, where it has others for them."""
    found = []
    for name in sorted(floats):
        why = model.built_float.get(name)
        if why is not None and why.renamed is not None:
            found.append(name.replace(*why.renamed))
    return found


def portable(name: str) -> str:
    """``name`` from its first numbered list on, if more than one module is around the list.

    Engines rename the modules around the lists of composite models, but not the lists:
    ``model.language_model.layers.0.mlp.up_proj`` becomes ``layers.0.mlp.up_proj``.
    """
    parts = name.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[number - 1 :]) if number > 2 else name


def expert_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The linears of experts among ``names``, by the module that contains all experts of a layer.

    The module is ``model.layers.61.mlp.experts``.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        layer, inside, _ = name.partition(".experts.")
        if inside:
            groups.setdefault(f"{layer}.experts", []).append(name)
    return groups


def _parents(name: str) -> Iterator[str]:
    """Yields the modules around ``name``, the outermost first."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        yield ".".join(parts[:count])


def _contains(end: str, name: str) -> bool:
    return f"{end}." in name
