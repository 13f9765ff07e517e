"""What vLLM is started with, by the device that is there."""

from __future__ import annotations

import os

import pytest
import torch

from flowrl.engines.base import GenerationConfig
from flowrl.engines.vllm_settings import set_environment


@pytest.mark.parametrize(("has_gpu", "method"), [(True, "spawn"), (False, None)])
def test_beside_a_gpu_no_process_of_vllm_is_forked_from_one_that_has_asked_for_it(monkeypatch, has_gpu, method):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    set_environment(GenerationConfig(model="", layout="processes"))
    assert os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") == method
    assert ("TORCHDYNAMO_DISABLE" in os.environ) is not has_gpu


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"VLLM_WORKER_MULTIPROC_METHOD": "fork"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_environment(GenerationConfig(model="", layout="processes"))
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
