"""What every test process needs before any library is loaded, and the tiny model."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Threads that spin while they wait slow every other process on the same cores down several times; compilation and the
# hub cost seconds and need a network. Set here because libraries read these when they are imported; processes that
# tests start inherit them.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCHDYNAMO_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "WANDB_MODE": "disabled",
    }
)
if not Path("/dev/nvidia0").exists():
    os.environ["DS_ACCELERATOR"] = "cpu"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is put in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what the tests start is to hear a Ctrl-C


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer float32 Llama with its tokenizer, in Hugging Face format."""
    from tests.support.tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny"))
