"""``model.gguf``: all that llama.cpp needs in one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from qplug import (
    Checkpoint,
    FileTensor,
    ModelView,
    QplugError,
    Scheme,
    SingleFile,
    StoredTensor,
    TensorSpec,
)
from qplug_gguf.tokens import Vocabulary, read_vocabulary

_TYPES = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}
_FILE_TYPES = {8: gguf.LlamaFileType.MOSTLY_Q8_0, 4: gguf.LlamaFileType.MOSTLY_Q4_0}
_FLOATS = {
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "float16": gguf.GGMLQuantizationType.F16,
    "float32": gguf.GGMLQuantizationType.F32,
}
_DTYPES = {kind: dtype for dtype, kind in _FLOATS.items()}


class GGUFFile(SingleFile):
    """All tensors under llama.cpp's names, with the configuration and the tokenizer."""

    name = "model.gguf"

    def refuses(self, folder: Path) -> str | None:
        try:
            read_vocabulary(folder, 1 << 20)
        except QplugError as error:
            return str(error)
        return None

    def write(
        self, finished: Checkpoint, model: ModelView, schemes: Mapping[str, Scheme], path: Path
    ) -> None:
        names, turned = _names(model.config), _turned(model.config)
        writer = gguf.GGUFWriter(path, "llama")
        vocabulary = read_vocabulary(finished.folder, model.config["vocab_size"])
        _describe(writer, finished.folder, model.config, vocabulary)
        if schemes:
            writer.add_file_type(_FILE_TYPES[min(s.weights.bits for s in schemes.values())])
        for name, stored in finished.tensors.items():
            spec, linear = stored.spec, name.removesuffix(".weight")
            kind = _TYPES[schemes[linear].weights.bits] if linear in schemes else _kind(spec)
            shape = (*spec.shape[:-1], _row_bytes(spec, kind))
            size = int(np.prod(shape))
            writer.add_tensor_info(names[name], shape, np.dtype(np.uint8), size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, stored in finished.tensors.items():
            tensor = stored.read()
            if name in turned:
                tensor = _interleaved(tensor, turned[name])
            if tensor.ndim == 1:
                tensor = tensor.float()
            writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
        writer.close()

    def read(self, path: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise QplugError(f"{path}: not a sound GGUF file: {error}") from error
        ours = {theirs: name for name, theirs in _names(config).items()}
        turned, dtype = _turned(config), str(config.get("dtype") or config["torch_dtype"])
        tensors: dict[str, StoredTensor] = {}
        for tensor in reader.tensors:
            name = ours.get(tensor.name)
            if name is None:
                raise QplugError(f"{path}: {tensor.name} is no tensor of this model")
            shape = tuple(int(n) for n in reversed(tensor.shape))
            start, stored = int(tensor.data_offset), _DTYPES.get(tensor.tensor_type)
            if stored is None:
                lying = TensorSpec("uint8", (shape[0], int(tensor.n_bytes) // shape[0]))
                meant = lying
            else:
                lying = TensorSpec(stored, shape)
                meant = TensorSpec(dtype if len(shape) == 1 else stored, shape)
            raw = FileTensor(path, lying, start)
            tensors[name] = _Tensor(meant, raw, turned.get(name, 0))
        return tensors


@dataclass(frozen=True)
class _Tensor(StoredTensor):
    """A tensor as the float model has it, of what lies in the file as ``raw``.

    ``heads``: how many heads have their rows interleaved there; 0 if none.
    """

    spec: TensorSpec
    raw: FileTensor
    heads: int

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.raw.paths

    def read(self) -> Tensor:
        tensor = self.raw.read().to(getattr(torch, self.spec.dtype))
        return _in_halves(tensor, self.heads) if self.heads else tensor

    def chunks(self) -> Iterator[bytes]:
        yield self.read().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _kind(spec: TensorSpec) -> gguf.GGMLQuantizationType:
    """Of a float tensor; llama.cpp wants vectors in float32."""
    return _FLOATS["float32" if len(spec.shape) == 1 else spec.dtype]


def _row_bytes(spec: TensorSpec, kind: gguf.GGMLQuantizationType) -> int:
    if spec.dtype == "uint8":
        return spec.shape[-1]
    return spec.shape[-1] * gguf.GGML_QUANT_SIZES[kind][1]


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """The names of GGUF, by those of the float model."""
    count = config["num_hidden_layers"]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, count)
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    parts += ["input_layernorm", "post_attention_layernorm"]
    modules = [f"model.layers.{layer}.{part}" for layer in range(count) for part in parts]
    modules += ["model.embed_tokens", "model.norm", "lm_head"]
    return {f"{module}.weight": f"{table.get_name(module)}.weight" for module in modules}


def _turned(config: Mapping[str, Any]) -> dict[str, int]:
    """The tensors whose heads llama.cpp rotates in pairs of rows, with the number of heads."""
    heads = config["num_attention_heads"]
    counts = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    return {
        f"model.layers.{layer}.self_attn.{part}.weight": count
        for layer in range(config["num_hidden_layers"])
        for part, count in counts.items()
    }


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order of llama.cpp: one of the first half, one of the second."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _in_halves(rows: Tensor, heads: int) -> Tensor:
    """The inverse of ``_interleaved``."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _describe(
    writer: gguf.GGUFWriter, folder: Path, config: Mapping[str, Any], vocabulary: Vocabulary
) -> None:
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_name(folder.name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.cutter)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for kind, number in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        if isinstance(token := config.get(f"{kind}_token_id"), int):
            number(token)
    writer.add_add_bos_token(vocabulary.begins)
