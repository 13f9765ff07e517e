"""Offline training on fakes: which examples are learned when, what the reference adds, what the learner measures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from flowrl.algorithms.distillation import Distillation
from flowrl.algorithms.dpo import DPO
from flowrl.algorithms.kto import KTO
from flowrl.algorithms.process import Process
from flowrl.algorithms.sft import SFT
from flowrl.config import Select
from flowrl.data.examples import ExampleData
from flowrl.errors import ConfigError, DataError
from flowrl.graph.graph import Credits, Graph, Queue
from flowrl.runtime.local import LocalOptions, run_local
from flowrl.simulation.clock import run_virtual
from flowrl.simulation.stand_ins import stand_in_model
from flowrl.stages.examples import Examples, HeldoutExamples, example_of, load_objective, mismatched_of, try_rows
from flowrl.stages.offline_learner import OfflineLearner, counted, measure, step_groups
from flowrl.stages.reference import ExampleReference
from flowrl.stages.sampler import Course
from flowrl.stages.tokens import example_group
from flowrl.telemetry.events import Evaluation, Event, Span, Step
from tests.support.offline import NUMBERED, NumberedExamples, NumberedHeldout, example_row

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.algorithms.base import Objective
    from flowrl.data.examples import ExampleRow

FAKE = "flowrl.simulation.fake:FakeTraining"
STEPS, PER_STEP = 3, 4


def graph(objective: str, *, replicas: int = 1, evaluate_every: int = 0, engine: str = FAKE) -> Graph:
    course = Course(model=stand_in_model(), data=ExampleData(num_heldout=len(NUMBERED.heldout)),
                    objective=Select(use=objective), steps=STEPS, examples_per_step=PER_STEP)  # fmt: skip
    costs = {"costs": {"calls": {"score": {"call_s": 0.3}, "train": {"call_s": 0.4}}}}
    examples = NumberedExamples(Examples.Config(), course)
    heldout = NumberedHeldout(HeldoutExamples.Config(), course)
    reference = ExampleReference(ExampleReference.Config(engine=FAKE, engine_options=costs, replicas=replicas), course)
    learner = OfflineLearner(
        OfflineLearner.Config(engine=engine, engine_options=costs, evaluate_every=evaluate_every), course
    )
    return Graph(
        nodes={"examples": examples, "heldout": heldout, "reference": reference, "learner": learner},
        edges=[
            Queue(examples.examples, reference.examples, depth=2),
            Queue(reference.referenced, learner.examples),
            Queue(heldout.examples, reference.heldout, depth=1),
            Queue(reference.heldout_referenced, learner.heldout, depth=1),
            Credits(learner.released, examples.credits, is_endless=True),
        ],
        until=learner,
    )


def run(program: Graph, run_dir: Path) -> tuple[dict[str, int], list[Event]]:
    events: list[Event] = []
    options = LocalOptions(run_dir=run_dir, is_virtual=True, consume=events.extend, stall_timeout_s=1000.0)
    return run_virtual(run_local(program, options)).totals, events


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("objective", ["sft:SFT", "dpo:DPO", "kto:KTO"])
def test_every_step_learns_the_next_examples_in_order(objective: str, replicas: int, tmp_path: Path):
    totals, events = run(graph(f"flowrl.algorithms.{objective}", replicas=replicas), tmp_path)
    learned = [e.groups for e in events if isinstance(e, Span) and e.node == "learner" and e.name.startswith("step")]
    assert learned == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert totals["learned"] == STEPS * PER_STEP
    assert totals["failed"] == totals["filtered"] == 0
    assert (tmp_path / "checkpoints" / "step-000003" / "model" / "README.md").is_file()


@pytest.mark.parametrize(("every", "versions"), [(0, [0, 3]), (1, [0, 1, 2, 3]), (2, [0, 2, 3])])
def test_held_out_examples_are_measured_before_after_and_every_so_many_steps(
    every: int, versions: list[int], tmp_path: Path
):
    _, events = run(graph("flowrl.algorithms.dpo:DPO", evaluate_every=every), tmp_path)
    evaluations = [event for event in events if isinstance(event, Evaluation)]
    assert [evaluation.version for evaluation in evaluations] == versions
    assert all(evaluation.scores == [[0.5]] * 4 for evaluation in evaluations), "a tie is right by chance"
    measured = [event.version for event in events if isinstance(event, Step) and "heldout.loss" in event.metrics]
    assert measured == versions[1:]


def test_held_out_scores_stand_in_the_order_of_the_data(tmp_path: Path):
    program = graph("flowrl.algorithms.sft:SFT", replicas=3, engine="tests.support.offline:TokenEngine")
    _, events = run(program, tmp_path)
    scores = next(event.scores for event in events if isinstance(event, Evaluation))
    tokens = [[token for response in row.responses for token in response] for row in NUMBERED.heldout]
    assert scores == [[pytest.approx(-sum(row) / len(row))] for row in tokens]


class Scores:
    """An engine that gives each token of a response that response's number of tokens."""

    def score(self, groups: Any) -> Any:
        return [[np.full(len(r), len(r), dtype=np.float32) for r in group.responses] for group in groups]


