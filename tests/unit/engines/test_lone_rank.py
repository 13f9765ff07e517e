"""One rank alone sends itself no message, a broken group leaves its process alone and a rank that fails its peers."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d

from flowrl.engines.deepspeed_interrupt import answered_alone
from flowrl.engines.ranks import RankLink
from flowrl.engines.weights.broadcast import BroadcastGroup
from flowrl.errors import StageError


def collective(name: str) -> Any:
    def sends(*arguments: Any, **further: Any) -> None:
        raise AssertionError(f"{name} sent a message")

    return answered_alone(name, sends)


def test_a_collective_of_one_rank_is_its_input_and_sends_nothing() -> None:
    given, into = torch.arange(6.0), torch.zeros(6)
    assert collective("all_reduce")(given, async_op=False) is None
    collective("all_gather_into_tensor")(into, given)
    assert torch.equal(into, given)
    pieces = [torch.zeros(2, 3)]
    collective("all_gather")(tensor_list=pieces, tensor=given.view(2, 3))
    assert torch.equal(pieces[0], given.view(2, 3))
    into.zero_()
    assert collective("reduce_scatter")(into, [given], async_op=True).wait()
    assert torch.equal(into, given)


def test_an_nccl_group_is_made_so_that_its_failure_ends_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    class Nccl:
        Options = SimpleNamespace

        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            made.update({name: os.environ[name] for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING",)})
            made["timeout"] = options._timeout

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    BroadcastGroup(dist.HashStore(), "x", rank=0, size=2, device=torch.device("cuda", 0), host="h", timeout_s=7.0)
    assert made == {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "timeout": timedelta(seconds=7)}
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3", "other groups keep what they had"


@pytest.mark.parametrize(("backend", "ended"), [("nccl", "aborted"), ("gloo", "destroyed")])
def test_a_rank_that_fails_does_not_wait_for_the_others_collectives(
    monkeypatch: pytest.MonkeyPatch, backend: str, ended: str
) -> None:
    link, done = object.__new__(RankLink), []
    vars(link).update(
        rank=1, world_size=2, is_broken=False, _where="learner rank 1", _control=object(), _votes=object(),
        _store=HashStore(),
    )  # fmt: skip
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda: done.append("aborted"))
    with pytest.raises(StageError, match="step: ZeroDivisionError"), link.guard("step"):
        raise ZeroDivisionError
    assert done == [ended]
    assert link._store.get("failed/1").startswith(b"ZeroDivisionError")
