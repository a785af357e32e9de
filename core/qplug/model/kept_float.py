"""The weights that engines build without quantization, whatever ``config.json`` says: a table.

Codes for such a weight have no place in the engine. qplug leaves the weight float, names it in
``ignore``, and ``verify`` refuses a folder that quantizes it. A plugin that teaches an architecture
names such weights in ``ModelView.built_float``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

from qplug.api import BuiltFloat

_BOTH = ("vLLM", "SGLang")


@dataclass(frozen=True)
class KeptFloat:
    """A row: weights whose names match one of ``patterns`` (globs) in models of type ``models``.

    Empty ``models`` are all models. The name of a weight is without ``.weight``.
    """

    patterns: tuple[str, ...]
    models: tuple[str, ...]
    why: BuiltFloat


KEPT_FLOAT = (
    KeptFloat(
        (
            *("*.gate", "*.router", "*.shared_expert_gate"),
            *("*.router.layer", "*.router.classifier", "*.router.proj", "*.v_router"),
            *("*.gate.wg", "*.shared_experts_gate"),
        ),
        (),
        BuiltFloat(
            "it chooses experts: it is small, and a wrong choice is costly",
            source="GateLinear without quant_config in vLLM 0.32, models/*.py; "
            "quant_config=None in SGLang 0.5.16, models/*.py",
        ),
    ),
    KeptFloat(
        ("*.altup.modality_router", "*.altup.prediction_coefs", "*.altup.correction_coefs"),
        ("gemma3n", "gemma3n_text"),
        BuiltFloat(
            "it has as few inputs or outputs as the model has streams: no kernel is so narrow",
            source="vLLM 0.32, models/gemma3n.py; SGLang 0.5.16, models/gemma3n_causal.py",
        ),
    ),
    KeptFloat(
        ("*.indexer.weights_proj", "*.indexer.wk", "*.indexer.scorer.weights_proj"),
        (),
        BuiltFloat(
            "the engine merges it into wk_weights_proj, which it keeps in bfloat16",
            _BOTH,
            "quant_config=None in vLLM 0.26 and 0.32, Indexer in models/deepseek_v2.py, "
            "models/deepseek_v4 and models/glm5next; "
            "SGLang 0.5.16, layers/attention/dsa/dsa_indexer.py",
        ),
    ),
    KeptFloat(
        (
            *("*.compressor.wkv", "*.compressor.wgate"),
            *("*.compressor.kv_proj", "*.compressor.gate_proj"),
            *("*.indexer.kv_proj", "*.indexer.gate_proj"),
        ),
        ("deepseek_v4",),
        BuiltFloat(
            "it compresses keys and values of sparse attention, which engines do in bfloat16",
            _BOTH,
            "fused_wkv_wgate with quant_config=None in vLLM 0.32, models/deepseek_v4/compressor.py;"
            " wkv_gate in SGLang 0.5.16, layers/attention/dsv4/compressor.py",
        ),
    ),
    KeptFloat(
        ("*hc.fn", "*.hc_fn", "*.hc_head_fn", "*.hc_attn_fn", "*.hc_ffn_fn", "*_hyper.fn"),
        (),
        BuiltFloat(
            "it mixes the streams of hyper-connections: a few rows, computed in float32",
            _BOTH,
            "parameters or linears without quant_config in vLLM 0.32, models/deepseek_v4 and "
            "models/hy_v4/*/hc.py; SGLang 0.5.23, models/hunyuan_v4.py",
        ),
    ),
    KeptFloat(
        ("*.input_mix_weight_down", "*.input_mix_weight_up", "*.block_inject_weight"),
        (),
        BuiltFloat(
            "it mixes the streams of gated residuals, which the engine does in bfloat16",
            _BOTH,
            "quant_config=None in vLLM 0.32, models/qwen4_exp/*/hyperconnection.py",
        ),
    ),
    KeptFloat(
        ("*.self_attention_res_proj", "*.attn_res_proj", "*.mlp_res_proj"),
        (),
        BuiltFloat(
            "it weighs the residuals of earlier blocks: a single row",
            _BOTH,
            "quant_config=None in vLLM 0.32, models/kimi_k3 and alice_ai.py; "
            "SGLang 0.5.23, models/kimi_k3.py",
        ),
    ),
    KeptFloat(
        ("*.mlp.routed_expert_down_proj", "*.mlp.routed_expert_up_proj"),
        ("kimi_k3",),
        BuiltFloat(
            "the projections around latent experts take no quantization",
            ("vLLM",),
            "quant_config=None in vLLM 0.32, models/kimi_k3/amd/linear.py",
        ),
    ),
    KeptFloat(
        ("*.self_attn.g_proj", "*.attention.g_proj"),
        ("step3p5", "step3p7", "step3p7_text", "bailing_hybrid"),
        BuiltFloat(
            "the gate of attention heads has a row for each head, and takes no quantization",
            ("SGLang",),
            "no quant_config in SGLang 0.5.23, models/step3p5.py and models/bailing_moe_v3.py",
        ),
    ),
    KeptFloat(
        ("*.pre_expert_proj", "*.post_expert_proj"),
        ("muse_spark", "muse_spark_text"),
        BuiltFloat(
            "the projections around experts take no quantization",
            ("SGLang",),
            "nn.Linear in SGLang 0.5.23, models/muse_spark.py",
        ),
    ),
    KeptFloat(
        ("*.shared_experts.gate_proj", "*.shared_experts.up_proj", "*.shared_experts.down_proj"),
        ("inkling", "inkling_text"),
        BuiltFloat(
            "shared experts are sinks, which take no quantization",
            ("vLLM",),
            "no quant_config in vLLM 0.32, models/inkling/*/moe.py, InklingSinkExpertsLinear",
        ),
    ),
    KeptFloat(
        ("*.conv.in_proj", "*.conv.out_proj"),
        ("lfm2", "lfm2_moe", "lfm3"),
        BuiltFloat(
            "ShortConv takes no quantization before vLLM 0.32",
            ("vLLM",),
            "no quant_config in vLLM 0.26, layers/mamba/short_conv.py; "
            "short_conv in vLLM 0.32, models/lfm2.py and lfm2_moe.py",
            renamed=(".conv.", ".short_conv."),
        ),
    ),
    KeptFloat(
        tuple(f"*.mamba.{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")),
        ("jamba",),
        BuiltFloat(
            "Mamba-1 layers take no quantization",
            ("vLLM",),
            "no quant_config in vLLM 0.26 and 0.32, layers/mamba/mamba_mixer.py",
        ),
    ),
    KeptFloat(
        tuple(f"*.mixer.{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")),
        ("mamba", "falcon_mamba"),
        BuiltFloat(
            "Mamba-1 layers take no quantization",
            ("vLLM",),
            "no quant_config in vLLM 0.26 and 0.32, layers/mamba/mamba_mixer.py",
        ),
    ),
    KeptFloat(
        tuple(f"*.self_attn.{name}_proj" for name in "qkvo"),
        ("olmo",),
        BuiltFloat(
            "attention of OLMo takes no quantization",
            ("SGLang",),
            "no quant_config in SGLang 0.5.16, models/olmo.py",
        ),
    ),
    KeptFloat(
        tuple(f"*.self_attn.{name}_proj" for name in "qkvo"),
        ("stablelm",),
        BuiltFloat(
            "attention of StableLM takes no quantization",
            ("SGLang",),
            "StablelmDecoderLayer passes no quant_config to it in SGLang 0.5.16 and 0.5.23, "
            "models/stablelm.py",
        ),
    ),
    KeptFloat(
        ("*.self_attention.query_key_value",),
        ("bloom",),
        BuiltFloat(
            "the engine orders its rows by heads, and every tensor beside them, also a shape",
            ("vLLM",),
            "_repack_qkv in vLLM 0.32, models/bloom.py",
        ),
    ),
    KeptFloat(
        ("*.attn.c_attn",),
        ("gpt_bigcode",),
        BuiltFloat(
            "the engine reads the scales of keys and values from the rows of the queries",
            ("SGLang",),
            "load_weights in SGLang 0.5.16 and 0.5.23, models/gpt_bigcode.py: served, and wrong",
        ),
    ),
    KeptFloat(
        ("*.mamba.in_proj", "*.mamba.out_proj"),
        ("falcon_h1",),
        BuiltFloat(
            "Mamba layers of Falcon-H1 take no quantization",
            ("SGLang",),
            "no quant_config in SGLang 0.5.16 and 0.5.23, models/falcon_h1.py",
        ),
    ),
    KeptFloat(
        ("*.mlp.experts.*",),
        ("afmoe", "deepseek", "xverse_moe"),
        BuiltFloat(
            "the engine joins the float weights of experts, which codes do not have",
            ("SGLang",),
            "pack_params in SGLang 0.5.16 and 0.5.23, models/afmoe.py, deepseek.py "
            "and xverse_moe.py",
        ),
    ),
    KeptFloat(
        ("*.mlp.experts.*",),
        ("aria", "aria_text"),
        BuiltFloat(
            "the engine reads the experts of Aria as one float tensor, and passes codes over",
            ("vLLM",),
            "hf_to_vllm_mapper in vLLM 0.32, models/aria.py: served, and wrong",
        ),
    ),
    KeptFloat(
        ("*.eh_proj", "*mtp.fc"),
        (),
        BuiltFloat(
            "it joins a draft layer to the model, which engines do without quantization",
            _BOTH,
            "nn.Linear in vLLM 0.32, models/deepseek_mtp.py, and SGLang 0.5.16, "
            "models/deepseek_nextn.py and models/qwen3_5_mtp.py",
        ),
    ),
    KeptFloat(
        ("*.projector.layers",),
        ("deepseek_ocr2",),
        BuiltFloat(
            "the projector of pictures is float, and has another name in the engine",
            ("vLLM",),
            "MultiModalMixin in vLLM 0.32, models/transformers: names of transformers in memory",
            renamed=(".projector.layers", ".multi_modal_projector"),
        ),
    ),
    KeptFloat(
        ("*.conv1d", "*.?_conv1d", "*.conv.conv", "*.short_conv.conv", "*.A_log"),
        (),
        BuiltFloat(
            "it is a convolution over a few tokens, or the state matrix of one: no linear layer",
            source="quant_config=None in vLLM 0.32, layers/mamba; SGLang 0.5.16, models/*.py",
        ),
    ),
)


def built_float(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, BuiltFloat]:
    """Returns why weights among ``names`` stay float, by name, for the model of ``config``.

    ``config`` is config.json; the model types of the model and of its text part count.
    """
    text = config.get("text_config")
    types = {config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None}
    rows = [
        (re.compile("|".join(map(translate, row.patterns))), row.why)
        for row in KEPT_FLOAT
        if not row.models or types & {*row.models}
    ]
    found = {}
    for name in names:
        why = next((why for pattern, why in rows if pattern.match(name)), None)
        if why is not None:
            found[name] = why
    return found
