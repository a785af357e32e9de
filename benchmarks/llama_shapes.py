"""The shapes of Llamas, for benchmarks that write random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Llama:
    """The sides of a Llama: of its stream, its MLP and its keys; its words, and a head's size."""

    hidden: int
    inner: int
    keys: int
    vocabulary: int
    tied: bool = False
    head: int = 128

    def layer(self, number: int) -> Shapes:
        """The tensors of decoder layer ``number``."""
        hidden, inner, keys = self.hidden, self.inner, self.keys
        shapes: Shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        return {f"model.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}

    def outer(self) -> Shapes:
        """The tensors outside of layers."""
        words = (self.vocabulary, self.hidden)
        head: Shapes = {} if self.tied else {"lm_head.weight": words}
        return {"model.embed_tokens.weight": words, **head, "model.norm.weight": (self.hidden,)}

    def config(self, layers: int) -> dict[str, Any]:
        """``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": layers,
            "num_attention_heads": self.hidden // self.head,
            "num_key_value_heads": self.keys // self.head,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


LLAMA_2_7B = Llama(4096, 11008, 4096, 32000)
LLAMA_2_70B = Llama(8192, 28672, 1024, 32000)
LLAMA_3_8B = Llama(4096, 14336, 1024, 128256)
LLAMA_3_2_3B = Llama(3072, 8192, 1024, 128256, tied=True)
