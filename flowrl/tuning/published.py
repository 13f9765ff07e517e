"""Published configurations of the models that recipes and examples name, for plans where the models are not here.

The numbers are those of each model's config.json on the hub. What they amount to in parameters is counted as
transformers builds them (`PARAMETERS`). Called by shapes.py, and by tests that check recipes against them.

Tests: tests/unit/tuning/test_shapes.py
"""

from __future__ import annotations

from typing import Any

PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "Qwen/Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "meta-llama/Llama-2-7b-chat-hf": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "float16",
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32768, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "tiiuae/falcon-7b-instruct": {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32,
        "num_attention_heads": 71, "num_key_value_heads": 71, "multi_query": True, "new_decoder_architecture": False,
        "parallel_attn": True, "alibi": False, "bias": False, "vocab_size": 65024, "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    },
    "mistralai/Mixtral-8x7B-Instruct-v0.1": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02, "vocab_size": 32000,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "weqweasd/RM-Mistral-7B": {
        "architectures": ["MistralForSequenceClassification"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "id2label": {"0": "LABEL_0"},
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    },
    "meta-llama/Llama-2-13b-chat-hf": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "float16",
    },
    "codellama/CodeLlama-34b-hf": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 22016,
        "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 16384, "rope_theta": 1000000, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "meta-llama/Llama-2-70b-chat-hf": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "float16",
    },
}  # fmt: skip
PUBLISHED["OpenRLHF/Llama-3-8b-rm-mixture"] = PUBLISHED["meta-llama/Meta-Llama-3-8B-Instruct"] | {
    "architectures": ["LlamaForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
}
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134515008,
    "OpenRLHF/Llama-3-8b-rm-mixture": 7504928768,
    "Qwen/Qwen3-8B": 8190735360,
    "codellama/CodeLlama-34b-hf": 33743970304,
    "meta-llama/Llama-2-13b-chat-hf": 13015864320,
    "meta-llama/Llama-2-70b-chat-hf": 68976648192,
    "meta-llama/Llama-2-7b-chat-hf": 6738415616,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8030261248,
    "mistralai/Mistral-7B-Instruct-v0.3": 7248023552,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46702792704,
    "tiiuae/falcon-7b-instruct": 6921720704,
    "weqweasd/RM-Mistral-7B": 7110664192,
}
