"""Tiny models of other families than tests.support.tiny's Llama, with random weights and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 16},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "FalconForCausalLM": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 2, "n_head": 2},
    "GraniteForCausalLM": {"logits_scaling": 3.0},
    "CohereForCausalLM": {"logit_scale": 0.3},
    "Gemma2ForCausalLM": {"head_dim": 32, "final_logit_softcapping": 5.0},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "MambaForCausalLM": {"state_size": 8},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "JambaForCausalLM": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
        "use_mamba_kernels": False,
    },
}  # fmt: skip


def write_family(family: str, directory: Path) -> Any:
    """Write a tiny model of a family with random weights; returns it."""
    import torch
    import transformers

    torch.manual_seed(1)
    kind = getattr(transformers, family)
    size = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.2}
    instance = kind(kind.config_class(**{**size, **heads, **FAMILIES[family]})).eval()
    instance.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return instance
