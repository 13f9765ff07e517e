"""Weights held in 4 or 8 bits under an adapter (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes.

Only layers that stay frozen are quantized, never heads; what leaves the engine is dequantized first, so that generators
and saved models hold plain weights, the very ones that the learner computes with. Called by models and lora;
`check_quantization` by the stages before a run.

Tests: tests/unit/engines/test_lora.py
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from flowrl.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flowrl.engines.base import Lora

INT8_MAX = 127
HEADS = ["lm_head", "score"]  # stay in full precision


def check_quantization(lora: Lora, where: str, *, has_gpu: bool) -> None:
    """Insist on what holding weights in 4 or 8 bits takes; `has_gpu` says whether a rank will have one.

    Raises:
        ConfigError: something is missing, by name.
    """
    if not lora.bits:
        return
    missing = [] if importlib.util.find_spec("bitsandbytes") else ["package bitsandbytes (pip install bitsandbytes)"]
    if not has_gpu:
        missing.append("a CUDA device")
    if missing:
        what = f"{lora.bits}-bit weights need {' and '.join(missing)}"
        raise ConfigError(f"{where}.lora.bits", what, "set it to 0, for LoRA on unquantized weights")


def quantized_loading(lora: Lora, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` must be told: NF4 with quantized constants (sections 3.1, 3.2), or LLM.int8()."""
    from transformers import BitsAndBytesConfig

    kinds: dict[int, dict[str, Any]] = {
        4: {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        8: {"load_in_8bit": True},
    }
    quantization = BitsAndBytesConfig(**kinds[lora.bits], llm_int8_skip_modules=HEADS)
    return {"quantization_config": quantization, "device_map": {"": device}}


def forget_quantization(model: Any) -> None:
    """Take the mark of quantized weights off a model's config: what is saved of it is plain."""
    del model.config.quantization_config
    model.hf_quantizer = None


def dequantized(module: Any) -> Tensor:
    """Return a quantized layer's weight as it counts in the forward pass; the layer is left as it is."""
    weight = module.weight
    if hasattr(weight, "quant_state"):  # 4 bits
        from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]  # installed only with GPUs

        return dequantize_4bit(weight.data, weight.quant_state)
    largest = module.state.SCB if weight.SCB is None else weight.SCB  # of each row; moved at the first forward
    return weight.data.float() * (largest.view(-1, 1) / INT8_MAX)
