"""LoRA through the shipped graphs and `flowrl export`: what comes out loads elsewhere and is what the run had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl.cli import main
from tests.support.command import ROOT

pytestmark = pytest.mark.slow

RANK = 4
ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "three", "four", "five", "six")]
IDS = torch.tensor([[5, 60, 7, 8, 9]])


class Runs:
    """Short runs of the offline graphs on a tiny model."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.model = model
        self._directory = directory

    def __call__(self, graph: str, name: str, rows: list[dict[str, Any]], **settings: object) -> Path:
        data = self._directory / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        known: dict[str, object] = {
            "runtime": "local", "model": self.model, "data.source": data, "data.num_heldout": 2, "steps": 4,
            "examples_per_step": 2, "learner.lr": 1e-2, "learner.engine": "flowrl.engines.torch:TorchEngine",
            "learner.dtype": "float32", "learner.save_every": 2, "learner.lora.rank": RANK,
        }  # fmt: skip
        overrides = [f"--set={path}={value}" for path, value in {**known, **settings}.items()]
        arguments = [str(ROOT / "graphs" / f"{graph}.py"), "--name", name, "--runs-dir", str(self._directory)]
        assert main(["run", *arguments, *overrides]) == 0
        return self._directory / name


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def sft(runs: Runs) -> Path:
    return runs("sft", "tuned", ROWS)


@pytest.fixture
def copied(sft: Path, tmp_path: Path) -> Path:
    """A copy of the run to damage."""
    return Path(shutil.copytree(sft, tmp_path / "tuned"))


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_checkpoint_holds_the_merged_model_and_the_adapter_beside_it(sft: Path, tiny: Path):
    checkpoint = sft / "checkpoints" / "step-000004"
    merged, base = weights_of(checkpoint / "model"), weights_of(tiny)
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    config = json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (RANK, str(tiny))
    state = (checkpoint / "learner" / "state.safetensors").stat().st_size
    assert state < 4 * (checkpoint / "adapter" / "adapter_model.safetensors").stat().st_size


def test_the_newest_checkpoint_is_exported_with_its_card(sft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert main(["export", str(sft), str(out)]) == 0
    said = capsys.readouterr().out
    assert "step-000004: every file is as it was written" in said
    assert f'load it with AutoModelForCausalLM.from_pretrained("{out}")' in said
    found, expected = weights_of(out), weights_of(sft / "checkpoints" / "step-000004" / "model")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert AutoModelForCausalLM.from_pretrained(out)(input_ids=IDS).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(out).chat_template
    card = (out / "README.md").read_text()
    for part in ("# tuned", "Version 4 of learner", "| 0 | -", "| 4 | -", "LoRA: rank 4, alpha 32, targets all-linear",
                 "data: ", "lr: 0.01", "flowrl.algorithms.sft:SFT"):  # fmt: skip
        assert part in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing half written is left"


def test_an_earlier_version_in_another_type(sft: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    assert main(["export", str(sft), str(tmp_path / "out"), "--version", "2", "--dtype", "bfloat16"]) == 0
    found, expected = weights_of(tmp_path / "out"), weights_of(sft / "checkpoints" / "step-000002" / "model")
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert "| 4 |" not in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_alone_and_merged_by_peft_is_the_merged_model(
    sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["export", str(sft), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert f"A LoRA adapter of rank {RANK}" in (tmp_path / "adapter" / "README.md").read_text()
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert "merging the adapter" in capsys.readouterr().out
    found, expected = weights_of(tmp_path / "merged"), weights_of(sft / "checkpoints" / "step-000004" / "model")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "again")]) == 0
    assert "merging the adapter" not in capsys.readouterr().out, "it is made once"


def test_training_goes_on_from_an_adapter_where_the_run_left_it(sft: Path, runs: Runs, tmp_path: Path):
    start = sft / "checkpoints" / "step-000004" / "adapter"
    run = runs("sft", "further", ROWS, steps=1, **{"learner.lr": 0.0, "learner.lora.start": start})
    found = weights_of(run / "checkpoints" / "step-000001" / "model")
    expected = weights_of(sft / "checkpoints" / "step-000004" / "model")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_reward_model_is_exported_with_its_head(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import AutoModelForSequenceClassification

    rows = [{"prompt": f"{n} + {n} =", "chosen": f"{2 * n}", "rejected": f"{2 * n + 1}"} for n in range(1, 9)]
    run = runs("reward_model", "judge", rows)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "AutoModelForSequenceClassification" in capsys.readouterr().out
    loading = 'Load it with AutoModelForSequenceClassification.from_pretrained("DIRECTORY") (one label).'
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{loading} The score of a response is the value at its last token." in card
    head = weights_of(tmp_path / "out")["score.weight"]
    assert head.any()
    assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").score.weight, head)


def test_what_cannot_be_exported_is_refused_by_name(
    copied: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert "has no complete checkpoint of version 3; complete: step-000002, step-000004" in refused(
        capsys, copied, out, "--version", "3"
    )
    assert "has no complete checkpoint, nothing in" in refused(capsys, tiny, out)
    assert "is not an empty directory" in refused(capsys, copied, tiny)
    assert "an adapter is written as it was saved" in refused(capsys, copied, out, "--adapter", "--dtype", "float32")
    assert "has no model of 'critic'; run it with critic.save_model=true" in refused(
        capsys, copied, out, "--node", "critic"
    )
    newest = copied / "checkpoints" / "step-000004"
    assert "is not of version 2" in refused(capsys, newest, out, "--version", "2")
    shutil.rmtree(newest / "adapter")
    weights = newest / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "is not as it was written: adapter/README.md is missing" in refused(capsys, newest, out)
    assert main(["export", str(copied), str(out)]) == 0
    assert "passing over step-000004: adapter/README.md is missing" in capsys.readouterr().out
    shutil.rmtree(out)
    (copied / "checkpoints" / "step-000002" / "manifest.json").unlink()
    (copied / "checkpoints" / ".step-000006.partial").mkdir()
    said = refused(capsys, copied, out)
    assert (
        "torn: step-000004 (adapter/README.md is missing), step-000002 (not finished), .step-000006.partial (not"
        in said
    )
    assert not out.exists()
