"""What is kept of a group that failed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from flowrl.errors import RewardError
from flowrl.telemetry.records import quarantine
from tests.support.one_stage import rollouts

if TYPE_CHECKING:
    from pathlib import Path


def test_a_quarantined_group_can_be_read_without_flowrl(tmp_path: Path) -> None:
    group = rollouts("one", "three")
    error = RewardError("reward.0", "raised KeyError")
    path = quarantine(tmp_path, group.group_id, group, where="reward.0", error=error)
    record = json.loads(path.read_text())
    assert path.name == "group-7.json"
    assert (record["where"], record["error"]) == ("reward.0", "reward.0: raised KeyError")
    assert [sample["text"] for sample in record["input"]["samples"]] == ["one", "three"]
    assert record["input"]["token_ids"] == group.token_ids.tolist()
    assert record["input"]["samples"][0]["versions"] == [{"version": 0, "start": 0, "end": 2}]
    assert [each.name for each in path.parent.iterdir()] == ["group-7.json"]
