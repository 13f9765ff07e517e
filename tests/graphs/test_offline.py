"""The offline graphs train: a tiny Llama overfits, prefers, scores and copies, however its examples are packed."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from flowrl.engines.torch import SequenceScoringEngine, TorchEngine
from flowrl.graph.program import load_program
from flowrl.runtime.local import LocalOptions, run_local
from flowrl.runtime.supervisor import newest_start
from flowrl.stages.model_scores import read_normalisation
from flowrl.telemetry.events import Evaluation, Event, Step
from tests.support.command import ROOT
from tests.support.offline import Rows, example_row
from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TORCH, DEEPSPEED = "flowrl.engines.torch:TorchEngine", "flowrl.engines.deepspeed:DeepSpeedEngine"
NAN = float("nan")


class PaddedEngine(TorchEngine):
    """Packs nothing: one response in each row, padded on the right."""

    def _layout(self, longest: int) -> Any:
        return "padded"


@dataclass(frozen=True)
class Ran:
    steps: list[Step]
    evaluations: list[Evaluation]
    run_dir: Path

    @property
    def model(self) -> Path:
        return max((self.run_dir / "checkpoints").glob("step-*")) / "model"

    def curve(self, metric: str) -> list[float]:
        return [step.metrics[metric] for step in self.steps]


class Runner:
    """Runs a shipped graph on given rows."""

    def __init__(self, model: Path, run_dir: Path, patch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.run_dir = run_dir
        self._patch = patch

    def __call__(self, graph: str, rows: Rows, **settings: object) -> Ran:
        return self.run(graph, rows, settings)

    def run(
        self, graph: str, rows: Rows, settings: dict[str, object], *, stop_at: int = 0, resume: Path | None = None
    ) -> Ran:
        """Run to the end, or ask for a stop once step `stop_at` is done; `resume` is a stopped run's directory."""
        self._patch.setattr("flowrl.stages.examples.load_examples", lambda data, tokenizer: rows)
        known: dict[str, object] = {
            "runtime": "local", "model": self.model, "steps": 20, "examples_per_step": len(rows.train),
            "data.num_heldout": len(rows.heldout), "learner.engine": TORCH, "learner.dtype": "float32",
            "learner.lr": 3e-3, "learner.schedule.kind": "constant",
        }  # fmt: skip
        if graph == "preference":
            known["reference.dtype"] = "float32"
        overrides = [f"{name}={value}" for name, value in {**known, **settings}.items()]
        program = load_program(ROOT / "graphs" / f"{graph}.py", overrides=overrides)
        events: list[Event] = []
        run_dir = resume or self.run_dir / f"run{len(list(self.run_dir.iterdir()))}"
        start = newest_start(run_dir, lambda *_: None) if resume else None
        options = LocalOptions(run_dir=run_dir, resume=start, stall_timeout_s=600.0, status_interval_s=0.05)

        def consume(batch: list[Event]) -> None:
            events.extend(batch)
            if stop_at and any(isinstance(event, Step) and event.version >= stop_at for event in batch):
                options.stopping.set()

        options.consume = consume
        asyncio.run(run_local(program.graph, options))
        return Ran(
            steps=[event for event in events if isinstance(event, Step)],
            evaluations=[event for event in events if isinstance(event, Evaluation)],
            run_dir=run_dir,
        )


