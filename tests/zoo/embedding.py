"""Tiny models that embed or rank texts."""

from __future__ import annotations

from zoo.hybrids import JAMBA
from zoo.tiny import Tiny

MODELS: dict[str, Tiny] = {
    "bert_embedding": Tiny("BertModel"),
    "bert_ranking": Tiny("BertForSequenceClassification", {"num_labels": 1}),
    "embedding_gemma": Tiny("Gemma3TextModel"),
    "embedding_gemma2": Tiny("EmbeddingGemma2Model"),
    "gemma2_embedding": Tiny("Gemma2Model"),
    "gpt2_ranking": Tiny("GPT2ForSequenceClassification"),
    "gte": Tiny("GteModel"),
    "jamba_ranking": Tiny("JambaForSequenceClassification", JAMBA),
    "llama_embedding": Tiny("LlamaModel"),
    "llama_ranking": Tiny("LlamaForSequenceClassification"),
    "mistral_embedding": Tiny("MistralModel"),
    "modernbert_embedding": Tiny("ModernBertModel"),
    "modernbert_ranking": Tiny("ModernBertForSequenceClassification"),
    "nomic_bert": Tiny("NomicBertModel"),
    "qwen2_embedding": Tiny("Qwen2Model"),
    "qwen3_embedding": Tiny("Qwen3Model"),
    "qwen3_ranking": Tiny("Qwen3ForSequenceClassification", {"num_labels": 1}),
    "roberta_embedding": Tiny("RobertaModel"),
    "xlm_roberta_embedding": Tiny("XLMRobertaModel"),
    "xlm_roberta_ranking": Tiny("XLMRobertaForSequenceClassification", {"num_labels": 1}),
}
