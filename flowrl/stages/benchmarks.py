"""Benchmarks of lm-eval: its tasks by name or by file, asked of whatever answers, each score with its interval.

Invariants:
- a task's data are there before anything is asked;
- the scores are those that lm-eval computes.

What lm-eval needs is loaded when something is asked of it. Called by runs/evaluation.py and by the Evaluator.

Tests: tests/contracts/test_evaluation.py
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from flowrl.errors import ConfigError, DataError, said_briefly
from flowrl.telemetry.scores import Aggregate, Bounds, score_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flowrl.errors import FlowrlError


class TaskScore(NamedTuple):
    """One metric of one task, and what it was computed from."""

    task: str
    metric: str
    filter: str  # of the answers; "none": they are taken as they are
    bounds: Bounds
    higher_is_better: bool | None
    values: list[Any]  # one for each item
    digests: list[str]  # of the items

    @property
    def name(self) -> str:
        """Return TASK/METRIC, with the filter where there is one."""
        return "/".join([self.task, self.metric, *([self.filter] if self.filter != "none" else [])])


def check_installed(where: str) -> None:
    """Insist on lm-eval.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(where, "lm-eval is not installed", "pip install 'flowrl-engine[eval]'")


def load_tasks(names: Sequence[str], where: str = "--tasks") -> dict[str, Any]:
    """Return lm-eval's tasks by name: its own, those of a YAML file, or of a directory of such files.

    Raises:
        ConfigError: there is no such task, or a file is none.
        DataError: a task's data cannot be had.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    specs = [spec for name in names for spec in _specs(name, where)]
    manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
    for spec in specs:
        if isinstance(spec, str) and not manager.match_tasks([spec]):
            what = f"lm-eval has no task {spec!r}, nor is it a file or a directory"
            raise ConfigError(where, what, "`lm-eval ls tasks` lists them; a task of yours is a YAML file")
    tasks: dict[str, Any] = {}
    for spec in specs:
        name = spec if isinstance(spec, str) else str(spec.get("task"))
        try:
            loaded = manager.load([spec])["tasks"]
        except Exception as error:  # whatever a loader of data raises
            raise _no_data(name, error) from error
        for task in loaded.values():
            _check_metrics(task, where)
        if twice := sorted(loaded.keys() & tasks.keys()):
            raise ConfigError(where, f"{twice[0]} is named twice", "name it once")
        tasks |= loaded
    return tasks


def _check_metrics(task: Any, where: str) -> None:
    """Insist that a task's metrics are known; lm-eval computes none of those that it does not know.

    Raises:
        ConfigError: one is not.
    """
    from lm_eval.api.task import ConfigurableTask

    is_own = callable(task.get_config("process_results"))  # a function of the task's computes them, or its class
    is_own |= type(task).process_results is not ConfigurableTask.process_results
    for metric, aggregate in task.aggregation().items():
        if aggregate is None:
            what = f"{task.task_name} makes its {metric} of the items' values in a way that lm-eval does not know"
            raise ConfigError(where, what, "see the `aggregation` in its file")
        function = getattr(task, "_metric_fn_list", {}).get(metric, aggregate)
        if function is None and not is_own and metric != "bypass":
            raise ConfigError(where, f"lm-eval knows no metric {metric} ({task.task_name})", "see its task guide")


def _specs(name: str, where: str) -> Iterator[str | dict[str, Any]]:
    """Return a task's name, or what its files say."""
    path = Path(name)
    is_file = name.endswith((".yaml", ".yml"))
    if not is_file and not path.is_dir():
        yield name
        return
    files = [path] if is_file else sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    if not files:
        raise ConfigError(where, f"{path} holds no YAML file", "name a directory of task files")
    from lm_eval.tasks._yaml_loader import load_yaml

    for file in files:
        if not file.is_file():
            raise ConfigError(where, f"{file} is not there", "name a task, a YAML file or a directory")
        try:
            spec = load_yaml(file.absolute(), resolve_func=True)
        except Exception as error:  # of a YAML parser, or of the user's functions beside it
            raise ConfigError(
                where, f"{file} cannot be read ({said_briefly(error)})", "see lm-eval's task guide"
            ) from error
        if not isinstance(spec, dict) or not isinstance(spec.get("task"), str):
            raise ConfigError(where, f"{file} names no task", "write `task: NAME` and what it needs")
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


def num_items(task: Any, limit: int) -> int:
    """Return how many of a task's items are asked."""
    num = len(task.eval_docs)
    return min(num, limit) if limit else num


def aggregates_of(tasks: dict[str, Any]) -> dict[tuple[str, str], Aggregate | None]:
    """Return what makes each task's metrics of its items' values; None: the mean."""
    found: dict[tuple[str, str], Aggregate | None] = {}
    for name, task in tasks.items():
        for metric, function in task.aggregation().items():
            found[name, metric] = None if getattr(function, "__name__", "") in ("mean", "nanmean") else function
    return found


def check_safe(tasks: dict[str, Any], where: str, *, unsafe_code: bool = False) -> None:
    """Insist on leave for tasks that run what a model wrote.

    Raises:
        ConfigError: it is not given.
    """
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not unsafe_code:
        raise ConfigError(where, f"{unsafe[0]} runs what a model writes", "leave it to `flowrl eval --unsafe-code`")


def run_tasks(
    lm: Any, tasks: dict[str, Any], *, limit: int, seed: int, num_fewshot: int | None = None, chat: bool = False,
    unsafe_code: bool = False,
) -> Any:  # fmt: skip
    """Return lm-eval's results; blocking."""
    from lm_eval.evaluator import evaluate

    for task in tasks.values():
        if num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    return evaluate(
        lm=lm,
        task_dict=cast("Any", {"tasks": tasks, "groups": {}}),
        limit=limit or None,
        bootstrap_iters=0,
        apply_chat_template=chat,
        confirm_run_unsafe_code=unsafe_code,
    )


def scores_in(results: Any, tasks: dict[str, Any], seed: int) -> Iterator[TaskScore]:
    """Yield lm-eval's scores with their intervals, from its record of every item.

    Raises:
        DataError: a task has none.
    """
    aggregates = aggregates_of(tasks)
    for task, samples in results["samples"].items():
        if not any(row["metrics"] for row in samples):
            what = f"gave no score: lm-eval computes none of {', '.join(tasks[task].aggregation())} from its answers"
            raise DataError(f"task {task}", what, "see its output_type and its metric_list")
        better = results["higher_is_better"].get(task, {})
        for chosen in dict.fromkeys(sample["filter"] for sample in samples):
            rows = sorted((row for row in samples if row["filter"] == chosen), key=lambda row: row["doc_id"])
            for metric in rows[0]["metrics"]:
                value = results["results"][task].get(f"{metric},{chosen}")
                if not isinstance(value, int | float):
                    continue
                values = [row[metric] for row in rows]
                bounds = score_of(values, aggregates.get((task, metric)), seed=seed)
                bounds = msgspec.structs.replace(bounds, value=float(value))
                digests = [row["doc_hash"] for row in rows]
                yield TaskScore(task, metric, chosen, bounds, better.get(metric), values, digests)
