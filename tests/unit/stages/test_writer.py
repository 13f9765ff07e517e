"""What is sampled reaches the files exactly once and in order, whatever ends on the way; what is taken of a group."""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.data.prompts import PromptData
from flowrl.data.written import asked_and_answered
from flowrl.engines.base import Sampling
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Buffer, Rollouts, Sample, Scored, extend
from flowrl.runs.verify import judge
from flowrl.runtime.ledger import read_entries
from flowrl.runtime.supervisor import newest_start
from flowrl.simulation.stand_ins import stand_in_model
from flowrl.stages.generator import Generator
from flowrl.stages.prompts import Prompts
from flowrl.stages.sampler import Sampler
from flowrl.stages.writer import Writer, whole_answers
from tests.support.chaos import Chaos
from tests.support.flows import NumberedPrompts, NumberedRows, run

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.stage import Context

RAW = PromptData(chat_template=False)


class ListedRows(NumberedRows):
    def __init__(self, count: int) -> None:
        self.train = [None] * count

    def row_at(self, position: int) -> Any:
        row = super().row_at(position)
        row.columns = {"prompt": f"number {position}"}
        return row


class ListedPrompts(NumberedPrompts):
    """The real admission of a data set that ends."""

    def __init__(self, config: Prompts.Config, sampler: Sampler, *, count: int, epochs: int) -> None:
        super().__init__(config, sampler, epochs=epochs)
        self.count = count

    def load(self) -> Any:
        return ListedRows(self.count)


class Judge(Stage):
    """Scores sample i of group k (7 k + 3 i) % 5; every n-th group fails."""

    class Config(StageConfig):
        fail_every: int = 0

    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, config: Config) -> None:
        self.config: Judge.Config = config

    async def run(self, context: Context) -> None:
        async for group in self.rollouts:
            k = group.group_id
            if self.config.fail_every and k % self.config.fail_every == self.config.fail_every - 1:
                await self.rollouts.reject(group, kind="failed", reason="every n-th")
                continue
            rewards = [float((7 * k + 3 * i) % 5) for i in range(len(group.samples))]
            await self.scored.put(extend(Scored, group, scores={"judge": rewards}))


def graph(config: Writer.Config, *, count: int, epochs: int = 1, fail_every: int = 0, replicas: int = 2) -> Graph:
    sampler = Sampler(model=stand_in_model(), data=RAW, sampling=Sampling(max_tokens=4), group_size=3)
    prompts = ListedPrompts(Prompts.Config(), sampler, count=count, epochs=epochs)
    generator = Generator(
        Generator.Config(replicas=replicas, max_groups=2, engine="flowrl.simulation.fake:FakeGeneration"), sampler
    )
    reward = Judge(Judge.Config(fail_every=fail_every))
    writer = Writer(config, sampler)
    return Graph(
        nodes={"prompts": prompts, "generator": generator, "reward": reward, "writer": writer},
        edges=[
            Queue(prompts.prompts, generator.prompts, depth=3),
            Queue(generator.rollouts, reward.rollouts, depth=3),
            Queue(reward.scored, writer.scored),
            Latest(prompts.ended, writer.ended),
            Credits(writer.released, prompts.credits),
        ],
        until=writer,
    )


