"""The KL to a teacher inside the training engine is that of two whole softmaxes, however packed and chunked."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from flowrl.algorithms.full_distillation import FullDistillation
from flowrl.config import Select, load_class
from flowrl.engines.base import Ranks, Schedule, TrainingConfig
from flowrl.engines.models import Reading
from flowrl.errors import ModelError
from tests.contracts.test_training_engines import FSDP, on_two_ranks
from tests.support import slow_preference as slow
from tests.support.slow_algorithms import gradient
from tests.support.tiny import tiny_model
from tests.unit.engines.test_packing import random_groups

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.algorithms.base import Direction
    from flowrl.engines.base import TokenGroup

pytestmark = pytest.mark.slow

GROUPS = random_groups(seed=12, count=4)
TORCH, DEEPSPEED = "flowrl.engines.torch:TorchEngine", "flowrl.engines.deepspeed:DeepSpeedEngine"
TEMPERATURE = 1.3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("teacher"), seed=7)


def opened(path: str, model: Path, **settings: Any) -> Any:
    schedule = Schedule(kind="constant")
    config = TrainingConfig(
        model=str(model), dtype="float32", schedule=schedule, lr=1e-2, temperature=TEMPERATURE, **settings
    )
    engine = load_class(path, "test")(config, where="learner", name="test")
    engine.open(Ranks())
    return engine


def choose(teacher: Path, direction: Direction, mix: float) -> Select:
    options = {"teacher": str(teacher), "direction": direction, "mix": mix}
    return Select(use=f"{FullDistillation.__module__}:FullDistillation", options=options)


def slow_rows(
    student: Path, teacher: Path, direction: Direction, groups: Sequence[TokenGroup]
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.nn.Module]:
    """Each response's KLs and log-probs by one forward of each model a sequence, and the student they come from."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, teacher)]
    divergences: list[torch.Tensor] = []
    logprobs: list[torch.Tensor] = []
    for group in groups:
        prompt = group.prompt_ids.tolist()
        for response in group.responses:
            ids = torch.tensor([prompt + response.tolist()])
            ours, theirs = (
                (model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / TEMPERATURE).log_softmax(-1)
                for model in models
            )
            over, other = (theirs.detach(), ours) if direction == "forward" else (ours, theirs.detach())
            divergences.append((over.exp() * (over - other)).sum(-1))
            logprobs.append(ours.gather(-1, torch.tensor(response.tolist())[:, None]).squeeze(-1))
    return divergences, logprobs, models[0]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(
    ("path", "settings", "max_logits"),
    [
        (TORCH, {}, None),
        (TORCH, {"micro_batch_tokens": 30}, 320 * 7),  # a head call for three tokens
        (DEEPSPEED, {"zero_stage": 3, "micro_batch_tokens": 60}, 320 * 50),
    ],
)
def test_divergence_and_gradient_are_those_of_whole_softmaxes(
    path: str, settings: dict[str, Any], max_logits: int | None, direction: Direction, tiny: Path, teacher: Path
):
    mix = 0.7
    divergences, logprobs, student = slow_rows(tiny, teacher, direction, GROUPS)
    kl, nll = torch.cat(divergences).mean(), -torch.cat(logprobs).mean()
    (mix * kl + (1 - mix) * nll).backward()
    expected_norm = float(torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm())
    engine = opened(path, tiny, **settings)
    if max_logits is not None:
        engine.reader.max_logits = max_logits
    chosen = choose(teacher, direction, mix)
    compared = [row for group in engine.compare(GROUPS, chosen) for row in group]
    metrics = engine.accumulate(GROUPS, chosen)
    step = engine.apply()
    after = np.concatenate([row for group in engine.compare(GROUPS, chosen) for row in group]).mean()
    engine.close()
    for found, row in zip(compared, divergences, strict=True):
        np.testing.assert_allclose(found, row.detach().numpy(), atol=2e-5, rtol=1e-4)
    assert metrics["kl"] == pytest.approx(float(kl.detach()), rel=1e-4)
    assert metrics["nll"] == pytest.approx(float(nll.detach()), rel=1e-4)
    assert metrics["loss"] == pytest.approx(mix * metrics["kl"] + (1 - mix) * metrics["nll"], rel=1e-5)
    assert step["grad_norm"] == pytest.approx(expected_norm, rel=1e-3)
    assert after < metrics["kl"], "a step brings the student nearer"


