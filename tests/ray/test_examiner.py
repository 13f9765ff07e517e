"""An examiner on Ray, vLLM and DeepSpeed: versions are evaluated while training goes on, further sets by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flowrl.telemetry.metrics import read_evaluations
from tests.contracts.test_evaluation import task_files
from tests.support.command import ROOT, flowrl, plain_data, tiny_settings
from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_versions_are_examined_beside_training_and_nothing_is_lost(tmp_path: Path) -> None:
    graph = ROOT / "graphs" / "group_async.py"
    hard = tmp_path / "hard.jsonl"
    hard.write_text("".join(f'{{"prompt": "What is {k} + 9?", "answer": "{k + 9}"}}\n' for k in range(5)))
    more = {"generator.cpus": 0, "learner.evaluate_every": 2, "evaluation.beside": 1, "evaluation.sets.hard": hard}
    more |= {"evaluation.tasks": f"[{task_files(tmp_path / 'tasks')}]", "evaluation.task_items": 5}
    more |= {"evaluation.best_by": "own_text/byte_perplexity", "learner.keep_checkpoints": 1}
    (tmp_path / "long.py").write_text("def score(completions, **_):\n    return [len(each) for each in completions]\n")
    more |= {"reward.function": tmp_path / "long.py:score", "learner.lr": 1e-2}
    given = tiny_settings(tiny_model(tmp_path / "model"), graph, **{**plain_data(tmp_path), **more}, steps=4)
    ran = flowrl("run", graph, "--name", "one", *given, cwd=tmp_path)
    assert ran.code == 0, ran.text
    run = tmp_path / "runs" / "one"
    found = read_evaluations(run / "metrics.jsonl")
    assert (found[0].version, found[-1].version) == (0, 4)
    assert {(len(each.scores), len(each.sets["hard"])) for each in found} == {(4, 5)}
    asked = {"own_choice/acc", "own_choice/acc_norm", "own_write/exact_match", "own_text/byte_perplexity"}
    assert {(name, bounds.num) for each in found for name, bounds in each.tasks.items()} == {
        (name, 5) for name in asked
    }
    told = {each.version: each.tasks["own_text/byte_perplexity"].value for each in found}
    assert len({*told.values()}) == len(told)  # of versions that differ
    best = min(told, key=told.__getitem__)
    assert any(line.startswith(f"best:       version {best}, minus own_text/byte_perplexity -") for line in ran.lines)
    exported = flowrl("export", run, tmp_path / "out", "--best", cwd=tmp_path)
    assert exported.code == (2 if best == 0 else 0), exported.text
    assert f"version {best}" in exported.text
    assert any(line.split()[:1] == ["examiner"] for line in ran.lines)  # what it cost stands in the report
    verified = flowrl("verify", run, cwd=tmp_path)
    assert verified.code == 0, verified.text
