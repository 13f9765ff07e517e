"""Published configurations of models that are not here, as directories without weights, for `flowrl check`.

The numbers are those of each model's config.json on the hub. The tokenizer is the tiny one, so what a check says of
prompts' lengths means nothing; context, vocabulary size, heads and experts are the model's own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

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
}  # fmt: skip
PUBLISHED["OpenRLHF/Llama-3-8b-rm-mixture"] = PUBLISHED["meta-llama/Meta-Llama-3-8B-Instruct"] | {
    "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"},
}  # fmt: skip


def published_model(name: str, root: Path) -> Path:
    """Write a published model's configuration beside an empty safetensors file and return the directory."""
    directory = root / name.replace("/", "--")
    if not directory.exists():
        directory.mkdir(parents=True)
        tiny_tokenizer().save_pretrained(directory)
        (directory / "config.json").write_text(json.dumps(PUBLISHED[name]))
        (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return directory
