"""Where people do not judge, given pairs are learned in their place: order, credits and bound stay what they were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.data.examples import ExampleData, ExampleRow
from flowrl.errors import ConfigError, DataError
from flowrl.graph.graph import Graph, Queue
from flowrl.runs.verify import judge
from flowrl.runtime.ledger import read_entries
from flowrl.stages.humans import Humans
from flowrl.stages.offline_pairs import OfflinePairs
from flowrl.stages.sampler import Sampler
from flowrl.telemetry.events import Step
from flowrl.telemetry.records import read_samples, step_path
from tests.support.tiny import tiny_model
from tests.unit.stages.test_humans import judged
from tests.unit.stages.test_selector import graph

if TYPE_CHECKING:
    from pathlib import Path


class NumberedPairs(OfflinePairs):
    """The real exchange of groups for pairs, which are numbered, without a tokenizer."""

    def _open(self) -> Any:
        def row_at(position: int) -> ExampleRow:
            return ExampleRow(prompt_ids=[7, position], responses=[[8, position], [9]], kind="preference", index=0,
                              place="")  # fmt: skip

        return SimpleNamespace(row_at=row_at), lambda ids: " ".join(map(str, ids))


def mixed(**config: object) -> Graph:
    """The flow of test_humans.py with given pairs behind people."""
    humans = Humans(msgspec.convert(config, Humans.Config), passes=True)
    bare = graph(steps=4, per_step=3, max_staleness=1, judge=humans)
    offline = NumberedPairs(OfflinePairs.Config(), bare.nodes["prompts"].arguments["sampler"])
    edges = [edge for edge in bare.edges if edge.source is not humans.scored]
    edges += [Queue(humans.scored, offline.judged), Queue(offline.scored, bare.nodes["select"].ports["scored"])]  # type: ignore[arg-type]
    return Graph(nodes={**bare.nodes, "offline": offline}, edges=edges, until=bare.until)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "ignored"), [({"asked": 0.5}, 0), ({"deadline_s": 20.0, "undo_s": 2.0}, 2)])
def test_what_people_do_not_judge_is_replaced_by_given_pairs(
    config: dict[str, float], ignored: int, tmp_path: Path
) -> None:
    events = judged(tmp_path, mixed(**config), ignored=ignored)
    entries = read_entries(tmp_path / "ledger.jsonl")
    assert [entry.group for entry in entries if entry.event == "learned"] == [*range(12)], "no place is lost"
    assert judge(entries, max_staleness=1, is_finished=True).is_clean
    steps = [event for event in events if isinstance(event, Step)]
    assert max(stale for step in steps for stale in step.staleness) <= 1
    groups = [group for step in range(4) for group in read_samples(step_path(tmp_path / "rollouts", step))]
    assert [group.metrics["judged"] for group in groups] == [float(k % 2) for k in range(12)]
    assert sum(step.metrics["judged"] for step in steps) == pytest.approx(2.0), "half of the pairs are people's"
    for group in groups:
        if not group.group_id % 2:
            assert group.token_ids.tolist() == [7, group.group_id]
            assert [sample.text for sample in group.samples] == [f"8 {group.group_id}", "9"]
            assert group.generator == "", "no generator sampled it"
        assert group.rewards == [1.0, 0.0]


def test_what_nobody_is_asked_about_needs_something_in_its_place() -> None:
    Humans(Humans.Config(asked=0.5), passes=True).check(lambda _: None)
    with pytest.raises(ConfigError, match=r"humans.asked: 0.5 leaves groups that nobody judges"):
        Humans(Humans.Config(asked=0.5)).check(lambda _: None)


@pytest.mark.slow
def test_only_preferences_are_pairs(tmp_path: Path) -> None:
    model, file = str(tiny_model(tmp_path / "model")), tmp_path / "rows.jsonl"
    said: list[str] = []

    def check(row: str, **data: object) -> None:
        file.write_text(row)
        told = ExampleData(source=str(file), **{"num_heldout": 0, **data})  # type: ignore[arg-type]
        OfflinePairs(OfflinePairs.Config(data=told), Sampler(model=model)).check(said.append)

    check('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert said == ["offline: 1 pairs, learned in the place of groups that people do not judge"]
    with pytest.raises(DataError, match=r"rows.jsonl:1: is prompt-completion data"):
        check('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ConfigError, match=r"offline.data.num_heldout: 1 pairs would be held out"):
        check('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', num_heldout=1)
