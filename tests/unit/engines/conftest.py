"""A tiny Llama and a tiny reward model on disk, written once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    directory = tiny_model(tmp_path_factory.mktemp("tiny-reward"))
    torch.manual_seed(3)
    settings = LlamaConfig.from_pretrained(directory, num_labels=1)
    LlamaForSequenceClassification(settings).save_pretrained(directory)
    return directory