def distilled(engine: Any, directory: Path) -> dict[str, float]:
    """Take two steps beside the teacher in `directory`; tells what this rank holds of its weights, and of how many."""
    chosen = choose(directory / "teacher", "forward", 0.7)
    figures: dict[str, float] = {}
    for step in range(2):
        figures |= {f"{name} {step}": value for name, value in engine.accumulate(GROUPS, chosen).items()}
        figures |= {f"{name} {step}": value for name, value in engine.apply().items()}
    parameters = list(engine._teacher.reader.parameters())
    held = [getattr(each, "ds_tensor", each) for each in parameters]
    whole = sum(getattr(each, "ds_numel", each.numel()) for each in parameters)
    return {**figures, "held": sum(each.numel() for each in held) / whole}


@pytest.mark.parametrize(("path", "zero_stage", "held"), [(DEEPSPEED, 3, 0.5), (DEEPSPEED, 2, 1.0), (FSDP, 3, 1.0)])
def test_two_ranks_learn_of_a_teacher_as_one_does_and_share_its_weights_at_deepspeeds_stage_3(
    path: str, zero_stage: int, held: float, tiny: Path, teacher: Path, tmp_path: Path
):
    shutil.copytree(teacher, tmp_path / "teacher")
    alone = opened(TORCH, tiny, micro_batch_tokens=60)
    expected = distilled(alone, tmp_path)
    alone.close()
    settings = {"zero_stage": zero_stage, "micro_batch_tokens": 60, "lr": 1e-2, "temperature": TEMPERATURE}
    found = on_two_ranks(distilled, path, tiny, tmp_path, **settings)
    assert found.pop("held") == pytest.approx(held, abs=0.02)
    assert expected.pop("held") == 1.0
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_teacher_is_in_neither_the_saved_model_nor_the_state(tiny: Path, teacher: Path, tmp_path: Path):
    from safetensors.torch import load_file

    engine = opened(TORCH, tiny)
    engine.accumulate(GROUPS, choose(teacher, "forward", 1.0))
    engine.apply()
    engine.save_state(tmp_path / "state")
    names = {name for name, _ in engine.model.named_parameters()}
    engine.close()
    saved = load_file(tmp_path / "state" / "state.safetensors")
    assert {name.partition("/")[2] for name in saved} == names


def test_a_student_that_is_the_teacher_differs_from_it_nowhere(tiny: Path):
    engine = opened(TORCH, tiny)
    rows = [row for group in engine.compare(GROUPS, choose(tiny, "reverse", 1.0)) for row in group]
    engine.close()
    assert np.abs(np.concatenate(rows)).max() < 1e-5


def test_a_teacher_of_another_vocabulary_is_refused(tiny: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    other = tiny_model(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    model.resize_token_embeddings(330)
    model.save_pretrained(other)
    engine = opened(TORCH, tiny)
    with pytest.raises(ModelError, match="vocabulary of 330 tokens, the student one of 320"):
        engine.compare(GROUPS, choose(other, "forward", 1.0))
    engine.close()


@pytest.mark.parametrize(("direction", "expected"), [("forward", 0.143841), ("reverse", 0.130812), ("jsd", 0.033822)])
def test_the_hand_case(direction: Direction, expected: float):
    class Even:
        def logits(self, states_NH: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1, 2)

    reading = Reading(Even(), torch.zeros(1, 1), direction, 0.5, 1.0)  # type: ignore[arg-type]
    assert float(reading.divergence(torch.tensor([[0.25, 0.75]]).log())) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_jensen_shannon_divergence_and_its_gradient_equal_the_slow_ones(share: float):
    torch.manual_seed(3)
    taught_V, logits_V = torch.randn(7), torch.randn(7, requires_grad=True)

    class Head:
        def logits(self, states_NH: torch.Tensor) -> torch.Tensor:
            return taught_V[None]

    reading = Reading(Head(), torch.zeros(1, 1), "jsd", share, 2.0)  # type: ignore[arg-type]
    found = reading.divergence((logits_V / 2.0).log_softmax(-1)[None])
    teacher = (taught_V.double() / 2.0).softmax(-1).tolist()

    def of(rows: list[list[float]]) -> float:
        return slow.jsd(teacher, (torch.tensor(rows[0], dtype=torch.float64) / 2.0).softmax(-1).tolist(), share)

    logits = [logits_V.detach().double().tolist()]
    assert float(found.detach()) == pytest.approx(of(logits), abs=1e-6)
    (gradient_V,) = torch.autograd.grad(found.sum(), [logits_V])
    assert gradient_V.tolist() == pytest.approx(gradient(of, logits)[0], abs=1e-6)
