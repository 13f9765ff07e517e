"""A model that is saved keeps what belongs to it, and can be saved whatever its files hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from flowrl.engines.base import TokenGroup, TrainingConfig
from flowrl.engines.publishing import try_saving
from flowrl.engines.torch import SequenceScoringEngine, TorchEngine
from flowrl.errors import ModelError
from flowrl.graph.stage import Ranks
from flowrl.messages import Buffer
from tests.support.tiny import tiny_model

INVALID = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
TOOL = {"type": "function", "function": {"name": "f"}}


def amend(path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def saved(directory, out, head: Any = "policy"):
    engine = TorchEngine(TrainingConfig(model=str(directory), dtype="float32", head=head), where="learner", name="t")
    engine.open(Ranks())
    if head != "policy":
        torch.nn.init.normal_(engine.model.get_parameter("score.weight"))
    engine.save_model(out, card="a card")
    engine.close()
    return out


@pytest.mark.slow
def test_everything_beside_the_weights_is_carried_along(tmp_path):
    source = tiny_model(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS {{ tools }}")
    (source / "generation_config.json").write_text(json.dumps(INVALID))
    (source / "spiece.model").write_bytes(b"pieces")
    (source / "optimizer.pt").write_bytes(b"not this")
    amend(source / "config.json", attention_dropout=0.3)
    try_saving(source, "learner.model")
    out = saved(source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).get_chat_template(tools=[TOOL]).startswith("TOOLS")
    assert json.loads((out / "generation_config.json").read_text()) == {**INVALID, "eos_token_id": 2}
    assert (out / "spiece.model").read_bytes() == b"pieces"
    assert not (out / "optimizer.pt").exists()
    assert (out / "README.md").read_text() == "a card"
    settings = json.loads((out / "config.json").read_text())
    assert (settings["use_cache"], settings["attention_dropout"]) == (True, 0.3)


@pytest.mark.slow
def test_a_tokenizer_that_cannot_be_read_again_is_said_before_the_training(tmp_path):
    source = tiny_model(tmp_path)
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="could not be saved again after training"):
        try_saving(source, "learner.model")


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>", None])
def test_transformers_reads_a_saved_reward_model_at_the_token_that_it_was_trained_at(tmp_path, pad):
    source = tiny_model(tmp_path / "source")
    amend(source / "tokenizer_config.json", pad_token=pad)
    amend(source / "config.json", pad_token_id={"<|endoftext|>": 0, "<|im_end|>": 2, None: None}[pad])
    out = saved(source, tmp_path / "out", head="reward")
    scorer = SequenceScoringEngine(TrainingConfig(model=str(out), dtype="float32"), where="reward")
    scorer.open()
    texts = [[1, 40, 41, 2, 50, 51, 2], [1, 60, 2, 61, 2]]
    groups = [TokenGroup(prompt_ids=Buffer.ints(ids[:3]), responses=[Buffer.ints(ids[3:])]) for ids in texts]
    ours = [scores[0] for scores in scorer.score_groups(groups)]
    model = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
    batch = AutoTokenizer.from_pretrained(out).pad({"input_ids": texts}, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**batch).logits[:, 0].tolist()
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert model.config.pad_token_id == 0
