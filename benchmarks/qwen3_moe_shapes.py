"""The shapes of Qwen3's mixtures of experts, for benchmarks that write random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama_shapes import Shapes


@dataclass(frozen=True)
class Qwen3Moe:
    """The sides of a Qwen3 with experts: of its stream, an expert, its queries and its keys.

    ``experts`` is the number of a layer's experts, ``chosen`` that of the experts of a token.
    """

    hidden: int
    inner: int
    queries: int
    keys: int
    experts: int
    chosen: int
    vocabulary: int
    head: int = 128

    def layer(self, number: int) -> Shapes:
        """The tensors of decoder layer ``number``."""
        hidden, inner = self.hidden, self.inner
        shapes: Shapes = {
            "self_attn.q_proj": (self.queries, hidden),
            "self_attn.k_proj": (self.keys, hidden),
            "self_attn.v_proj": (self.keys, hidden),
            "self_attn.o_proj": (hidden, self.queries),
            "self_attn.q_norm": (self.head,),
            "self_attn.k_norm": (self.head,),
            "mlp.gate": (self.experts, hidden),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        for expert in range(self.experts):
            shapes[f"mlp.experts.{expert}.gate_proj"] = (inner, hidden)
            shapes[f"mlp.experts.{expert}.up_proj"] = (inner, hidden)
            shapes[f"mlp.experts.{expert}.down_proj"] = (hidden, inner)
        return {f"model.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}

    def outer(self) -> Shapes:
        """The tensors outside of layers."""
        words = (self.vocabulary, self.hidden)
        return {
            "model.embed_tokens.weight": words,
            "lm_head.weight": words,
            "model.norm.weight": (self.hidden,),
        }

    def config(self, layers: int) -> dict[str, Any]:
        """``config.json``."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": 8 * self.inner,
            "moe_intermediate_size": self.inner,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_hidden_layers": layers,
            "num_attention_heads": self.queries // self.head,
            "num_key_value_heads": self.keys // self.head,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


QWEN3_30B_A3B = Qwen3Moe(2048, 768, 4096, 512, 128, 8, 151936)
