"""Folders as AutoAWQ, GPTQModel, llm-compressor and ModelOpt write them, packed by plain loops.

No code of qplug packs anything here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qplug.checkpoint.locate import find_model

SIZE = 32  # columns of a group
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)

#: Returns the stored tensors of a weight ``[out, in]``, by local name.
Store = Callable[[Tensor], dict[str, Tensor]]


def pack(values: Tensor, bits: int) -> Tensor:
    """Codes ``[rows, columns]`` in int32 words along columns, the first in the low bits."""
    rows, columns = values.shape
    per = 32 // bits
    words = torch.zeros(rows, -(-columns // per), dtype=torch.int64)
    for column in range(columns):
        words[:, column // per] |= values[:, column].long() << (bits * (column % per))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Codes ``[rows, columns]`` in int32 words along rows."""
    return pack(values.T, bits).T.contiguous()


def pack_awq(values: Tensor) -> Tensor:
    """Codes ``[rows, columns]`` in int32 words along columns, in AWQ's order."""
    ordered = torch.empty_like(values)
    for column in range(values.shape[1]):
        word, place = divmod(column, 8)
        ordered[:, column] = values[:, 8 * word + AWQ_PLACES[place]]
    return pack(ordered, 4)


def grid(weight: Tensor, *, sym: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 ``[out, in]``, zero points and float16 scales ``[out, groups]`` for a weight."""
    generator = torch.Generator().manual_seed(seed)
    out, width = weight.shape
    groups = weight.float().view(out, width // SIZE, SIZE)
    scale = (groups.abs().amax(2) / 7).half()
    zero = torch.full(scale.shape, 8)
    if not sym:
        zero = torch.randint(1, 16, zero.shape, generator=generator)
    codes = (groups / scale.float()[..., None]).round() + zero[..., None]
    return codes.clamp(0, 15).long().view(out, width), zero, scale


def awq(weight: Tensor, *, sym: bool = False) -> dict[str, Tensor]:
    codes, zero, scale = grid(weight, sym=sym)
    return {
        "qweight": pack_awq(codes.T),
        "qzeros": pack_awq(zero.T),
        "scales": scale.T.contiguous(),
    }


def gptq(
    weight: Tensor, *, sym: bool, v2: bool = False, reorder: bool = False
) -> dict[str, Tensor]:
    codes, zero, scale = grid(weight, sym=sym)
    width = weight.shape[1]
    order = torch.arange(width) // SIZE
    return {
        "qweight": pack_rows(codes.T, 4),
        "qzeros": pack(zero.T if v2 else zero.T - 1, 4),
        "scales": scale.T.contiguous(),
        "g_idx": (order.flip(0) if reorder else order).int(),
    }


def compressed(weight: Tensor, *, sym: bool) -> dict[str, Tensor]:
    codes, zero, scale = grid(weight, sym=sym)
    tensors = {
        "weight_packed": pack(codes, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors if sym else {**tensors, "weight_zero_point": pack_rows(zero, 4)}


def modelopt_fp8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.float().abs().max() / 448
    return {
        "weight": (weight.float() / scale).to(torch.float8_e4m3fn),
        "weight_scale": scale,
        "input_scale": torch.tensor(0.013),
    }


def block_fp8(weight: Tensor) -> dict[str, Tensor]:
    out, width = weight.shape
    tiles = weight.float().view(-(-out // 64), 64, -(-width // 128), 128)
    scale = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return {"weight": codes.view(out, width), "weight_scale_inv": scale}


def foreign(source: Path, out: Path, told: dict[str, Any], store: Store) -> Path:
    """The folder ``out``: the model of ``source`` with the linears of its blocks in ``store``."""
    shutil.copytree(source, out)
    tensors: dict[str, Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        for name, value in load_file(file).items():
            if "_proj" in name:
                module = name.removesuffix(".weight")
                tensors |= {f"{module}.{local}": part for local, part in store(value).items()}
            else:
                tensors[name] = value
        file.unlink()
    for file in out.glob("*.index.json"):
        file.unlink()
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / file, out)
    return out
