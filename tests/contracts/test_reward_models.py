"""Several reward models in a row: what arrives is what each of them says, normalised, clipped and weighted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from flowrl.messages import Buffer
from flowrl.stages.reward import RewardModel
from flowrl.stages.sampler import Sampler
from tests.support.one_stage import rollouts, run_alone
from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.messages import Rollouts

pytestmark = pytest.mark.slow

LIMIT = 0.2  # between the scores below
TEXTS = ("a good answer", "no", "a much longer answer than the others")


def tiny_reward_model(directory: Path, seed: int) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tokenized() -> Rollouts:
    import msgspec

    encode = tiny_tokenizer().encode
    group = rollouts(*TEXTS)
    samples = [
        msgspec.structs.replace(s, token_ids=Buffer.ints(encode(s.text)), logprobs=Buffer.floats([0.0] * len(s.text)))
        for s in group.samples
    ]
    return msgspec.structs.replace(group, token_ids=Buffer.ints(encode("a question")), samples=samples)


def by_transformers(directory: Path, group: Rollouts) -> list[float]:
    """Score each sample by itself with transformers' own classifier."""
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = [torch.tensor([[*group.token_ids.tolist(), *s.token_ids.tolist()]]) for s in group.samples]
        return [float(model(input_ids=row).logits) for row in rows]


def test_two_reward_models_add_their_named_scores(tmp_path: Path):
    helpful, harmless = tiny_reward_model(tmp_path / "helpful", 1), tiny_reward_model(tmp_path / "harmless", 2)
    settings = json.loads((harmless / "config.json").read_text())
    (harmless / "config.json").write_text(json.dumps({**settings, "mean": 0.5, "std": 8.0}))
    group = tokenized()

    first = RewardModel(RewardModel.Config(dtype="float32", weight=0.75), Sampler(model=str(helpful)))
    second = RewardModel(RewardModel.Config(dtype="float32", weight=-0.5, clip=LIMIT), Sampler(model=str(harmless)))
    middle = run_alone(first, [group], tmp_path, node="helpful").put
    scored = run_alone(second, middle, tmp_path, node="harmless").put[0]

    expected_helpful = [0.75 * s for s in by_transformers(helpful, group)]
    normalised = [(s - 0.5) / 8.0 for s in by_transformers(harmless, group)]
    expected_harmless = [-0.5 * max(-LIMIT, min(LIMIT, s)) for s in normalised]
    assert len({round(s, 3) for s in expected_helpful}) == len(TEXTS)
    assert {abs(s) < LIMIT for s in normalised} == {True, False}, f"one beyond {LIMIT} and one within: {normalised}"
    assert scored.scores["helpful"] == pytest.approx(expected_helpful, abs=1e-5)
    assert scored.scores["harmless"] == pytest.approx(expected_harmless, abs=1e-5)
    both = zip(expected_helpful, expected_harmless, strict=True)
    assert scored.rewards == pytest.approx([a + b for a, b in both], abs=1e-5)
