"""A small random copy of a model, on which rewrites are tried that must not change its logits.

The copy has the configuration of the model with smaller sizes, and one decoder block of each kind.
Its tensors go by their names on disk, even where transformers fuses or renames them in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qplug.checkpoint.names import kind_of, module_of, split_name
from qplug.errors import QplugError
from qplug.model.block_call import hidden_states
from qplug.model.block_list import decoder_blocks
from qplug.model.disk_names import disk_names, modules_on_disk
from qplug.model.hollow import build
from qplug.model.hooks import hooked
from qplug.model.online_rotation import rotate_inputs
from qplug.model.quiet import quiet_transformers
from qplug.model.stacked_experts import stacked_experts
from qplug.numerics.hadamard import hadamard_exists

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: The place of a tensor: the kind of its block (None outside of blocks), and its name relative to
#: the block with a star for the number of an expert.
Place = tuple["int | None", str]

_HEADS = (4, 8, 16)
_VOCABULARY = 256
_EXPERTS = 8
_TOKENS = 16

# The fields of configurations that hold sizes. Nothing else is assumed of an architecture: if a
# model of smaller sizes does not run, the copy has the sizes of the model.
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "shared_expert_intermediate_size")
_EXPERT_INNER = "moe_intermediate_size"
# The fields that hold a word for each block.
_LAYER_TYPES = ("layer_types", "layers_block_type")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Tokens that a mixer with a state computes at once: fewer tokens are padded to as many.
_AT_ONCE = ("chunk_size", "mamba_chunk_size")


@dataclass(frozen=True)
class Seen:
    """One pass: logits ``[tokens, vocabulary]``, and each block's output ``[tokens, width]``."""

    logits: Tensor
    hidden: tuple[Tensor, ...]


