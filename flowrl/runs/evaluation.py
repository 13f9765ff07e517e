"""Benchmarks of a run, a model or a server, with lm-eval: `flowrl eval`.

A run (its newest checkpoint) or a model is served by flowrl's own vLLM, a server is asked over lm-eval's own clients.
Tasks are lm-eval's, by name, by a YAML file or a directory of such files; the scores are those that it computes.

Invariants: every score has an interval and says by which method (runs/scores.py); two models are compared on the same
items, pair by pair; results.json is whole or not there; answers are kept in the directory beside it as they come, under
a digest of what gave them, so that an evaluation that was cut off goes on when it is asked again.

Tests: tests/contracts/test_evaluation.py
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import msgspec

from flowrl.config import resolve, widen
from flowrl.data.models import inspect_model, prepare_model
from flowrl.data.prompts import load_tokenizer
from flowrl.engines.base import GenerationConfig, Serving
from flowrl.errors import ConfigError, DataError, FlowrlError, ResourceError, one_line, shortened
from flowrl.rewards.http import Server, check_server
from flowrl.runs.scores import Bounds, difference_of, score_of
from flowrl.telemetry.files import new_file

if TYPE_CHECKING:
    from collections.abc import Iterator

Say = Callable[[str], None]
Aggregate = Callable[[Sequence[Any]], float]

MOST_CONTEXT = 4096  # tokens, where nothing else is set
CONNECT_S = 5.0
CONCURRENT = 8  # requests to a server under way
SHOWN_CHARS = 300


class EvalRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for."""

    target: str  # a run, a model or a URL
    tasks: list[str]
    against: str = ""  # another; "": no comparison
    out: Path | None = None  # directory; None: evaluations/NAME
    limit: int = 0  # items of each task; 0: all
    num_fewshot: int | None = None  # None: as the task says
    seed: int = 0
    chat: bool = False  # questions go through the chat template, or a server's chat completions
    model: str = ""  # as the server names it
    tokenizer: str = ""  # of a server's model: a directory or a Hugging Face id
    unsafe_code: bool = False  # run tasks that execute what a model wrote
    overrides: Sequence[str] = ()  # of the engine


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one task."""

    task: str
    metric: str
    filter: str
    bounds: Bounds
    higher_is_better: bool | None


class Answers(msgspec.Struct, kw_only=True):
    """What came of the tasks for one model."""

    target: str
    scores: list[Score] = []
    items: dict[str, list[Any]] = {}  # by task, metric and filter: each item's value
    digests: dict[str, list[str]] = {}  # of those items


class Results(msgspec.Struct, kw_only=True):
    """What is written to results.json."""

    lm_eval: str
    seed: int
    limit: int
    of: Answers
    against: Answers | None = None
    differences: list[Score] = []


def evaluate(request: EvalRequest, say: Say) -> Results:
    """Have the tasks answered, print a table, and write results.json.

    Raises:
        UserError: a task, a model, a server or a setting is not what it should be.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("flowrl eval", "lm-eval is not installed", "pip install 'flowrl-engine[eval]'")
    if request.limit < 0:
        raise ConfigError("--limit", f"{request.limit} items are none", "give 1 or more, or leave it out for all")
    targets = [request.target, *([request.against] if request.against else [])]
    if not any(map(_is_url, targets)):  # a server's progress is lm-eval's own to show; read when tqdm is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    prepared = [_prepare(each, request, say) for each in targets]
    out = request.out or Path("evaluations") / _short_name(request.target)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(str(out), f"cannot be written ({error.strerror})", "choose another --out") from error
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = load_tasks(request.tasks)
    aggregates = _aggregates(tasks)
    num_items = {name: _num_items(task, request.limit) for name, task in tasks.items()}
    say(f"{', '.join(f'{name} ({num} items)' for name, num in num_items.items())}; answers are kept in {out}")
    answered = [_answer(each, tasks, request, out, aggregates, say) for each in prepared]
    results = Results(lm_eval=lm_eval.__version__, seed=request.seed, limit=request.limit, of=answered[0])
    if request.against:
        results.against = answered[1]
        results.differences = differences(answered[0], answered[1], aggregates, request.seed)
    with new_file(out / "results.json") as aside:
        aside.write_bytes(msgspec.json.format(msgspec.json.encode(results, enc_hook=_plain), indent=1))
    for line in table(results):
        say(line)
    say(f"written: {out / 'results.json'}")
    return results


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
                "--tasks", f"{file} cannot be read ({_said(error)})", "see lm-eval's task guide"
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
        what = f"its data lie on the Hugging Face hub, which cannot be reached ({_said(error)})"
        remedy = "go where the hub can be reached, or give a task file whose dataset_kwargs.data_files are local"
        return DataError(f"task {name}", what, remedy)
    return DataError(f"task {name}", f"cannot be loaded ({_said(error)})", "see its file and its data")


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


class _Prepared(msgspec.Struct, frozen=True):
    """A model that can be asked."""

    name: str
    digest: str  # of all that its answers depend on
    directory: Path | None  # None: a server
    settings: Serving | None = None


