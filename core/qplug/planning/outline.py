"""The structure of a model as headers show it: linears alike are one, with their number.

A run finds linears in the module tree of transformers, which takes torch and seconds. Names and
shapes tell nearly as much: in a decoder block each matrix ``NAME.weight`` is a linear, but for
those that engines build float. A model of 61 blocks with 256 experts each has 47,000 linears of
some twenty kinds, and one of each kind is enough to ask a format and an engine.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from qplug.api import Checkpoint, ModelView
from qplug.api.reader import Reader
from qplug.api.tensors import FLOAT_DTYPES
from qplug.checkpoint.config_file import text_config
from qplug.checkpoint.draft_names import block_count
from qplug.checkpoint.names import kind_of, split_name
from qplug.errors import QplugError
from qplug.model.kept_float import built_float
from qplug.model.known_towers import known_towers

_LIST = re.compile(r"^(?P<list>.*?)\.(?P<number>\d{1,9})\.(?P<rest>.+)$")

#: The linears in a tensor of three axes that holds the experts of a layer, by its local name, and
#: the name of the tensor beside it that holds the others.
_STACKED = {
    "gate_up_proj": (("gate_proj", "up_proj"), "down_proj"),
    "down_proj": (("down_proj",), "gate_up_proj"),
    "input_linear": (("gate_proj", "up_proj"), "output_linear"),
    "output_linear": (("down_proj",), "input_linear"),
}
#: Those of them whose outputs, not inputs, are as wide as the residual stream.
_OUT = ("down_proj", "output_linear")
#: Words in the names of text decoders; and of towers, whose blocks are not those of the decoder.
_DECODERS = ("language_model", "text_model", "llm")
_TOWERS = ("vision", "visual", "vit", "image", "audio", "speech", "encoder", "qformer", "codec")


@dataclass(frozen=True)
class Outline:
    """A model by its headers.

    ``view`` has one linear of each kind: of decoder blocks with the same names and shapes the first
    block, and of experts that are alike the first expert. ``counts`` has the number of linears that
    each of them stands for. ``nbytes`` are the bytes of all tensors of the float model,
    ``parameters`` their elements. ``table`` is the number of elements of the largest matrix outside
    of the blocks, the embedding. ``tensors`` are shapes in the blocks, by name relative to the
    block, for each block. ``experts`` is the largest number of experts in a block.
    ``source_format`` says how the files store weights that a reader reads as float; it is empty for
    others.
    """

    view: ModelView
    counts: Mapping[str, int]
    nbytes: int
    parameters: int
    table: int
    tensors: tuple[Mapping[str, tuple[int, ...]], ...]
    experts: int = 0
    source_format: str = ""

    @property
    def blocks(self) -> int:
        """The number of decoder blocks."""
        return len(self.tensors)

    @property
    def config(self) -> Mapping[str, Any]:
        """The part of config.json on the language model."""
        return text_config(self.view.config)


def find_outline(checkpoint: Checkpoint) -> Outline:
    """Returns the outline of a float ``checkpoint``, of which no weight is read.

    Raises QplugError if its tensors are in no list of blocks, or if it is quantized and no reader
    reads it.
    """
    config = checkpoint.config
    if Reader.quantization(config):
        method = ascii(Reader.quantization(config).get("quant_method"))[:40]
        raise QplugError(
            f"{checkpoint.folder}: is quantized already, and no reader reads its quant_method "
            f"{method}; plan with the float model it came from"
        )
    prefix, count = _blocks(checkpoint)
    hidden = text_config(config).get("hidden_size")
    inside: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
    linears: list[dict[str, tuple[tuple[int, int], int]]] = [{} for _ in range(count)]
    dtypes: Counter[str] = Counter()
    nbytes = parameters = table = 0
    for name, stored in checkpoint.tensors.items():
        spec, size = stored.spec, _size(stored.spec.shape)
        nbytes, parameters = nbytes + stored.nbytes, parameters + size
        found = _LIST.match(name)
        if found is None or found["list"] != prefix or int(found["number"]) >= count:
            table = max(table, size if len(spec.shape) == 2 else 0)
            continue
        number, rest = int(found["number"]), found["rest"]
        inside[number][rest] = spec.shape
        if spec.dtype in FLOAT_DTYPES:
            dtypes[spec.dtype] += size
            sides = spec.shape[::-1] if _is_transposed(name, checkpoint) else spec.shape
            if len(sides) > 2 and not _has_partner(name, checkpoint):
                continue
            for linear, shape, times in _linears(rest, sides, hidden):
                linears[number][linear] = (shape, times)
    view, counts = _reduced(config, prefix, linears, checkpoint, dtypes)
    return Outline(
        view,
        counts,
        nbytes,
        parameters,
        table,
        tuple(inside),
        max(map(_experts, linears), default=0),
        checkpoint.quantized,
    )


def _experts(linears: Mapping[str, tuple[tuple[int, int], int]]) -> int:
    """Returns the number of routed experts in a block with ``linears``."""
    kinds: Counter[str] = Counter()
    for name, (_, times) in linears.items():
        if is_expert(name):
            kinds[kind_of(f"{name}.")] += times
    return max(kinds.values(), default=0)


def is_expert(linear: str) -> bool:
    """Returns whether ``linear`` is a part of one of several routed experts."""
    return ".experts." in f".{linear}"


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _blocks(checkpoint: Checkpoint) -> tuple[str, int]:
    """Returns the name of the list of decoder blocks, and their number.

    It is the outermost list with the most weights: of those whose length config.json states, and of
    those in a decoder or at least in no tower, by their names, if there are such lists. Draft
    layers, numbered on after the last block, are not counted.
    """
    sizes: Counter[str] = Counter()
    numbers: dict[str, set[int]] = defaultdict(set)
    for name, stored in checkpoint.tensors.items():
        if found := _LIST.match(name):
            sizes[found["list"]] += _size(stored.spec.shape)
            numbers[found["list"]].add(int(found["number"]))
    if not sizes:
        raise QplugError(f"{checkpoint.folder}: its tensors are in no list of decoder blocks")
    stated = block_count(checkpoint.config)
    fitting = [name for name in sizes if stated and _has_all(numbers[name], stated)]
    among = fitting or list(sizes)
    text = [name for name in among if any(word in name for word in _DECODERS)]
    text = text or [name for name in among if not any(word in name for word in _TOWERS)]
    prefix = max(text or among, key=lambda name: sizes[name])
    if fitting and stated:
        return prefix, stated
    count = next(number for number in itertools.count() if number not in numbers[prefix])
    if not count:
        raise QplugError(f"{checkpoint.folder}: {prefix[:300]} has no block 0")
    return prefix, count


def _is_transposed(name: str, checkpoint: Checkpoint) -> bool:
    """Whether the matrix ``name`` is stored as ``[in, out]``, as GPT-2's, by the size of its bias.

    A square matrix is the same either way.
    """
    module, local = split_name(name)
    bias = checkpoint.tensors.get(f"{module}.bias")
    shape = checkpoint.tensors[name].spec.shape
    if local != "weight" or bias is None or len(shape) != 2:
        return False
    return bias.spec.shape == (shape[1],) and shape[0] != shape[1]


def _has_partner(name: str, checkpoint: Checkpoint) -> bool:
    """Whether the tensor ``name`` holds experts of which another tensor holds the other linears."""
    suffix = ".weight" if name.endswith(".weight") else ""
    stack, local = split_name(name.removesuffix(suffix))
    partner = f"{stack}.{_STACKED[local][1]}{suffix}" if local in _STACKED else ""
    return partner in checkpoint.tensors and len(checkpoint.tensors[partner].spec.shape) == 3


def _has_all(numbers: Set[int], count: int) -> bool:
    """Whether ``numbers`` has 0 to ``count - 1``; ``count`` may be anything."""
    return 0 < count <= len(numbers) and numbers >= set(range(count))


def _linears(
    name: str, shape: tuple[int, ...], hidden: object
) -> Iterator[tuple[str, tuple[int, int], int]]:
    """Yields the linears in a tensor of a block: name, shape ``(out, in)``, and their number."""
    module, local = split_name(name)
    if local == "weight" and len(shape) == 2:
        yield module, (shape[0], shape[1]), 1
    stack, local = split_name(module if local == "weight" else name)
    if len(shape) != 3 or min(shape[1:]) < 2 or local not in _STACKED:
        return
    experts, *sides = shape
    parts, _ = _STACKED[local]
    at = 0 if local in _OUT else 1  # the side that is as wide as the residual stream
    turned = sides[at] != hidden and sides[1 - at] == hidden
    out, width = sides[::-1] if turned else sides
    parent = stack if stack.rpartition(".")[2] == "experts" else f"{stack}.experts".lstrip(".")
    for part in parts:
        yield f"{parent}.0.{part}", (out // len(parts), width), experts


def _reduced(
    config: Mapping[str, Any],
    prefix: str,
    linears: list[dict[str, tuple[tuple[int, int], int]]],
    checkpoint: Checkpoint,
    dtypes: Counter[str],
) -> tuple[ModelView, dict[str, int]]:
    """Returns the view with one linear of each kind, and the number of each."""
    names: dict[tuple[object, ...], str] = {}
    shapes: dict[str, tuple[int, int]] = {}
    counts: Counter[str] = Counter()
    alike: dict[tuple[object, ...], int] = {}
    for number, block in enumerate(linears):
        kinds = [(kind_of(f"{name}."), shape) for name, (shape, _) in block.items()]
        sort = (*sorted(Counter(kinds).items()),)
        alike.setdefault(sort, number)
        for (name, (shape, times)), kind in zip(block.items(), kinds, strict=True):
            key = (sort, *kind)
            if key not in names:
                first = f"{prefix}.{alike[sort]}.{kind[0].removesuffix('.').replace('*', '0')}"
                names[key] = first if first not in shapes else f"{prefix}.{alike[sort]}.{name}"
            full = names[key]
            shapes[full] = shape
            counts[full] += times
    floats = built_float(shapes, config)
    head = checkpoint.tensors.get("lm_head.weight")
    if head is not None and len(head.spec.shape) == 2:
        shapes["lm_head"] = (head.spec.shape[0], head.spec.shape[1])
        counts["lm_head"] = 1
    quantizable = {
        name
        for name in shapes
        if name != "lm_head" and (name not in floats or floats[name].engines)
    }
    view = ModelView(
        config=config,
        dtype=_dtype(config, dtypes),
        linears=shapes,
        quantizable=frozenset(quantizable),
        blocks=tuple(f"{prefix}.{number}" for number in range(len(linears))),
        head="lm_head",
        built_float=floats,
        towers=known_towers(config),
    )
    return view, dict(counts)


def _dtype(config: Mapping[str, Any], dtypes: Counter[str]) -> str:
    """Returns the dtype of the model: of config.json, else of most of its weights."""
    stated = config.get("dtype") or config.get("torch_dtype")
    if stated in FLOAT_DTYPES:
        return str(stated)
    return dtypes.most_common(1)[0][0] if dtypes else "bfloat16"