class SmallCopy:
    """A random model with one block of each kind, in float32 on the CPU, its head untied.

    ``kinds[i]``: the kind of block ``i`` of the real model. ``first[k]``: the first block of kind
    ``k``. ``blocks[k]``: the path of that block in the copy's model, ``stored_blocks[k]``: its name
    on disk. ``width``: of the residual stream.
    """

    def __init__(self, config: PreTrainedConfig, folder: Path, trust_remote_code: bool) -> None:
        """Raises QplugError if no copy of this architecture can be run."""
        self.width: int = config.get_text_config().hidden_size
        try:
            self._make(_shrunk(config), folder, trust_remote_code)
            self.run()
        except Exception:  # transformers raises anything for sizes that do not fit together
            self._make(_untied(config), folder, trust_remote_code)
            try:
                self.run()
            except QplugError as error:
                raise QplugError(f"{folder}: {error}") from error
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise QplugError(
                    f"{folder}: a small copy of the model, on which it is tried how to rewrite "
                    f"weights, does not run ({reason}); take an algorithm that rewrites nothing, "
                    "such as rtn"
                ) from error
        self.width = self.model.config.get_text_config().hidden_size

    def _make(self, config: PreTrainedConfig, folder: Path, trust_remote_code: bool) -> None:
        self.model = build(config, folder, trust_remote_code=trust_remote_code).eval()
        names = decoder_blocks(self.model, folder)
        parent = module_of(names[0])
        kinds: dict[tuple[Any, ...], int] = {}
        modules = [self.model.get_submodule(name) for name in names]
        self.kinds = tuple(kinds.setdefault(_kind(module), len(kinds)) for module in modules)
        self.first = tuple(self.kinds.index(kind) for kind in range(len(kinds)))
        self.blocks = tuple(f"{parent}.{kind}" for kind in range(len(kinds)))
        path, local = split_name(parent)
        kept = nn.ModuleList([modules[index] for index in self.first])
        setattr(self.model.get_submodule(path), local, kept)
        _keep_layers(self.model.config.get_text_config(), self.first)
        self._draw()
        self._trace()

    @torch.no_grad()
    def _draw(self) -> None:
        """Give all parameters random values: norms away from 0, matrices that keep the variance."""
        generator = torch.Generator().manual_seed(0)
        for name, old in list(self.model.named_parameters()):
            path, local = split_name(name)
            module = self.model.get_submodule(path)
            if old.ndim == 1:
                value = torch.rand(old.shape, generator=generator) + 0.5
            else:
                value = torch.randn(old.shape, generator=generator)
                if not isinstance(module, nn.Embedding):
                    value /= old.shape[-1] ** 0.5
            module._parameters[local] = nn.Parameter(value, requires_grad=False)

    @torch.no_grad()
    def _trace(self) -> None:
        """Find the element in memory of each element on disk; experts are fused in memory."""
        from transformers.core_model_loading import revert_weight_conversion

        self._parameters = dict(self.model.named_parameters())
        count = sum(parameter.numel() for parameter in self._parameters.values())
        narrow = torch.int32 if count < 2**31 else torch.int64
        numbers, start = {}, 0
        for name, parameter in self._parameters.items():
            end = start + parameter.numel()
            numbers[name] = torch.arange(start, end, dtype=narrow).view(parameter.shape)
            start = end
        with quiet_transformers():
            on_disk: dict[str, Tensor] = revert_weight_conversion(self.model, numbers)
        names = disk_names(self.model, on_disk)
        self.stored_blocks = tuple(map(names.block, self.blocks))
        stacks = stacked_experts(self.model, names)
        whole = {name for stack in stacks for name in stack.tensors}
        self._numbers = {name: tensor for name, tensor in on_disk.items() if name not in whole}
        for stack in stacks:
            for name, stacked, expert, cut in stack.linears():
                self._numbers[name] = cut.of(on_disk[stacked][expert])
        times_stored = torch.zeros(count, dtype=torch.int8)
        for number in self._numbers.values():
            times_stored[number.flatten()] += 1
        if not (times_stored == 1).all():
            raise QplugError("the tensors on disk do not hold each element in memory exactly once")

    # --- tensors by their names on disk ----------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all tensors, float32, by name on disk."""
        flat = torch.cat([parameter.flatten() for parameter in self._parameters.values()])
        return {name: flat[numbers] for name, numbers in self._numbers.items()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Set ``tensors``, all or some, by name on disk."""
        flat = torch.cat([parameter.flatten() for parameter in self._parameters.values()])
        for name, value in tensors.items():
            flat[self._numbers[name]] = value
        start = 0
        for parameter in self._parameters.values():
            end = start + parameter.numel()
            parameter.data.copy_(flat[start:end].view(parameter.shape))
            start = end

    def on_disk(self, parameter: str, axis: int | None = None) -> Iterator[tuple[str, int]]:
        """The tensors on disk that hold ``parameter``, and where each has the parameter's ``axis``.

        The axis is 0 if no ``axis`` is given.
        """
        numbers, start = list(self._parameters), 0
        for name in numbers[: numbers.index(parameter)]:
            start += self._parameters[name].numel()
        held = self._parameters[parameter]
        for name, places in self._numbers.items():
            first = int(places.flatten()[0])
            if not start <= first < start + held.numel():
                continue
            if axis is None:
                yield name, 0
                continue
            stride = held.stride(axis)
            along = (places - start) // stride % held.shape[axis]
            for there in range(places.ndim):
                if int((along.amax(there) - along.amin(there)).amin()) == held.shape[axis] - 1:
                    yield name, there

    def place(self, name: str) -> Place:
        """The place of the tensor ``name`` of this copy."""
        return place_of(name, self.stored_blocks, range(len(self.blocks)))

    # --- running ---------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, online: Sequence[str] = ()) -> Seen:
        """Run a few tokens; inputs of linears in ``online`` are rotated.

        Raises QplugError if the model computes no logits, or if it needs more than text.
        """
        if needed := _needed_besides_text(self.model):
            raise QplugError(
                f"the model computes nothing of text without {needed}, so it is not checked that a "
                "rewritten model computes what it did; take an algorithm that rewrites nothing, "
                "such as rtn"
            )
        vocabulary = self.model.config.get_text_config().vocab_size
        tokens = torch.arange(2, 2 + _TOKENS) * 7 % (vocabulary - 1) + 1
        hidden: list[Tensor] = []
        handles = [
            self.model.get_submodule(name).register_forward_hook(partial(_keep_hidden, hidden))
            for name in self.blocks
        ]
        if online:  # a rewrite is tried in hundreds of runs, and names take as long as a run
            handles += rotate_inputs(modules_on_disk(self.model, self._numbers), online)
        with hooked(handles):
            output = self.model(input_ids=tokens[None], use_cache=False)
        logits: Tensor | None = getattr(output, "logits", None)
        if logits is None:
            raise QplugError(
                "the model computes no logits, by which it is checked that a rewritten model "
                "computes what it did; take an algorithm that rewrites nothing, such as rtn"
            )
        return Seen(logits[0].float(), tuple(hidden))


def _needed_besides_text(model: nn.Module) -> str | None:
    """The first argument besides tokens that ``model`` cannot be called without, or None."""
    parameters = inspect.signature(model.forward).parameters
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name != "input_ids"
    ]
    return needed[0] if needed else None


def place_of(name: str, blocks: tuple[str, ...], kinds: tuple[int, ...] | range) -> Place:
    """The place of the tensor ``name`` in a model with ``blocks`` of ``kinds``."""
    path = name.split(".")
    for end in range(len(path), 0, -1):
        block = ".".join(path[:end])
        if block in blocks:
            return kinds[blocks.index(block)], kind_of(".".join(path[end:]))
    return None, kind_of(name)


def _keep_hidden(hidden: list[Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
    state = hidden_states(output)
    hidden.append(state.flatten(0, -2))  # one sample; some models have several streams


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """The classes and shapes of a block; blocks that have these in common are of one kind."""
    types = sorted({str(type(part)) for part in block.modules()})
    shapes = [(name, tuple(value.shape)) for name, value in block.named_parameters()]
    return (*types, *shapes)


def _keep_layers(text: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Make ``text`` the configuration of a model that has the blocks ``kept`` alone."""
    types = {name: getattr(text, name, None) for name in _LAYER_TYPES}
    text.num_hidden_layers = len(kept)
    for name, all_types in types.items():
        if not isinstance(all_types, list):
            continue
        of_kept = [all_types[index] for index in kept]
        plain_class, own_name = type(text), text.attribute_map.get(name, name)
        if isinstance(getattr(plain_class, own_name, None), property):
            # Computed from the number of blocks, which does not say which blocks were kept.
            text.__class__ = type(plain_class.__name__, (plain_class,), {own_name: of_kept})
        else:
            setattr(text, name, of_kept)


def _untied(config: PreTrainedConfig) -> PreTrainedConfig:
    config = deepcopy(config)
    config.tie_word_embeddings = False
    config.dtype = torch.float32
    return config


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration with few heads of the same size, and few tokens and experts.

    Widths fit the heads; the width of the stream is one that has a Hadamard matrix.
    """
    config = _untied(config)
    text = config.get_text_config()
    text.tie_word_embeddings = False
    heads: int = text.num_attention_heads
    groups: int = getattr(text, "num_key_value_heads", None) or heads
    size: int = getattr(text, "head_dim", None) or text.hidden_size // heads
    old = text.hidden_size
    fewer = next((count for count in _HEADS if hadamard_exists(count * size)), heads)
    if heads > fewer:
        text.num_attention_heads = fewer
        if hasattr(text, "num_key_value_heads"):
            text.num_key_value_heads = fewer if groups == heads else min(groups, 2)
    width = text.num_attention_heads * size
    if width < old:
        text.hidden_size = width
        if getattr(text, "word_embed_proj_dim", None) == old:
            text.word_embed_proj_dim = width
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    experts = max(_EXPERTS, chosen, 4 * (getattr(text, "n_group", None) or 1))
    most = {
        **dict.fromkeys(_INNER, 2 * text.hidden_size),
        _EXPERT_INNER: text.hidden_size // 2,
        **dict.fromkeys(_EXPERT_COUNTS, experts),
        **dict.fromkeys(_AT_ONCE, _TOKENS),
    }
    for name, limit in most.items():
        if isinstance(size_now := getattr(text, name, None), int):
            setattr(text, name, min(size_now, limit))
    vocabulary = text.vocab_size
    text.vocab_size = min(vocabulary, _VOCABULARY)
    for name, before in (("hidden_size", old), ("vocab_size", vocabulary)):
        if getattr(config, name, None) == before:  # some say of the whole what they say of its text
            setattr(config, name, getattr(text, name))
    text.pad_token_id = 0 if isinstance(text.pad_token_id, int) else None
    return config
