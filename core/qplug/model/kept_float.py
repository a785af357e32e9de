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
            *("*.router.layer", "*.router.classifier", "*.router.proj"),
        ),
        (),
        BuiltFloat(
            "it chooses experts: it is small, and a wrong choice is costly",
            source="GateLinear without quant_config in vLLM 0.32, models/*.py; "
            "quant_config=None in SGLang 0.5.16, models/*.py",
        ),
    ),
    KeptFloat(
        ("*.mlp.gate.wg",),
        ("hunyuan_v1_moe",),
        BuiltFloat(
            "it chooses experts: it is small, and a wrong choice is costly",
            source="vLLM 0.26, models/hunyuan_v1.py; SGLang 0.5.16, models/hunyuan.py",
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
        ("*.indexer.weights_proj", "*.indexer.wk"),
        ("deepseek_v32", "glm_moe_dsa"),
        BuiltFloat(
            "the engine merges it into wk_weights_proj, which it keeps in bfloat16",
            _BOTH,
            "quant_config=None in vLLM 0.26 and 0.32, models/deepseek_v2.py, Indexer; "
            "SGLang 0.5.16, layers/attention/dsa/dsa_indexer.py",
        ),
    ),
    KeptFloat(
        ("*.conv.in_proj", "*.conv.out_proj"),
        ("lfm2", "lfm2_moe"),
        BuiltFloat(
            "ShortConv takes no quantization before vLLM 0.32",
            ("vLLM",),
            "no quant_config in vLLM 0.26, layers/mamba/short_conv.py",
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
        ("*.conv1d", "*.?_conv1d", "*.conv.conv", "*.A_log"),
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
