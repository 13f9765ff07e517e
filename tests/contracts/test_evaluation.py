"""`flowrl eval` on a real vLLM and with the real lm-eval: the scores are those of lm-eval's own `hf` model."""

from __future__ import annotations

import gc
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.cli import main
from flowrl.runs.answering import EvalRequest
from flowrl.runs.evaluation import evaluate
from flowrl.stages.benchmarks import load_tasks, run_tasks
from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Destroying context with unclosed socket:ResourceWarning"),
]

HF = {"dtype": "float32", "device": "cpu", "batch_size": 1}
DATA = "dataset_path: json\ndataset_kwargs:\n  data_files: rows.jsonl\ntest_split: train\ndoc_to_text: '{{question}}'\n"
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\n"
    "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    "write": "output_type: generate_until\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs:\n  until: ['e', 'zz']\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n",
    "text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
    "metric_list:\n  - metric: byte_perplexity\n",
}


def task_files(directory: Path) -> Path:
    directory.mkdir()
    rows = [
        {
            "question": f"Which is {k}, one or two?",
            "choices": ["red", "blue ", "a long one"],
            "label": k % 3,
            "answer": "a",
        }
        for k in range(12)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (directory / f"{name}.yaml").write_text(f"task: own_{name}\n{DATA}{text}")
    return directory


def recorded(results: Any) -> list[tuple[Any, ...]]:
    """Return what each item was answered and scored, log-likelihoods rounded."""
    return sorted(
        (name, row["doc_id"], str(_rounded(row["filtered_resps"])), str({m: _rounded(row[m]) for m in row["metrics"]}))
        for name, rows in results["samples"].items()
        for row in rows
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return round(value, 2) if isinstance(value, float) else value


def test_scores_are_those_of_lm_eval_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lm_eval.api.registry import get_model

    import flowrl.runs.evaluation as evaluation

    seen: list[Any] = []
    monkeypatch.setattr(
        evaluation, "run_tasks", lambda *given, **told: seen.append(run_tasks(*given, **told)) or seen[-1]
    )
    model, tasks = tiny_model(tmp_path / "model"), task_files(tmp_path / "tasks")
    request = EvalRequest(
        target=str(model),
        tasks=[str(tasks)],
        out=tmp_path / "out",
        overrides=["dtype=float32", "kv_cache_bytes=33554432"],
    )
    said: list[str] = []
    found = evaluate(request, said.append)
    gc.collect()
    alone = run_tasks(
        get_model("hf").create_from_arg_obj({**HF, "pretrained": str(model)}), load_tasks([str(tasks)]), limit=0,
        seed=request.seed,
    )  # fmt: skip
    assert recorded(seen[0]) == recorded(alone)
    assert len({text for name, _, text, _ in recorded(alone) if name == "own_write"}) > 1
    scores = {(score.task, score.metric): score.bounds for score in found.of.scores}
    assert {key: bounds.method for key, bounds in scores.items()} == {
        ("own_choice", "acc"): "wilson", ("own_choice", "acc_norm"): "wilson", ("own_write", "exact_match"): "wilson",
        ("own_text", "byte_perplexity"): "bootstrap",
    }  # fmt: skip
    for (task, metric), bounds in scores.items():
        assert bounds.value == pytest.approx(alone["results"][task][f"{metric},none"], rel=1e-4)
        assert bounds.num == 12
    assert json.loads((tmp_path / "out" / "results.json").read_bytes())["of"]["target"] == str(model)
    assert len([*(tmp_path / "out").glob("answers-*.db")]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["MODEL", "--tasks", "no_such_task_at_all"], "lm-eval has no task 'no_such_task_at_all'"),
        (["MODEL", "--tasks", "missing.yaml"], "missing.yaml is not there"),
        (["MODEL", "--tasks", "EMPTY"], "holds no YAML file"),
        (["MODEL", "--tasks", "TASKS", "--limit", "-1"], "--limit: -1 is not a number of items"),
        (["MODEL", "--tasks", "TASKS", "--set", "max_model_len=4096"], "has a context of 512"),
        (["URL", "--tasks", "TASKS", "--model", "m", "--chat"], "does not answer"),
        (["URL", "--tasks", "TASKS", "--chat"], "--model: is not given"),
        (["URL", "--tasks", "TASKS", "--model", "m"], "--tokenizer: is not given"),
        (["http://example.com/v1", "--tasks", "TASKS", "--model", "m", "--chat"], "unencrypted"),
        pytest.param(  # reads the list of all of lm-eval's tasks
            ["MODEL", "--tasks", "arc_easy"],
            "its data lie on the Hugging Face hub, which cannot be reached",
            marks=pytest.mark.long,
        ),
        (["MODEL", "--tasks", "LIST"], "list.yaml cannot be read"),
        (["MODEL", "--tasks", "BROKEN"], "cannot be loaded"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
):
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tasks = task_files(tmp_path / "tasks")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text(f"task: broken\n{DATA.replace('rows', 'torn')}{TASKS['choice']}")
    (tmp_path / "torn.jsonl").write_text('{"question": \n')
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    named = {
        "MODEL": str(tiny_model(tmp_path / "model")), "TASKS": str(tasks), "EMPTY": "empty", "LIST": "list.yaml",
        "BROKEN": "broken.yaml", "URL": f"http://127.0.0.1:{port}/v1",
    }  # fmt: skip
    assert main(["eval", *(named.get(each, each) for each in arguments)]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flowrl:")]
    assert len(told) == 1
    assert said in told[0]