def written(run_dir: Path) -> list[dict[str, Any]]:
    files = sorted((run_dir / "data").iterdir())
    assert [path.name for path in files] == [f"train-{k:06d}.jsonl" for k in range(len(files))], "and nothing else"
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("count", "epochs", "per_file"), [(7, 1, 3), (6, 1, 3), (2, 3, 4), (1, 1, 9)])
def test_every_sample_of_every_prompt_is_written_once_in_order(count: int, epochs: int, per_file: int, tmp_path: Path):
    ran = run(graph(Writer.Config(groups_per_file=per_file), count=count, epochs=epochs), tmp_path)
    rows, groups = written(tmp_path), count * epochs
    assert [(row["group_id"], row["sample"]) for row in rows] == [(k, i) for k in range(groups) for i in range(3)]
    assert [row["reward"] for row in rows[:6]] == [0.0, 3.0, 1.0, 2.0, 0.0, 3.0][: 3 * groups]
    assert rows[0]["prompt"] == "number 0"
    assert rows[-1]["row"] == {"prompt": f"number {groups - 1}"}
    assert ran.outcome.totals == {"admitted": groups, "learned": groups, "filtered": 0, "failed": 0, "unfinished": 0}
    assert (ran.steps[-1].version, ran.steps[-1].num_steps) == (-(-groups // per_file),) * 2


def test_the_best_is_a_demonstration_and_the_pair_a_preference(tmp_path: Path):
    run(graph(Writer.Config(take="best", min_reward=4.0), count=10), tmp_path / "best")
    best = [(row["group_id"], row["sample"], row["reward"]) for row in written(tmp_path / "best")]
    assert best == [(2, 0, 4.0), (3, 1, 4.0), (4, 2, 4.0), (7, 0, 4.0), (8, 1, 4.0), (9, 2, 4.0)]
    run(graph(Writer.Config(take="pair", min_gap=3.0), count=5), tmp_path / "pair")
    pairs = written(tmp_path / "pair")
    assert [(row["group_id"], row["score_chosen"], row["score_rejected"]) for row in pairs] == [(2, 4.0, 0.0)]
    reasons = [entry.reason for entry in read_entries(tmp_path / "pair" / "ledger.jsonl") if entry.event == "filtered"]
    assert len(reasons) == 4
    assert reasons[0] == "rewards from 0 to 3 differ by no more than 3"


@pytest.mark.parametrize("fail_every", [1, 2, 5])
def test_a_run_ends_though_its_last_groups_fail_or_are_filtered(fail_every: int, tmp_path: Path):
    config = Writer.Config(groups_per_file=2, take="pair", min_gap=3.0)
    ran = run(graph(config, count=10, fail_every=fail_every), tmp_path)
    totals = ran.outcome.totals
    assert totals["failed"] == 10 // fail_every
    assert totals["admitted"] == totals["learned"] + totals["filtered"] + totals["failed"] == 10
    if ran.steps:
        assert ran.steps[-1].version == ran.steps[-1].num_steps


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_files_agree_with_the_ledger_after_crashes(seed: int, tmp_path: Path):
    draw = random.Random(seed)
    config = Writer.Config(groups_per_file=draw.randint(1, 4), take=draw.choice(["all", "best", "pair"]))
    program = graph(config, count=draw.randint(1, 20), fail_every=draw.choice([0, 3]), replicas=draw.randint(1, 3))
    straight = run(program, tmp_path / "straight")
    chaos = Chaos(seed, deaths=draw.randint(1, 5), mean_s=0.05)
    run(program, tmp_path / "struck", link=chaos.link, chaos=chaos.strike, max_restarts=10_000)
    assert written(tmp_path / "struck") == written(tmp_path / "straight"), chaos.struck
    entries = read_entries(tmp_path / "struck" / "ledger.jsonl")
    verdict = judge(entries, max_staleness=None, is_finished=True)
    assert verdict.is_clean, (verdict, chaos.struck)
    assert verdict.counts["admitted"] == straight.outcome.totals["admitted"]


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path: Path):
    program = graph(Writer.Config(groups_per_file=2), count=30)
    run(program, tmp_path / "straight")
    stopping, run_dir = asyncio.Event(), tmp_path / "stopped"

    async def stop(_: Any) -> None:
        await asyncio.sleep(0.1)
        stopping.set()

    run(program, run_dir, stopping=stopping, chaos=stop)
    num_before = len(written(run_dir))
    assert 0 < num_before < 90
    run(program, run_dir, resume=newest_start(run_dir, lambda *_: None))
    assert written(run_dir) == written(tmp_path / "straight")


def test_a_response_that_was_cut_or_says_nothing_is_no_example():
    samples = [
        Sample(token_ids=Buffer.ints([5]), logprobs=Buffer.floats([0.0]), versions=[], finish=finish, text=text)
        for finish, text in [("length", " 4 and"), ("stop", " 4."), ("stop", " \n"), ("abort", "4")]
    ]
    group = Scored(group_id=0, token_ids=Buffer.ints([1]), columns={}, num_samples=4, seed=0, samples=samples,
                   generator="", scores={})  # fmt: skip
    assert whole_answers(group) == [1]


def test_a_prefix_is_the_policys_own_words_in_a_conversation_and_the_prompts_in_a_text():
    columns = {"prompt": "2 + 2?", "answer_prefix": "It is"}
    assert asked_and_answered(PromptData(system_prompt="Add."), columns, " 4.") == (
        [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2?"}],
        [{"role": "assistant", "content": "It is 4."}],
    )
    assert asked_and_answered(RAW, columns, " 4.") == ("2 + 2?\nIt is", " 4.")
    turns = [{"role": "user", "content": "Hi"}]
    assert asked_and_answered(PromptData(), {"prompt": turns}, "Hi")[0] == turns