def test_an_example_of_kto_brings_the_first_response_to_the_next_other_prompt():
    rows = [example_row(prompt_ids=[p], responses=[[p, n]], labels=[1.0]) for n, p in enumerate([1, 1, 2])]
    assert mismatched_of(lambda k: rows[k % 3], 0, 3) is rows[2]
    assert mismatched_of(lambda k: rows[k % 3], 2, 3) is rows[0]
    example = example_of(rows[0], 5, rows[2])
    assert [response.tolist() for response in example.responses] == [[1, 0], [2, 2]]
    assert example_group(example).responses[0].tolist() == [1, 0]
    assert len(example_group(example).responses) == 1
    assert example_group(example, mismatched=True).responses[0].tolist() == [2, 2]
    with pytest.raises(DataError, match="all 2 rows have one prompt"):
        mismatched_of(lambda k: rows[k % 2], 0, 2)


def test_the_reference_point_is_one_number_for_the_step_from_mismatched_tokens_under_the_mask():
    import msgspec

    from flowrl.messages import Buffer

    first, other = (example_row(prompt_ids=[p], responses=[[1, 2, 3]], labels=[1.0], masks=[[1, 0, 1]]) for p in (1, 2))
    example = example_of(first, 0, other)
    logprobs = [Buffer.floats(values) for values in ([0.0, 0.0, 0.0], [1.0, 50.0, 2.0])]
    example = msgspec.structs.replace(example, ref_logprobs=logprobs)
    (group,) = step_groups(Scores(), KTO(), [example])  # type: ignore[arg-type]
    assert group.columns["reference_point"][0].tolist() == [3.0] * 3  # (3 - 1) + (3 - 2)
    assert group.columns["mask"][0].tolist() == [1.0, 0.0, 1.0]
    assert group.columns["label"][0].tolist() == [1.0] * 3
    assert len(group.responses) == 1
    assert counted([group]) == {"samples": 1.0, "tokens": 2.0}


def test_measuring_adds_up_over_examples_and_scores_each():
    groups = [example_group(example_of(row, 0, None)) for row in NUMBERED.train[:2]]
    metrics, scores = measure(SFT(), groups, Scores().score(groups))
    lengths = [[len(response) for response in row.responses] for row in NUMBERED.train[:2]]
    assert scores == [pytest.approx(sum(n * n for n in row) / sum(row)) for row in lengths]
    flat = [n for row in lengths for n in row]
    assert metrics["loss"] == pytest.approx(-sum(n * n for n in flat) / sum(flat))


@pytest.mark.parametrize(
    ("objective", "row", "has_reference", "said"),
    [
        (DPO(), example_row([1], [[2]], []), True, "rows:1: DPO compares pairs"),
        (DPO(), example_row([1], [[2], [3]], []), False, "needs the column 'reference'"),
        (KTO(), example_row([1], [[2]], []), True, "needs the column 'label'"),
        (
            KTO(),
            example_row([1], [[2], [3]], [0.0, 0.0], kind="preference"),
            True,
            "take DPO, IPO or Pairwise for pairs",
        ),
        (
            SFT(),
            example_row([1], [[2], [3]], [0.0, 0.0], kind="preference"),
            False,
            "data.only_good=true to learn the good",
        ),
        (SFT(), example_row([1], [[2]], [0.0], kind="unpaired-preference"), False, "take KTO for labelled responses"),
        (SFT(), example_row([1], [[2]], [], kind="stepwise-supervision"), False, "take Process for labelled steps"),
        (DPO(), example_row([1], [[2]], [], kind="language-modeling"), True, "DPO learns from pairs; take SFT"),
        (Process(), example_row([1], [[2], [3]], [], kind="preference"), False, "Process learns from labelled steps"),
        (Distillation(), example_row([1], [[2], [3]], [], kind="preference"), True, "learns from demonstrations"),
        (KTO(), example_row([1], [[2]], [1.0]), True, "all 1 responses are labelled good, but KTO needs bad ones"),
        (KTO(), example_row([1], [[2]], [0.0]), True, "labelled bad, but KTO needs good ones"),
        (Process(), example_row([1], [[2]], []), False, "needs the column 'step_label'"),
        (SFT(), example_row([1], [[2, 3]], [], masks=[[0, 0]]), False, "finds nothing to learn"),
        (SFT(), example_row([1], [[2]], [1.0, 2.0]), False, "has 2 labels for 1 responses"),
    ],
)
def test_data_that_an_objective_cannot_learn_from_is_refused(
    objective: Objective, row: ExampleRow, has_reference: bool, said: str
):
    with pytest.raises(DataError) as caught:
        try_rows(objective, [row], has_reference=has_reference)
    assert said in str(caught.value)


@pytest.mark.parametrize("objective", [SFT(), DPO(), KTO()])
def test_data_that_fits_is_taken(objective: Objective):
    rows = NUMBERED.train
    if isinstance(objective, KTO):
        rows = [example_row([k], [[2]], [float(k % 2)]) for k in range(4)]
    try_rows(objective, rows, has_reference=True)


def test_a_step_of_one_example_cannot_hold_both_kinds():
    course = Course(model=stand_in_model(), data=ExampleData(num_heldout=0),
                    objective=Select(use="flowrl.algorithms.kto:KTO"), steps=1, examples_per_step=1)  # fmt: skip
    learner = OfflineLearner(OfflineLearner.Config(), course)
    with pytest.raises(ConfigError, match="examples_per_step: 1 never holds both"):
        learner.check(lambda _: None)


@pytest.mark.parametrize("use", ["flowrl.algorithms.ppo:PPO", "flowrl.algorithms.policy:KL"])
def test_what_is_no_offline_objective_is_refused(use: str):
    with pytest.raises(ConfigError, match="objective"):
        load_objective(Select(use=use))