@pytest.fixture
def runner(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(tiny, tmp_path, monkeypatch)


def random_rows(seed: int, *, count: int = 6, responses: int = 2, **more: Any) -> Rows:
    """Prompts of 2 to 6 tokens with responses of 3 to 8, the first of each labelled 1; two rows are held out."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randint(3, 250) for _ in range(draw.randint(low, high))]

    rows = [
        example_row(prompt_ids=tokens(2, 6), responses=[tokens(3, 8) for _ in range(responses)], place=f"rows:{k}",
            labels=[1.0] + [0.0] * (responses - 1), **more)
        for k in range(count + 2)
    ]  # fmt: skip
    return Rows(rows[:count], rows[count:])


@pytest.mark.parametrize("engine", [TORCH, DEEPSPEED])
def test_sft_overfits_a_few_demonstrations(engine: str, runner: Runner):
    ran = runner("sft", random_rows(1, responses=1), steps=40, **{"learner.engine": engine})
    curve = ran.curve("loss")
    assert curve[-1] < 0.1 < 3.0 < curve[0]
    assert ran.curve("token_probability")[-1] > 0.9
    assert [evaluation.version for evaluation in ran.evaluations] == [0, 40]
    assert ran.evaluations[0].scores == [[pytest.approx(s[0])] for s in ran.evaluations[0].scores]


def test_tokens_outside_the_mask_are_read_but_not_learned(runner: Runner):
    """Two rows differ in what the masked part says; learning the rest works, and the masked part stays unlikely."""
    from flowrl.engines.base import Ranks, TokenGroup, TrainingConfig
    from flowrl.messages import Buffer

    row = example_row([5, 6], responses=[[100, 101, 102, 103, 104, 105]], labels=[], masks=[[1, 1, 0, 0, 1, 1]])
    ran = runner("sft", Rows([row]), steps=30)
    engine = TorchEngine(TrainingConfig(model=str(ran.model), dtype="float32"), where="test", name="test")
    engine.open(Ranks())
    group = TokenGroup(prompt_ids=Buffer.ints(row.prompt_ids), responses=[Buffer.ints(row.responses[0])])
    logprobs = engine.score([group])[0][0]
    engine.close()
    assert ran.curve("tokens")[-1] == 4.0
    assert logprobs[[0, 1, 4, 5]].min() > -0.5
    assert logprobs[[2, 3]].max() < -2.0


@pytest.mark.parametrize(
    ("objective", "options"),
    [("dpo:DPO", {}), ("dpo:DPO", {"nll_coef": 0.1, "label_smoothing": 0.1}), ("ipo:IPO", {"reduction": "sum"})],
)
@pytest.mark.parametrize("engine", [TORCH, DEEPSPEED])
def test_preferences_are_learned_to_the_last_pair(engine: str, objective: str, options: dict[str, Any], runner: Runner):
    settings = {f"objective.{name}": value for name, value in options.items()}
    ran = runner(
        "preference", random_rows(2), objective=f"flowrl.algorithms.{objective}", steps=15,
        **{"learner.lr": 1e-3, "learner.engine": engine, **settings},
    )  # fmt: skip
    assert ran.curve("margin")[0] == pytest.approx(0.0, abs=1e-5), "the policy begins as the reference"
    assert ran.curve("accuracy")[-1] == 1.0
    assert ran.curve("reward.chosen")[-1] > ran.curve("reward.rejected")[-1]
    assert ran.curve("loss")[-1] < ran.curve("loss")[0]
    assert len(ran.evaluations) == 2


def test_kto_tells_wanted_responses_from_unwanted_ones(runner: Runner):
    rows = [
        example_row(pair.prompt_ids, [pair.responses[side]], [float(side == 0)])
        for pair in random_rows(3).train
        for side in (0, 1)
    ]
    ran = runner(
        "preference", Rows(rows, rows[:3]), objective="flowrl.algorithms.kto:KTO", steps=15, **{"learner.lr": 1e-3}
    )
    assert ran.curve("reference_point")[0] == pytest.approx(0.0, abs=1e-5)
    assert min(ran.curve("reference_point")) >= 0.0
    assert ran.curve("accuracy")[-1] == 1.0
    assert ran.curve("reward.desirable")[-1] > 0 > ran.curve("reward.undesirable")[-1]
    assert [score for (score,) in ran.evaluations[-1].scores] == [1.0, 1.0, 1.0], "they were trained on here"


@pytest.mark.parametrize("engine", [TORCH, DEEPSPEED])
def test_a_reward_model_separates_its_pairs_and_scores_as_a_stage_does(engine: str, runner: Runner):
    from flowrl.engines.base import TokenGroup, TrainingConfig
    from flowrl.messages import Buffer

    rows = random_rows(4)
    ran = runner("reward_model", rows, steps=15, **{"learner.engine": engine})
    assert ran.curve("loss")[0] > 0.6
    assert ran.curve("accuracy")[-1] == 1.0
    scorer = SequenceScoringEngine(TrainingConfig(model=str(ran.model), dtype="float32"), where="reward")
    scorer.open()
    for row in rows.train:
        group = TokenGroup(prompt_ids=Buffer.ints(row.prompt_ids), responses=[Buffer.ints(r) for r in row.responses])
        chosen, rejected = scorer.score_sequences(group)
        assert chosen > rejected
    groups = [
        TokenGroup(prompt_ids=Buffer.ints(row.prompt_ids), responses=[Buffer.ints(r) for r in row.responses])
        for row in rows.heldout
    ]
    heldout = [score for scores in scorer.score_groups(groups) for score in scores]
    scorer.close()
    mean, std = read_normalisation(ran.model)
    assert (mean, std) == (pytest.approx(np.mean(heldout), abs=1e-4), pytest.approx(np.std(heldout), abs=1e-4))


def test_a_process_reward_model_judges_steps_as_labelled(runner: Runner):
    draw = random.Random(5)
    rows = [
        example_row(prompt_ids=[3, 4 + k], responses=[[draw.randint(3, 250) for _ in range(6)]], labels=[],
            step_labels=[[NAN, float(k % 2), NAN, NAN, NAN, float(k < 3)]])
        for k in range(6)
    ]  # fmt: skip
    ran = runner("reward_model", Rows(rows), objective="flowrl.algorithms.process:Process", steps=40)
    assert ran.curve("accuracy")[-1] == 1.0
    assert ran.curve("loss")[-1] < 0.2


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_distillation_brings_the_student_towards_another_teacher(direction: str, runner: Runner, tmp_path: Path):
    teacher = tiny_model(tmp_path / "teacher", seed=7)
    ran = runner(
        "preference",
        random_rows(6, responses=1),
        objective="flowrl.algorithms.distillation:Distillation",
        reference_model=teacher,
        **{"objective.direction": direction, "objective.drawn_by": "student", "objective.mix": 1.0},
    )
    assert ran.curve("kl")[-1] < 0.5 * ran.curve("kl")[0]
    assert len(set(ran.curve("teacher_nll"))) == 1


def test_a_teachers_whole_distribution_is_learned(runner: Runner, tmp_path: Path):
    teacher = tiny_model(tmp_path / "teacher", seed=7)
    ran = runner(
        "sft",
        random_rows(6, responses=1),
        steps=15,
        objective="flowrl.algorithms.full_distillation:FullDistillation",
        **{"objective.teacher": teacher, "objective.mix": 1.0},
    )
    assert ran.curve("kl")[-1] < 0.5 * ran.curve("kl")[0]
    assert ran.curve("kl") == pytest.approx(ran.curve("loss"))
    before, after = (sum(sum(row) for row in evaluation.scores) for evaluation in ran.evaluations)
    assert ran.steps[-1].metrics["heldout.kl"] == pytest.approx(-after / 2, rel=0.5)
    assert before < after < 0.0, "nearer on what it was not trained on, too"


@pytest.mark.parametrize(("graph", "responses"), [("sft", 1), ("preference", 2), ("reward_model", 2)])
def test_packed_and_unpacked_runs_have_the_same_curve(graph: str, responses: int, runner: Runner):
    rows = random_rows(7, responses=responses)
    settings = {"learner.lr": 1e-3}
    packed = runner(graph, rows, steps=8, **settings)
    unpacked = runner(graph, rows, steps=8, **settings, **{"learner.engine": f"{__name__}:PaddedEngine"})
    split = runner(graph, rows, steps=8, **settings, **{"learner.micro_batch_tokens": 20})
    assert packed.curve("loss")[0] != pytest.approx(packed.curve("loss")[-1], abs=1e-2)
    for other in (unpacked, split):
        assert other.curve("loss") == pytest.approx(packed.curve("loss"), abs=1e-5, rel=1e-5)
        assert other.curve("grad_norm") == pytest.approx(packed.curve("grad_norm"), abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("objective", ["dpo:DPO", "kto:KTO"])
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(objective: str, runner: Runner):
    rows = random_rows(8, count=5)  # steps do not fall together with epochs
    settings: dict[str, object] = {
        "objective": f"flowrl.algorithms.{objective}", "steps": 60, "examples_per_step": 2, "learner.lr": 1e-3,
    }  # fmt: skip
    straight = runner.run("preference", rows, settings)
    stopped = runner.run("preference", rows, settings, stop_at=2)
    assert 2 <= len(stopped.steps) < 60
    resumed = runner.run("preference", rows, settings, resume=stopped.run_dir)
    assert [step.version for step in [*stopped.steps, *resumed.steps]] == list(range(1, 61))
    assert stopped.curve("loss") + resumed.curve("loss") == straight.curve("loss")