def _prepare(target: str, request: EvalRequest, say: Say) -> _Prepared:
    if _is_url(target):
        return _prepare_server(target, request)
    directory = prepare_model(target, say=say)
    card = inspect_model(directory)
    implied: dict[str, Any] = {"max_model_len": min(card.max_context or MOST_CONTEXT, MOST_CONTEXT)}
    implied["threads"] = min(8, len(os.sched_getaffinity(0)))
    import torch

    if torch.cuda.is_available():
        implied |= {"layout": "processes", "kv_cache_bytes": 0, "max_running": 256}
    settings = resolve(Serving, overrides=request.overrides, implied=implied)
    if card.max_context and settings.max_model_len > card.max_context:
        what = f"{settings.max_model_len} tokens, but {target} has a context of {card.max_context}"
        raise ConfigError("max_model_len", what, f"lower it to {card.max_context} or less")
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(directory.iterdir())]
    parts = [str(directory), files, settings, request.chat, request.seed]  # a file that is written anew is another
    return _Prepared(target, _digest(parts), directory, settings)


def _prepare_server(url: str, request: EvalRequest) -> _Prepared:
    check_server(Server(url=url), "flowrl eval")
    if not request.model:
        raise ConfigError("--model", f"is not given for {url}", "name the model as the server does")
    if not request.chat and not request.tokenizer:
        what = "is not given, but completions are asked for in tokens"
        raise ConfigError(
            "--tokenizer", what, "give the model's directory or id, or --chat for generated answers alone"
        )
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    try:
        socket.create_connection(address, timeout=CONNECT_S).close()
    except OSError as error:
        raise ConfigError(url, f"does not answer ({_said(error)})", "start the server, or mend the address") from error
    return _Prepared(url, _digest([url, request.model, request.chat, request.seed]), None)


def _digest(parts: list[Any]) -> str:
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()


def _answer(
    prepared: _Prepared, tasks: dict[str, Any], request: EvalRequest, out: Path,
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
            raise ConfigError(f"evaluating {prepared.name}", _said(error), remedy) from error
    say(f"{prepared.name}: answered in {time.monotonic() - start_s:,.1f} s")
    return answers


@contextlib.contextmanager
def _asked(prepared: _Prepared, request: EvalRequest, say: Say) -> Iterator[Any]:
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
            raise ConfigError("--tokenizer", _said(error), "give the model's directory") from error
        yield lm
        return
    from flowrl.engines.vllm_answers import AnsweringVllm
    from flowrl.runs.harness import EngineLM

    config = widen(GenerationConfig, prepared.settings, model=str(prepared.directory))
    engine = AnsweringVllm(config, where="flowrl eval", **prepared.settings.engine_options)
    with asyncio.Runner() as runner:
        say(f"{prepared.name}: loading {prepared.directory}")
        runner.run(engine.open())
        try:
            runner.run(engine.serve_loaded())
            yield EngineLM(engine, load_tokenizer(prepared.directory), runner.run, say, seed=request.seed)
        finally:
            runner.run(engine.close())


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


def differences(
    ours: Answers, theirs: Answers, aggregates: dict[tuple[str, str], Aggregate | None], seed: int
) -> list[Score]:
    """Return ours - theirs for every score, item by item."""
    found: list[Score] = []
    for score in ours.scores:
        key = f"{score.task}/{score.metric}/{score.filter}"
        if ours.digests[key] != theirs.digests.get(key):
            raise DataError(
                f"task {score.task}", "the two models were asked different items", "see the task's function"
            )
        function = aggregates.get((score.task, score.metric))
        bounds = difference_of(ours.items[key], theirs.items[key], function, seed=seed)
        found.append(msgspec.structs.replace(score, bounds=bounds))
    return found


def table(results: Results) -> list[str]:
    """Return the scores as lines, each with its 95 % interval and the method behind it."""
    rows = [("task", "metric", "score [95 % interval]", "items", "method")]
    rows += [_row(score, score.bounds.said()) for score in results.of.scores]
    lines = [f"{results.of.target}:", *_aligned(rows)]
    if results.against is not None:
        lines += [
            f"{results.against.target}:",
            *_aligned([rows[0], *(_row(s, s.bounds.said()) for s in results.against.scores)]),
        ]
        rows = [("task", "metric", "difference [95 % interval]", "items", "method")]
        rows += [_row(score, f"{score.bounds.said()} {_verdict(score)}") for score in results.differences]
        lines += [f"{results.of.target} - {results.against.target}, on the same items:", *_aligned(rows)]
    return lines


def _row(score: Score, said: str) -> tuple[str, ...]:
    metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
    return (one_line(score.task), one_line(metric), said, str(score.bounds.num), score.bounds.method)


def _verdict(score: Score) -> str:
    low, high, better = score.bounds.low, score.bounds.high, score.higher_is_better
    if low is None or high is None or low <= 0 <= high or better is None:
        return "not told apart"
    return "better" if (low > 0) == better else "worse"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _plain(value: Any) -> Any:
    """Return a number of numpy's as Python's, and anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _is_url(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def _short_name(target: str) -> str:
    if _is_url(target):
        return urlsplit(target).netloc.replace(":", "-")
    return Path(target).resolve().name


def _said(error: BaseException) -> str:
    return shortened(f"{type(error).__name__}: {error}", SHOWN_CHARS)
