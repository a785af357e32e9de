"""How long a run takes until it reads the first weight, for models of real shapes.

Checkpoints are files with holes: they have headers and sizes, and take no room on the disk. Each
run is a process of its own, which ends at the first weight. Its seconds are counted from the start
of the process; its seconds of computing depend less on other work of the machine. The modules are
those that were imported by then. With ``--cold`` (root alone) the system forgets all files before
each run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from llama_shapes import LLAMA_3_8B, Shapes

from qplug import TensorSpec
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.tensor_file import FileTensor, lay_out

MODELS = ("llama-3-8b", "qwen3-30b-a3b", "deepseek-v3-4-layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--algos", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--repeats", type=int, default=3, help="the least of so many is told")
    parser.add_argument("--cold", action="store_true", help="read all files from the disk")
    parser.add_argument("--dir", type=Path, help="where the temporary folder is made")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "ALGO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        open_and_stop(*args.child)
    print(f"{'':22}{'':6}{'seconds':>9}{'computing':>11}{'modules':>9}")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for model in args.models:
            write(Path(folder) / model, model)
            for algo in args.algos:
                runs = [
                    measure(Path(folder) / model, algo, cold=args.cold) for _ in range(args.repeats)
                ]
                seconds, computing, modules = (min(each) for each in zip(*runs, strict=True))
                print(f"{model:22}{algo:6}{seconds:9.2f}{computing:11.2f}{modules:9}", flush=True)


def measure(model: Path, algo: str, *, cold: bool) -> tuple[float, float, int]:
    """The seconds until a run of ``algo`` reads a weight, those of computing, and the modules."""
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    began = time.perf_counter()
    words = [sys.executable, __file__, "--child", str(model), algo]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(child.returncode)
    assert child.stdout is not None
    return seconds, used.ru_utime + used.ru_stime, int(child.stdout.read())


def open_and_stop(model: str, algo: str) -> NoReturn:
    """Quantize ``model``, and end the process at the first weight."""
    from qplug import quantize

    first = threading.Lock()

    def stop(tensor: FileTensor, buffer: object) -> NoReturn:
        first.acquire()  # it is never released: several threads read
        shutil.rmtree(out)
        print(len(sys.modules), flush=True)
        os._exit(0)

    FileTensor.read_into = stop  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as out:
        quantize(model, Path(out) / "out", algo=algo, samples=8, seq_len=64)
    sys.exit("no weight was read")


# --- models --------------------------------------------------------------------------------------


def write(folder: Path, model: str) -> None:
    """Write the checkpoint of ``model``, with the tokenizer of the demo model."""
    folder.mkdir()
    config, shards = {
        "llama-3-8b": llama,
        "qwen3-30b-a3b": qwen,
        "deepseek-v3-4-layers": deepseek,
    }[model]()
    (folder / "config.json").write_text(json.dumps(config))
    places: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        specs = {name: TensorSpec("bfloat16", shape) for name, shape in shapes.items()}
        header, _ = lay_out(folder / file, specs)
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))
        places |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in find_model("qplug:demo").glob("*token*"):
        shutil.copy(path, folder)


def llama() -> tuple[dict[str, Any], list[Shapes]]:
    layers = [LLAMA_3_8B.layer(number) for number in range(32)]
    return LLAMA_3_8B.config(32), [LLAMA_3_8B.outer(), *joined(layers, 8)]


def qwen() -> tuple[dict[str, Any], list[Shapes]]:
    """Qwen3-30B-A3B: 48 layers of 128 experts."""
    hidden, inner, experts, words = 2048, 768, 128, 151936
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 6144,
        "moe_intermediate_size": inner,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **common(48, words),
    }
    attention = {
        "self_attn.q_proj": (4096, hidden),
        "self_attn.k_proj": (512, hidden),
        "self_attn.v_proj": (512, hidden),
        "self_attn.o_proj": (hidden, 4096),
        "self_attn.q_norm": (128,),
        "self_attn.k_norm": (128,),
    }
    layers = []
    for number in range(48):
        shapes = {**attention, **around(hidden), "mlp.gate": (experts, hidden)}
        for expert in range(experts):
            shapes |= mlp(f"mlp.experts.{expert}", inner, hidden)
        layers.append(weights(f"model.layers.{number}", shapes))
    return config, [outer(hidden, words), *joined(layers, 4)]


def deepseek() -> tuple[dict[str, Any], list[Shapes]]:
    """Four layers of DeepSeek-V3, each of 256 experts."""
    hidden, inner, experts, heads, words = 7168, 2048, 256, 128, 129280
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": 18432,
        "moe_intermediate_size": inner,
        "n_routed_experts": experts,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "n_shared_experts": 1,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "first_k_dense_replace": 0,
        **common(4, words),
    }
    attention = {
        "self_attn.q_a_proj": (1536, hidden),
        "self_attn.q_a_layernorm": (1536,),
        "self_attn.q_b_proj": (heads * 192, 1536),
        "self_attn.kv_a_proj_with_mqa": (576, hidden),
        "self_attn.kv_a_layernorm": (512,),
        "self_attn.kv_b_proj": (heads * 256, 512),
        "self_attn.o_proj": (hidden, heads * 128),
    }
    layers = []
    for number in range(4):
        shapes = {**attention, **around(hidden), "mlp.gate": (experts, hidden)}
        for expert in range(experts):
            shapes |= mlp(f"mlp.experts.{expert}", inner, hidden)
        shapes |= mlp("mlp.shared_experts", inner, hidden)
        bias = {f"model.layers.{number}.mlp.gate.e_score_correction_bias": (experts,)}
        layers.append(weights(f"model.layers.{number}", shapes) | bias)
    return config, [outer(hidden, words), *layers]


def common(layers: int, words: int) -> dict[str, Any]:
    return {
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "num_hidden_layers": layers,
        "vocab_size": words,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def outer(hidden: int, words: int) -> Shapes:
    """The tensors outside of layers."""
    return {
        "model.embed_tokens.weight": (words, hidden),
        "lm_head.weight": (words, hidden),
        "model.norm.weight": (hidden,),
    }


def around(hidden: int) -> Shapes:
    """The norms of a layer."""
    return {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}


def mlp(name: str, inner: int, hidden: int) -> Shapes:
    return {
        f"{name}.gate_proj": (inner, hidden),
        f"{name}.up_proj": (inner, hidden),
        f"{name}.down_proj": (hidden, inner),
    }


def weights(layer: str, shapes: Shapes) -> Shapes:
    return {f"{layer}.{name}.weight": shape for name, shape in shapes.items()}


def joined(layers: Sequence[Shapes], count: int) -> list[Shapes]:
    """The tensors of ``layers``, ``count`` layers in each of the mappings."""
    shards: list[Shapes] = []
    for number, layer in enumerate(layers):
        if number % count == 0:
            shards.append({})
        shards[-1] |= layer
    return shards


if __name__ == "__main__":
    main()
