"""The plan of published models, against figures that were computed by hand or published."""

from __future__ import annotations

from pathlib import Path

import pytest
from published import DEEPSEEK_V3, LLAMA_3_70B, QWEN3_30B_A3B, Published

from qplug import Checkpoint
from qplug.checkpoint.sources import read_as_float
from qplug.planning.fleet import find_fleet
from qplug.planning.headers import RemoteTensor
from qplug.planning.kv_cache import find_cache
from qplug.planning.offers import Offer, find_offers, sizes
from qplug.planning.outline import Outline, find_outline
from qplug.planning.speed import work_of
from qplug.registry.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.installed().only("exporter", "reader")


def outline_of(model: Published, registry: Registry) -> Outline:
    nowhere = Path("published")
    tensors = {name: RemoteTensor(nowhere / "model.safetensors", s) for name, s in model.specs()}
    return find_outline(
        read_as_float(Checkpoint(nowhere, model.config, {**tensors}), registry.sources)
    )


def offer(outline: Outline, registry: Registry, scheme: str, backend: str, gpu: str) -> Offer:
    offers, _ = find_offers(outline, find_fleet(gpu), registry, backend)
    (found,) = (each for each in offers if each.scheme == scheme)
    return found


def test_llama_3_70b(registry: Registry) -> None:
    outline = outline_of(LLAMA_3_70B, registry)
    ends = 2 * 128256 * 8192  # embeddings and head
    norms = (2 * 80 + 1) * 8192
    linears = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192)
    assert outline.parameters == ends + norms + linears == 70_553_706_496
    assert (outline.blocks, outline.experts, outline.nbytes) == (80, 0, 141_107_412_992)
    # 80 layers, keys and values, 8 heads of 128, 2 bytes: 0.33 MB a token, 2.7 GB for 8192.
    cache = find_cache(outline)
    assert cache.nbytes(1) == 327_680
    assert cache.nbytes(8192) == 2_684_354_560
    assert cache.nbytes(8192, bits=8, processes=2) == 2_684_354_560 // 4
    four = offer(outline, registry, "W4A16", "vllm", "H100")
    # 4 bits, 16 bits for each group of 128, and the shape of each linear in 16 bytes.
    assert four.nbytes == 2 * (ends + norms) + linears // 2 + linears // 64 + 80 * 7 * 16
    assert round(four.nbytes / 1e9, 1) == 39.5
    eight = offer(outline, registry, "FP8_DYNAMIC", "sglang", "H100")
    rows = 80 * (2 * 8192 + 2 * 1024 + 2 * 28672 + 8192)
    assert eight.nbytes == 2 * (ends + norms) + linears + 4 * rows
    assert four.processes == eight.processes == (1, 2, 4, 8, 16)


def test_qwen3_30b_a3b(registry: Registry) -> None:
    outline = outline_of(QWEN3_30B_A3B, registry)
    assert outline.parameters == 30_532_122_624  # the card says 30.5 billion
    assert (outline.blocks, outline.experts) == (48, 128)
    assert len(outline.view.linears) == 9  # q, k, v, o, the router, three of an expert, the head
    assert find_cache(outline).nbytes(1) == 48 * 2 * 4 * 128 * 2 == 98_304
    _, dense, experts = sizes(outline, {}, None)
    work = work_of(outline, dense, experts)
    assert work.share == 8 / 128
    # The card says 3.3 billion activated, with the embeddings, of which a token reads a row only.
    assert round(work.products / 1e9, 2) == 3.04
    assert round((work.products + outline.table) / 1e9, 2) == 3.35
    # 768 of gate and up are divided in halves of 384; vLLM needs more than a group of 128.
    assert offer(outline, registry, "W4A16", "vllm", "4090").processes == (1, 2)
    four = offer(outline, registry, "W4A16", "vllm", "4090").nbytes
    linears = outline.parameters - 2 * outline.table - 48 * 128 * 2048
    linears -= 48 * (2 * 2048 + 2 * 128) + 2048  # routers and norms stay float as well
    count = 48 * (4 + 128 * 3)
    assert four == outline.nbytes - 2 * linears + linears // 2 + linears // 64 + 16 * count


@pytest.mark.slow
def test_deepseek_v3(registry: Registry) -> None:
    outline = outline_of(DEEPSEEK_V3, registry)
    assert round(outline.parameters / 1e9) == 671
    assert (outline.blocks, outline.experts) == (61, 256)
    assert outline.source_format == "fp8 in blocks of 128 x 128"
    # Each token has a latent of 512 numbers and 64 of the rotary key in each layer and process.
    cache = find_cache(outline)
    assert cache.nbytes(1) == cache.nbytes(1, processes=8) == 61 * (512 + 64) * 2 == 70_272
    _, dense, experts = sizes(outline, {}, None)
    # The paper says 37 billion activated.
    products = work_of(outline, dense, experts).products
    assert 36e9 < products < 37.5e9
    four = offer(outline, registry, "W4A16", "vllm", "H200x8")
    assert 340e9 < four.nbytes < 360e9
    assert 8 in four.processes
    assert 16 not in four.processes  # 2048 / 16 is a single group
