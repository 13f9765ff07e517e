"""Benchmarks of a run, a model or a server, with lm-eval: `flowrl eval`.

A run (its newest checkpoint) or a model is served by flowrl's own vLLM, a server is asked over lm-eval's own clients.
Tasks are lm-eval's, by name, by a YAML file or a directory of such files; the scores are those that it computes.

Invariants: every score has an interval and says by which method (runs/scores.py); two models are compared on the same
items, pair by pair; results.json is whole or not there; answers are kept in the directory beside it as they come, under
a digest of what gave them. So an evaluation that was cut off goes on when it is asked again.

Tests: tests/contracts/test_evaluation.py
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.data.prompts import load_tokenizer
from flowrl.errors import ConfigError, DataError, FlowrlError
from flowrl.runs.answering import engine_of, is_url, prepare, said_briefly
from flowrl.runs.results import Answers, Results, Score, conclude, differences, directory
from flowrl.runs.scores import score_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flowrl.runs.answering import EvalRequest, Prepared, Say
    from flowrl.runs.scores import Aggregate

CONCURRENT = 8  # requests to a server under way


def evaluate(request: EvalRequest, say: Say) -> Results:
    """Have the tasks answered, print a table, and write results.json.

    Raises:
        UserError: a task, a model, a server or a setting is not what it should be.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("flowrl eval", "lm-eval is not installed", "pip install 'flowrl-engine[eval]'")
    targets = [request.target, *([request.against] if request.against else [])]
    if not any(map(is_url, targets)):  # a server's progress is lm-eval's own to show; read when tqdm is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    elif not request.chat and not request.tokenizer:
        what, remedy = "is not given, but completions are asked for in tokens", "give the model's directory or id"
        raise ConfigError("--tokenizer", what, f"{remedy}, or --chat for generated answers alone")
    prepared = [prepare(each, request, say, overrides=request.overrides) for each in targets]
    out = directory(request.directory)
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = load_tasks(request.tasks)
    aggregates = _aggregates(tasks)
    num_items = {name: _num_items(task, request.limit) for name, task in tasks.items()}
    say(f"{', '.join(f'{name} ({num} items)' for name, num in num_items.items())}; answers are kept in {out}")
    answered = [_answer(each, tasks, request, out, aggregates, say) for each in prepared]
    results = Results(
        benchmark=f"lm-eval {lm_eval.__version__}", seed=request.seed, limit=request.limit, of=answered[0]
    )
    if request.against:
        results.against = answered[1]
        results.differences = differences(answered[0], answered[1], aggregates, request.seed)
    return conclude(results, out, say)


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Return lm-eval's tasks by name: its own, those of a YAML file, or of a directory of such files.

    Raises:
        ConfigError: there is no such task, or a file is none.
        DataError: a task's data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    specs = [spec for name in names for spec in _specs(name)]
    manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
    for spec in specs:
        if isinstance(spec, str) and not manager.match_tasks([spec]):
            what = f"lm-eval has no task {spec!r}, nor is it a file or a directory"
            raise ConfigError("--tasks", what, "`lm-eval ls tasks` lists them; a task of yours is a YAML file")
    tasks: dict[str, Any] = {}
    for spec in specs:
        name = spec if isinstance(spec, str) else str(spec.get("task"))
        try:
            loaded = manager.load([spec])["tasks"]
        except Exception as error:  # whatever a loader of data raises
            raise _no_data(name, error) from error
        if twice := sorted(loaded.keys() & tasks.keys()):
            raise ConfigError("--tasks", f"{twice[0]} is named twice", "name it once")
        tasks |= loaded
    return tasks


def _specs(name: str) -> Iterator[str | dict[str, Any]]:
    """Return a task's name, or what its files say."""
    path = Path(name)
    is_file = name.endswith((".yaml", ".yml"))
    if not is_file and not path.is_dir():
        yield name
        return
    files = [path] if is_file else sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    if not files:
        raise ConfigError("--tasks", f"{path} holds no YAML file", "name a directory of task files")
    from lm_eval.tasks._yaml_loader import load_yaml

    for file in files:
        if not file.is_file():
            raise ConfigError("--tasks", f"{file} is not there", "name a task, a YAML file or a directory")
        try:
            spec = load_yaml(file.absolute(), resolve_func=True)
        except Exception as error:  # of a YAML parser, or of the user's functions beside it
            raise ConfigError(
                "--tasks", f"{file} cannot be read ({said_briefly(error)})", "see lm-eval's task guide"
            ) from error
        if not isinstance(spec, dict) or not isinstance(spec.get("task"), str):
            raise ConfigError("--tasks", f"{file} names no task", "write `task: NAME` and what it needs")
        options = spec.get("dataset_kwargs") or {}
        if isinstance(options, dict) and "data_files" in options:
            options["data_files"] = _beside(file, options["data_files"])
        yield spec


def _beside(file: Path, named: Any) -> Any:
    """Return a task's data files; those that lie beside its own file are found there."""
    if isinstance(named, dict):
        return {split: _beside(file, each) for split, each in named.items()}
    if isinstance(named, list):
        return [_beside(file, each) for each in named]
    beside = file.absolute().parent / str(named)
    return str(beside) if not Path(str(named)).exists() and beside.exists() else named


