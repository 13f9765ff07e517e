"""The baseline's loop on the tiny model: what it reads off padded sequences, and a whole step in both modes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from flowrl.engines.base import TokenGroup, TrainingConfig
from flowrl.engines.torch import TorchEngine
from flowrl.errors import ConfigError
from flowrl.graph.stage import Ranks
from flowrl.messages import Buffer
from perf.dschat_baseline import Order
from perf.dschat_loop import Baseline
from perf.dschat_workload import Workload

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = ([5, 6, 7, 8, 9], [11, 12])
RESPONSES = ([21, 22, 23], [31])


@pytest.fixture(scope="module")
def classifier(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from flowrl.model_files import carry_along

    directory = tmp_path_factory.mktemp("reward-model")
    torch.manual_seed(1)
    config: Any = LlamaConfig.from_pretrained(tiny, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    carry_along(tiny, directory)
    return directory


@pytest.fixture
def make(tiny: Path, classifier: Path):
    def baseline(**settings: Any) -> Baseline:
        own = {
            name: settings.pop(name) for name in ("padding", "score_rows", "train_rows", "cache") if name in settings
        }
        work = Workload(model=str(tiny), reward_model=str(classifier), dtype="float32", groups=2, group_size=3,
                        max_tokens=6, **settings)  # fmt: skip
        return Baseline(Order(work=work, **own))

    return baseline


def padded_batch(width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return PROMPTS and RESPONSES as the baseline has them: padded on both sides of their border."""
    longest = max(map(len, RESPONSES))
    ids, attended, mask = [], [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        before, after = width - len(prompt), longest - len(response)
        ids.append([0] * before + prompt + response + [0] * after)
        attended.append([0] * before + [1] * (len(prompt) + len(response)) + [0] * after)
        mask.append([1.0] * len(response) + [0.0] * after)
    return torch.tensor(ids), torch.tensor(attended), torch.tensor(mask)


def scored_by_engine(model: Path, head: Any) -> list[list[float]]:
    engine = TorchEngine(TrainingConfig(model=str(model), head=head, dtype="float32"), where="test", name="test")
    engine.open(Ranks())
    groups = [
        TokenGroup(prompt_ids=Buffer.ints(prompt), responses=[Buffer.ints(response)])
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    found = [rows[0].tolist() for rows in engine.score(groups)]
    engine.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("padding", [5, 16])
def test_padded_forwards_read_what_the_engines_read(make: Any, tiny: Path, classifier: Path, padding: int):
    baseline = make(padding=padding, score_rows=1)
    torch.nn.init.normal_(baseline.critic.model.score.weight)
    logprobs, reference, values, scores = baseline.score(*padded_batch(padding))
    expected = scored_by_engine(tiny, "policy")
    rewards = scored_by_engine(classifier, "reward")
    together = baseline.values(*padded_batch(16)[:2], 3)  # the same values, however wide
    for row, tokens in enumerate(expected):
        assert logprobs[row, : len(tokens)].tolist() == pytest.approx(tokens, abs=1e-5)
        assert reference[row, : len(tokens)].tolist() == pytest.approx(tokens, abs=1e-5)
        assert values[row, : len(tokens)].tolist() == pytest.approx(together[row, : len(tokens)].tolist(), abs=1e-5)
        assert float(scores[row]) == pytest.approx(rewards[row][-1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_step_of_fixed_length_trains_both_models_and_adds_up(make: Any, cache: str):
    baseline = make(mode="fixed", padding=0, cache=cache, train_rows=4)
    torch.nn.init.normal_(baseline.critic.model.score.weight)  # else the first values and the first loss are 0
    before = [next(model.parameters()).clone() for model in (baseline.policy.model, baseline.critic.model)]
    step = baseline.step(0)
    assert step.lengths == (6,) * 6
    assert step.tokens == 36
    parts = step.generation_s + step.scoring_s + step.training_s + step.other_s
    assert step.wall_s == pytest.approx(parts)
    after = [next(model.parameters()) for model in (baseline.policy.model, baseline.critic.model)]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert torch.equal(next(baseline.reference.parameters()), before[0])


@pytest.mark.slow
def test_micro_batches_do_not_change_the_step(make: Any):
    found: list[list[torch.Tensor]] = []
    for rows in (2, 6):
        baseline = make(mode="fixed", padding=0, train_rows=rows, lr=1e-3)  # seeds the sampling anew
        baseline.step(0)
        found.append([parameter.detach() for parameter in baseline.policy.model.parameters()])
    for one, other in zip(*found, strict=True):
        assert float((one - other).abs().mean()) < 1e-5  # 1e-3 where nothing agrees: Adam's first step is a sign


@pytest.mark.slow
def test_in_eos_mode_the_mask_ends_with_the_first_stop_token(make: Any):
    baseline = make(mode="eos", padding=0)
    ids, _, mask = baseline.generate(*baseline.prompts(0))
    response = ids[:, -mask.shape[1] :]
    for row, kept in zip(response.tolist(), mask.tolist(), strict=True):
        stops = [place for place, token in enumerate(row) if token == 2]
        assert sum(kept) == (stops[0] + 1 if stops else len(row))


@pytest.mark.slow
def test_a_prompt_longer_than_the_padding_is_refused(make: Any):
    baseline = make(padding=4)
    with pytest.raises(ConfigError, match="--padding: 4, but a prompt has"):
        baseline.prompts(0)
