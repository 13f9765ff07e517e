"""Tiny models of the families that people align, with random weights, their real quirks and tiny's tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.engines.base import TokenGroup

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}  # fmt: skip
# vLLM has multi-head latent attention on CPUs for a rank of 512 with 64 rotated dimensions only.
LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32,
}  # fmt: skip
SMALL_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
SLIDING: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}
FAMILIES: dict[str, dict[str, Any]] = {
    "ApertusForCausalLM": {},
    "ArceeForCausalLM": {},
    "BambaForCausalLM": {**SMALL_MAMBA, "attn_layer_indices": [1]},
    "BitNetForCausalLM": {},
    "BloomForCausalLM": {"n_layer": 2, "n_head": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "CohereForCausalLM": {"logit_scale": 0.3},
    "Cohere2ForCausalLM": {"logit_scale": 0.3, **SLIDING},
    "CwmForCausalLM": {},
    "DeepseekV2ForCausalLM": {**ROUTED, **LATENT, "q_lora_rank": None, "routed_scaling_factor": 1.0},
    "DeepseekV3ForCausalLM": {**ROUTED, **LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},  # vLLM's names
    "Dots1ForCausalLM": ROUTED,
    "Ernie4_5ForCausalLM": {"head_dim": 32},
    "Ernie4_5_MoeForCausalLM": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1,
    },
    "Exaone4ForCausalLM": {"sliding_window": 16, "sliding_window_pattern": 2},
    "FalconForCausalLM": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2, "hidden_dropout": 0.1},
    "FalconH1ForCausalLM": {**SMALL_MAMBA, "head_dim": 32, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5},
    "FalconMambaForCausalLM": {"state_size": 8},
    "FlexOlmoForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "GemmaForCausalLM": {"head_dim": 32},
    "Gemma2ForCausalLM": {
        "head_dim": 32, "final_logit_softcapping": 5.0, "sliding_window": 16, "query_pre_attn_scalar": 32,
    },
    "Gemma3ForCausalLM": {"head_dim": 32, **SLIDING},
    "Gemma3nForCausalLM": {
        "head_dim": 32, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0,
        "laurel_rank": 8, "intermediate_size": [128, 128], "activation_sparsity_pattern": [0.0, 0.0],
        **SLIDING,
    },
    "Gemma4ForCausalLM": {
        "head_dim": 32, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0,
        "global_head_dim": 32, **SLIDING,
    },
    "GlmForCausalLM": {"head_dim": 32},
    "Glm4ForCausalLM": {"head_dim": 32},
    "Glm4MoeForCausalLM": {**ROUTED, "head_dim": 32},
    "GPT2LMHeadModel": {**GPT2, "resid_pdrop": 0.1},
    "GPTBigCodeForCausalLM": {**GPT2, "resid_pdrop": 0.1},
    "GPTJForCausalLM": {**GPT2, "rotary_dim": 16},
    "GPTNeoForCausalLM": {
        "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16,
    },
    "GPTNeoXForCausalLM": {"hidden_dropout": 0.1},
    "GptOssForCausalLM": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "intermediate_size": 64, **SLIDING,
    },
    "GraniteForCausalLM": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "GraniteMoeForCausalLM": {"logits_scaling": 3.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeSharedForCausalLM": {
        "logits_scaling": 3.0, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
    },
    "GraniteMoeHybridForCausalLM": {
        **SMALL_MAMBA, "logits_scaling": 3.0, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"],
    },
    "HeliumForCausalLM": {"head_dim": 32},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 32},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 32, "num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 32},
    "HyperCLOVAXForCausalLM": {"head_dim": 32, "logits_scaling": 2.0},
    "JambaForCausalLM": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
        "use_mamba_kernels": False,
    },
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "Lfm2MoeForCausalLM": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "LlamaForCausalLM": {},
    "Llama4ForCausalLM": {
        "intermediate_size_mlp": 128, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2, "attention_chunk_size": 16,
    },
    "MambaForCausalLM": {"state_size": 8},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "MiniMaxForCausalLM": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "block_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "MiniMaxM2ForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    "MistralForCausalLM": {"sliding_window": 16},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "MptForCausalLM": {"d_model": 64, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 512},
    "NemotronForCausalLM": {"head_dim": 32},
    "NemotronHForCausalLM": {
        **{name: value for name, value in ROUTED.items() if name != "first_k_dense_replace"},
        "layers_block_type": ["mamba", "moe", "attention"], "num_hidden_layers": 3, "head_dim": 32,
        "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "OlmoForCausalLM": {"clip_qkv": 4.0},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": SLIDING,
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "OPTForCausalLM": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.1},
    "PersimmonForCausalLM": {"hidden_dropout": 0.1},
    "PhiForCausalLM": {"resid_pdrop": 0.1},
    "Phi3ForCausalLM": {
        "max_position_embeddings": 256, "original_max_position_embeddings": 32, "resid_pdrop": 0.1,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16,
            "original_max_position_embeddings": 32, "partial_rotary_factor": 1.0,
        },
    },
    "PhimoeForCausalLM": {"num_local_experts": 4, "router_jitter_noise": 0.1, "input_jitter_noise": 0.1},
    "Qwen2ForCausalLM": {},
    "Qwen2MoeForCausalLM": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "Qwen3MoeForCausalLM": {**EXPERTS, "head_dim": 32},
    "Qwen3NextForCausalLM": {**EXPERTS, **LINEAR, "head_dim": 32, "shared_expert_intermediate_size": 32},
    "Qwen3_5ForCausalLM": {**LINEAR, "head_dim": 32},
    "RecurrentGemmaForCausalLM": {
        "logits_soft_cap": 5.0, "attention_window_size": 16, "lru_width": 64, "head_dim": 32, "num_hidden_layers": 3,
    },
    "SeedOssForCausalLM": {"head_dim": 32},
    "SmolLM3ForCausalLM": {},
    "StableLmForCausalLM": {"hidden_dropout": 0.1},
    "Starcoder2ForCausalLM": {"residual_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1},
    "VaultGemmaForCausalLM": {"head_dim": 32},
    "xLSTMForCausalLM": {
        "hidden_size": 128, "num_blocks": 2, "num_heads": 2, "head_dim": 64, "qk_dim_factor": 1.0,
        "output_logit_soft_cap": 1.0,
    },
    "Zamba2ForCausalLM": {
        "mamba_d_state": 8, "mamba_headdim": 32, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 16,
        "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "use_shared_attention_adapter": False,
    },
}  # fmt: skip


def write_family(family: str, directory: Path, **settings: Any) -> Any:
    """Write a tiny model of a family with random weights, `settings` of its config changed; returns it."""
    import torch
    import transformers

    torch.manual_seed(1)
    kind = getattr(transformers, family)
    size = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.2}
    instance = kind(kind.config_class(**{**size, **heads, **FAMILIES[family], **settings})).eval()
    instance.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return instance


@torch.no_grad()
def gap_to_own(model: Any, groups: Sequence[TokenGroup], rows: Sequence[Sequence[Any]]) -> float:
    """Return the largest difference of log-probs from those of the model's own forward of each sequence by itself."""
    worst = 0.0
    for item, found in zip(groups, rows, strict=True):
        for response, values in zip(item.responses, found, strict=True):
            ids = torch.tensor([item.prompt_ids.tolist() + response.tolist()])
            logprobs = model(input_ids=ids[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
            own = logprobs[-len(response) :].gather(-1, ids[0, -len(response) :, None])[:, 0]
            worst = max(worst, float(np.abs(own.numpy() - np.asarray(values)).max()))
    return worst
