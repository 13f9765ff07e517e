"""Texts of a pre-training loss: those of step v are learned in step v, whatever dies, stops or is resumed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from flowrl.config import Select
from flowrl.engines.base import Sampling
from flowrl.errors import ConfigError, DataError
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.runtime.supervisor import newest_start
from flowrl.simulation.fake import FakeTraining
from flowrl.simulation.stand_ins import stand_in_model
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.sampler import Learning, Sampler
from flowrl.stages.texts import TextSource
from tests.support.flows import NULL, NumberedPrompts, Scorer, run
from tests.support.offline import Rows, example_row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.engines.base import TokenGroup
    from flowrl.runtime.local import LocalWorkers

STEPS, GROUPS, PER_STEP = 6, 2, 3
ROWS = Rows([example_row([3], [[4, 5 + k]]) for k in range(7)])


class NumberedTexts(TextSource):
    """Text k ends in token 5 + k % 7, without a tokenizer."""

    def load(self) -> Any:
        return ROWS


class Noting(FakeTraining):
    """Notes what each pre-training loss was taken over, by the optimizer step."""

    seen: ClassVar[list[tuple[int, list[int], Select]]] = []

    def accumulate(self, groups: Sequence[TokenGroup], objective: Select) -> dict[str, float]:
        if objective.use.endswith("Pretraining"):
            self.seen.append((self.steps, [group.responses[0].tolist()[-1] - 5 for group in groups], objective))
            return {"nll": 2.0}
        return super().accumulate(groups, objective)


def graph(*, steps: int = STEPS, minibatches: int = 1, save_every: int = 0) -> Graph:
    sampler = Sampler(model=stand_in_model(), sampling=Sampling(max_tokens=4))
    learning = Learning(algorithm=Select(use=NULL), steps=steps, groups_per_step=GROUPS, max_staleness=1)
    prompts = NumberedPrompts(Prompts.Config(), sampler)
    generator = Generator(Generator.Config(engine="flowrl.simulation.fake:FakeGeneration"), sampler)
    scorer = Scorer(Scorer.Config())
    learner = Learner(
        Learner.Config(engine=f"{__name__}:Noting", save_rollouts=False, minibatches=minibatches,
                       save_every=save_every),
        sampler, learning, TextSource.Config(per_step=PER_STEP, coef=0.5),
    )  # fmt: skip
    texts = NumberedTexts(learner.beside, model=stand_in_model())
    return Graph(
        nodes={"prompts": prompts, "generator": generator, "scorer": scorer, "texts": texts, "learner": learner},
        edges=[
            Queue(prompts.prompts, generator.prompts, depth=4),
            Queue(generator.rollouts, scorer.rollouts, depth=4),
            Queue(scorer.samples, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits, is_endless=True),
            Queue(learner.wanted, texts.wanted, depth=1),
            Queue(texts.texts, learner.texts, depth=1, most=1),
        ],
        until=learner,
    )


def expected(first: int, last: int) -> list[tuple[int, list[int]]]:
    return [(step, [(step * PER_STEP + k) % 7 for k in range(PER_STEP)]) for step in range(first, last)]


def learned() -> list[tuple[int, list[int]]]:
    return [(step, texts) for step, texts, _ in Noting.seen]


def test_every_step_learns_its_own_texts_with_their_coefficient_and_tells_their_figures(tmp_path: Path):
    Noting.seen.clear()
    steps = run(graph(), tmp_path).steps
    assert learned() == expected(0, STEPS)
    assert Noting.seen[0][2].load("objective").coef == 0.5
    assert all(step.metrics["texts.nll"] == 2.0 for step in steps)


def test_every_minibatch_gets_its_share_of_the_texts(tmp_path: Path):
    Noting.seen.clear()
    run(graph(steps=2, minibatches=2), tmp_path)
    assert learned() == [(0, [0, 2]), (1, [1]), (2, [3, 5]), (3, [4])]


@pytest.mark.parametrize("when_s", [0.005, 0.02, 0.05, 0.1])
def test_a_source_that_dies_is_asked_again(when_s: float, tmp_path: Path):
    Noting.seen.clear()

    async def chaos(workers: LocalWorkers) -> None:
        await asyncio.sleep(when_s)
        await workers.kill("texts.0")

    outcome = run(graph(), tmp_path, chaos=chaos).outcome
    assert outcome.recoveries["texts"] == 1
    assert learned() == expected(0, STEPS)


def test_a_resumed_run_goes_on_with_the_texts_that_come_next(tmp_path: Path):
    run(graph(steps=4, save_every=2), tmp_path)
    Noting.seen.clear()
    run(graph(save_every=2), tmp_path, resume=newest_start(tmp_path, lambda *_: None))
    assert learned() == expected(4, STEPS)


def test_fewer_texts_than_minibatches_are_refused():
    stage = graph().until
    assert isinstance(stage, Learner)
    stage.beside, stage.config = TextSource.Config(per_step=1), Learner.Config(minibatches=2)
    with pytest.raises(ConfigError, match=r"texts\.per_step: 1 texts a step are too few for 2 learner\.minibatches"):
        stage.check(lambda _: None)


@pytest.mark.parametrize(
    ("rows", "error"),
    [(Rows([example_row([3], [[4], [5]])]), None), (Rows([example_row([3], [[4]], masks=[[0]])]), DataError)],
)
def test_texts_without_anything_to_learn_are_refused_before_the_run(
    rows: Rows, error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
):
    source = TextSource(TextSource.Config(per_step=1), model=stand_in_model())
    monkeypatch.setattr(source, "load", lambda: rows)
    if error is None:
        source.check(lambda _: None)
        return
    with pytest.raises(error, match="finds nothing to learn"):
        source.check(lambda _: None)


def test_texts_that_would_be_held_out_for_nothing_are_refused():
    data = TextSource.Config().data
    source = TextSource(TextSource.Config(per_step=1, data=type(data)(num_heldout=8)), model=stand_in_model())
    with pytest.raises(ConfigError, match=r"texts\.data\.num_heldout: 8 texts would be held out"):
        source.check(lambda _: None)
