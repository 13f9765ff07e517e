"""Benchmarks of a run, a model or a server, with lm-eval: `flowrl eval`.

A run (its newest checkpoint) or a model is served by flowrl's own vLLM, a server is asked over lm-eval's own clients.
Tasks are lm-eval's, by name, by a YAML file or a directory of such files; the scores are those that it computes.

Invariants:
- every score has an interval and says by which method (telemetry/scores.py);
- two models are compared on the same items, pair by pair;
- results.json is whole or not there;
- answers are kept in the directory beside it as they come, under a digest of what gave them. So an evaluation that was
  cut off goes on when it is asked again.

Tests: tests/contracts/test_evaluation.py
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from typing import TYPE_CHECKING, Any

from flowrl.data.prompts import load_tokenizer
from flowrl.errors import ConfigError, FlowrlError, number_of, said_briefly
from flowrl.runs.answering import Progress, engine_of, is_url, prepare
from flowrl.runs.results import Answers, Results, Score, conclude, differences, directory
from flowrl.stages.benchmarks import (
    aggregates_of,
    check_installed,
    check_safe,
    load_tasks,
    num_items,
    run_tasks,
    scores_in,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flowrl.runs.answering import EvalRequest, Prepared, Say

CONCURRENT = 8  # requests to a server under way


def evaluate(request: EvalRequest, say: Say) -> Results:
    """Have the tasks answered, print a table, and write results.json.

    Raises:
        UserError: a task, a model, a server or a setting is not what it should be.
    """
    check_installed("flowrl eval")
    targets = [request.target, *([request.against] if request.against else [])]
    if not any(map(is_url, targets)):  # a server's progress is lm-eval's own to show; read when tqdm is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    elif not request.chat and not request.tokenizer:
        what, remedy = "is not given, but completions are asked for in tokens", "give the model's directory or id"
        raise ConfigError("--tokenizer", what, f"{remedy}, or --chat for generated answers alone")
    prepared = [prepare(each, request, say, overrides=request.overrides) for each in targets]
    out = directory(request.directory)
    import lm_eval

    tasks = load_tasks(request.tasks)
    check_safe(tasks, "--tasks", unsafe_code=request.unsafe_code)
    asked = ", ".join(f"{name} ({number_of(num_items(task, request.limit), 'item')})" for name, task in tasks.items())
    say(f"{asked}; answers are kept in {out}")
    answered = [_answer(each, tasks, request, out, say) for each in prepared]
    results = Results(
        benchmark=f"lm-eval {lm_eval.__version__}", seed=request.seed, limit=request.limit, of=answered[0]
    )
    if request.against:
        results.against = answered[1]
        results.differences = differences(answered[0], answered[1], aggregates_of(tasks), request.seed)
    return conclude(results, out, say)


def _answer(prepared: Prepared, tasks: dict[str, Any], request: EvalRequest, out: Path, say: Say) -> Answers:
    """Have one model answer every task."""
    start_s = time.monotonic()
    with _asked(prepared, request, say) as lm:
        try:
            answers = _gathered(prepared.name, lm, tasks, request, out / f"answers-{prepared.digest}.db")
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
    from flowrl.stages.harness import EngineLM

    with asyncio.Runner() as runner:
        serving = engine_of(prepared, say)
        engine = runner.run(serving.__aenter__())
        try:
            yield EngineLM(
                engine, load_tokenizer(prepared.directory), runner.run, seed=request.seed,
                max_length=engine.config.max_model_len, at_once=2 * engine.config.max_running,
                progress=lambda what, total: Progress(what, total, say).step,
            )  # fmt: skip
        finally:
            runner.run(serving.__aexit__(None, None, None))


def _gathered(name: str, lm: Any, tasks: dict[str, Any], request: EvalRequest, kept: Path) -> Answers:
    """Have the tasks answered; what is in the file `kept` is not asked again, and what is asked goes there."""
    import numpy as np
    import torch
    from lm_eval.api.model import CachingLM

    random.seed(request.seed)
    np.random.seed(request.seed)
    torch.manual_seed(request.seed)
    caching = CachingLM(lm, str(kept))
    try:
        results = run_tasks(
            caching, tasks, limit=request.limit, seed=request.seed, num_fewshot=request.num_fewshot,
            chat=request.chat, unsafe_code=request.unsafe_code,
        )  # fmt: skip
    finally:
        caching.dbdict.close()
    answers = Answers(target=name)
    for found in scores_in(results, tasks, request.seed):
        score = Score(task=found.task, metric=found.metric, filter=found.filter, bounds=found.bounds,
                      higher_is_better=found.higher_is_better)  # fmt: skip
        answers.scores.append(score)
        answers.items[score.key], answers.digests[score.key] = found.values, found.digests
    return answers