def _no_data(name: str, error: Exception) -> FlowrlError:
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    if any(isinstance(each, ConnectionError) or "Offline" in type(each).__name__ for each in chain):
        what = f"its data lie on the Hugging Face hub, which cannot be reached ({said_briefly(error)})"
        remedy = "go where the hub can be reached, or give a task file whose dataset_kwargs.data_files are local"
        return DataError(f"task {name}", what, remedy)
    return DataError(f"task {name}", f"cannot be loaded ({said_briefly(error)})", "see its file and its data")


def _num_items(task: Any, limit: int) -> int:
    num = len(task.eval_docs)
    return min(num, limit) if limit else num


def _aggregates(tasks: dict[str, Any]) -> dict[tuple[str, str], Aggregate | None]:
    """Return what makes each task's metrics of its items' values; None: the mean."""
    found: dict[tuple[str, str], Aggregate | None] = {}
    for name, task in tasks.items():
        for metric, function in task.aggregation().items():
            found[name, metric] = None if getattr(function, "__name__", "") in ("mean", "nanmean") else function
    return found


def _answer(
    prepared: Prepared, tasks: dict[str, Any], request: EvalRequest, out: Path,
    aggregates: dict[tuple[str, str], Aggregate | None], say: Say,
) -> Answers:  # fmt: skip
    """Have one model answer every task."""
    start_s = time.monotonic()
    with _asked(prepared, request, say) as lm:
        try:
            results = run_tasks(lm, tasks, request, out / f"answers-{prepared.digest}.db")
            answers = _gather(prepared.name, results, aggregates, request.seed)
        except FlowrlError:
            raise
        except Exception as error:  # lm-eval raises whatever its clients, metrics and the user's functions raise
            remedy = "what was answered is kept: the same command goes on from there"
            raise ConfigError(f"evaluating {prepared.name}", said_briefly(error), remedy) from error
    say(f"{prepared.name}: answered in {time.monotonic() - start_s:,.1f} s")
    return answers


@contextlib.contextmanager
def _asked(prepared: Prepared, request: EvalRequest, say: Say) -> Iterator[Any]:
    """Yield lm-eval's view of a model while it is served."""
    if prepared.directory is None or prepared.settings is None:
        from lm_eval.api.registry import get_model

        url = prepared.name.rstrip("/") + ("/chat/completions" if request.chat else "/completions")
        options: dict[str, Any] = {"model": request.model, "base_url": url, "num_concurrent": CONCURRENT}
        options |= {"tokenizer_backend": None} if request.chat else {"tokenizer": request.tokenizer}
        kind = get_model("local-chat-completions" if request.chat else "local-completions")
        try:
            lm = kind.create_from_arg_obj({**options, "seed": request.seed})
        except Exception as error:  # of the tokenizer
            raise ConfigError("--tokenizer", said_briefly(error), "give the model's directory") from error
        yield lm
        return
    from flowrl.runs.harness import EngineLM

    with asyncio.Runner() as runner:
        serving = engine_of(prepared, say)
        engine = runner.run(serving.__aenter__())
        try:
            yield EngineLM(engine, load_tokenizer(prepared.directory), runner.run, say, seed=request.seed)
        finally:
            runner.run(serving.__aexit__(None, None, None))


def run_tasks(lm: Any, tasks: dict[str, Any], request: EvalRequest, answers: Path) -> Any:
    """Return lm-eval's results; what is in the file `answers` is not asked again, and what is asked goes there."""
    import numpy as np
    import torch
    from lm_eval.api.model import CachingLM
    from lm_eval.evaluator import evaluate as answer

    random.seed(request.seed)
    np.random.seed(request.seed)
    torch.manual_seed(request.seed)
    for task in tasks.values():
        if request.num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=request.num_fewshot or 0)
        task.set_fewshot_seed(seed=request.seed)
    caching = CachingLM(lm, str(answers))
    try:
        return answer(
            lm=cast("Any", caching),
            task_dict=cast("Any", {"tasks": tasks, "groups": {}}),
            limit=request.limit or None,
            bootstrap_iters=0,
            apply_chat_template=request.chat,
            confirm_run_unsafe_code=request.unsafe_code,
        )
    finally:
        caching.dbdict.close()


def _gather(name: str, results: Any, aggregates: dict[tuple[str, str], Aggregate | None], seed: int) -> Answers:
    """Return lm-eval's scores with their intervals, from its record of every item."""
    answers = Answers(target=name)
    for task, samples in results["samples"].items():
        better = results["higher_is_better"].get(task, {})
        for chosen in dict.fromkeys(sample["filter"] for sample in samples):
            rows = sorted((row for row in samples if row["filter"] == chosen), key=lambda row: row["doc_id"])
            for metric in rows[0]["metrics"]:
                value = results["results"][task].get(f"{metric},{chosen}")
                if not isinstance(value, int | float):
                    continue
                key = f"{task}/{metric}/{chosen}"
                answers.items[key] = [row[metric] for row in rows]
                answers.digests[key] = [row["doc_hash"] for row in rows]
                bounds = score_of(answers.items[key], aggregates.get((task, metric)), seed=seed)
                bounds = msgspec.structs.replace(bounds, value=float(value))
                answers.scores.append(
                    Score(task=task, metric=metric, filter=chosen, bounds=bounds, higher_is_better=better.get(metric))
                )
    return answers
