"""Layers compiled by torch.compile: one graph for all of a model's layers, cut only where attention is computed.

Whole models compile for minutes and again for every shape; a layer compiles once for lengths of any size, and all
layers share what was made of the first. Attention is left as it is: its kernels are compiled already, and how many it
calls follows from the batch.

Invariants:
- what is computed is the same, up to rounding;
- agreement.py holds it against the model's own forward when an engine opens.

Called by trainer.

Tests: tests/unit/engines/test_compiled.py, tests/contracts/test_compiled.py
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from typing import TYPE_CHECKING

import torch

from flowrl.engines.savings import layers_of
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flowrl.engines.base import Scoring, Training


def check_compile(settings: Scoring | Training, where: str, *, has_gpu: bool) -> None:
    """Insist on what compiling needs, before anything is loaded.

    Raises:
        ConfigError: there is no compiler for the device, or a setting changes what a layer does while it runs.
    """
    if not getattr(settings, "compile", False):
        return
    where, leave = f"{where}.compile", "leave it false"
    if has_gpu and importlib.util.find_spec("triton") is None:
        raise ConfigError(where, "there is no triton, which compiles for GPUs", f"install triton, or {leave}")
    compiler = os.environ.get("CXX") or "g++"
    if not has_gpu and shutil.which(compiler) is None:
        raise ConfigError(where, f"there is no C++ compiler ({compiler})", f"install g++, or {leave}")
    changes = (
        ("routing=replay", getattr(settings, "routing", "own") == "replay"),
        ("lora.bits", settings.lora.bits > 0),
        ("sequence_parallel", settings.sequence_parallel > 1),
        ("tensor_parallel", settings.tensor_parallel > 1),
        ("zero_stage=3", settings.zero_stage == 3),
    )
    for name, is_set in changes:
        if is_set:
            raise ConfigError(where, f"layers cannot be compiled with {name}", leave)


def compile_layers(model: PreTrainedModel, where: str) -> None:
    """Have each layer of a model compiled when it first runs.

    Raises:
        ConfigError: its layers cannot be told apart, or nothing is compiled in this process.
    """
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        what = "TORCHDYNAMO_DISABLE=1, as vLLM has it on CPUs: nothing is compiled in a process that it shares"
        raise ConfigError(f"{where}.compile", what, "take runtime=ray, or leave it false")
    layers = layers_of(model)
    if not layers:
        raise ConfigError(f"{where}.compile", f"no layers of {type(model).__name__} are known", "leave it false")
    _leave_attention()
    with warnings.catch_warnings():  # torch uses what it has deprecated itself
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")
    for layer in layers:
        layer.compile(dynamic=True)


def _leave_attention() -> None:
    """Have compiled layers call attention as it is; torch's own compiles with them where it is asked for by name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from flowrl.engines.attention import NAME, attend

    ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(attend))
