"""Reward functions in worker processes: whatever user code does, the call ends in time, and no process is left."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.errors import ConfigError, RewardError
from flowrl.messages import encode
from flowrl.rewards.function import made_group
from flowrl.rewards.guard import MOST_OUTPUT_BYTES
from flowrl.rewards.isolated import IsolatedFunction, check_loads
from flowrl.rewards.worker import Opening
from flowrl.stages.reward import Reward
from flowrl.telemetry.events import Notice
from tests.support.one_stage import rollouts, run_alone

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from flowrl.messages import Rollouts

pytestmark = pytest.mark.slow

FUNCTIONS = "tests.support.reward_functions"
ROOT = Path(__file__).resolve().parents[2]
SOON_S = 60.0  # far above what it takes; only a test that fails waits so long


def opening(name: str, *, timeout_s: float = SOON_S, **options: Any) -> Opening:
    fields: dict[str, Any] = {"adapter": "trl", "label_column": "answer", "memory_bytes": 0, **options}
    return Opening(function=f"{FUNCTIONS}:{name}", where="reward.0", timeout_s=timeout_s, **fields)


def isolated(name: str, directory: Path, *, num_workers: int = 1, **options: Any) -> IsolatedFunction:
    log = directory / "logs" / "worker.log"
    return IsolatedFunction(opening(name, **options), num_workers=num_workers, start_timeout_s=SOON_S, log=log)


def using(function: IsolatedFunction, body: Callable[[IsolatedFunction], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with function:
            return await body(function)

    return asyncio.run(run())


def score(name: str, directory: Path, *groups: Rollouts, **options: Any) -> Any:
    """Return what each group got, errors as texts."""

    async def all_of_them(function: IsolatedFunction) -> list[Any]:
        found: list[Any] = []
        for group in groups or (rollouts("one", "three", directory=str(directory)),):
            try:
                found.append(await function(group))
            except RewardError as error:
                found.append(str(error))
        return found

    found = using(isolated(name, directory, **options), all_of_them)
    return found if groups else found[0]


def assert_gone(pid: int) -> None:
    """Wait for a process's end."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], SOON_S)[0], f"process {pid} is still there"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("length", [3.0, 5.0]),
        ("length_async", [3.0, 5.0]),
        ("partly", [0.0, 1.5]),
        ("numpy_scalars", [1.5, 2.5]),
        ("torch_scalars", [0.5, 2.0]),
        ("alarm", [1.0, 1.0]),
        ("floods", [1.0, 1.0]),
        ("reads_input", [0.0, 0.0]),
        ("heavy_modules", [0.0, 0.0]),
    ],
)
def test_a_worker_scores_as_the_function_does(name: str, scores: list[float], tmp_path: Path):
    assert score(name, tmp_path) == scores


def test_no_thread_of_ours_takes_a_signal_in_the_main_thread_s_place(tmp_path: Path):
    """A loop that waits for its alarm without a pause would never hear of it."""
    assert score("takers_of_alarms", tmp_path) == [2.0, 0.0], "the timer and the one that waits for the parent's end"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "raised KeyError: 'gone'"),
        ("exits", "raised SystemExit: 3"),
        ("nan", "score 1 of 2 is nan"),
        ("leaves", "its process died (exit code 7)"),
        ("segfaults", "its process died (SIGSEGV)"),
        ("forks_and_leaves", "its process died (exit code 5)"),
        ("writes_to_channel", "sent something that is not a reply"),
    ],
)
def test_a_failure_names_the_group_and_what_happened(name: str, said: str, tmp_path: Path):
    found = score(name, tmp_path)
    assert f"reward.0 ({FUNCTIONS}:{name}), group 7" in found
    assert said in found


def test_scores_are_looked_at_where_user_code_is_not(tmp_path: Path):
    groups = rollouts("one"), rollouts("two")
    found = score("replaces_checks", tmp_path, *groups)
    assert found[0] == [1.0]
    assert "sent something that is not a reply" in found[1]


def test_an_endless_loop_is_ended_in_time_and_the_next_group_is_scored(tmp_path: Path):
    before_s = time.monotonic()
    groups = rollouts("loop"), rollouts("one")
    found = score("loops_on_word", tmp_path, *groups, timeout_s=3.0)
    assert "no result after 3 s" in found[0]
    assert found[1] == [1.0]
    assert time.monotonic() - before_s < SOON_S
    assert "loops_on_word" in (tmp_path / "logs" / "worker.log").read_text()  # it says where it was


@pytest.mark.parametrize("name", ["regex", "ignores_signals"])
def test_code_that_answers_to_nothing_is_ended_in_time(name: str, tmp_path: Path):
    assert "no result after 0.2 s" in score(name, tmp_path, timeout_s=0.2)


def test_a_death_is_noticed_at_once(tmp_path: Path):
    before_s = time.monotonic()
    found = score("leaves", tmp_path, rollouts("one"), rollouts("one"), timeout_s=600.0)
    assert all("exit code 7" in each for each in found)
    assert time.monotonic() - before_s < SOON_S


def test_the_memory_limit_fails_one_group_and_not_the_worker(tmp_path: Path):
    found = score("eats_memory", tmp_path, memory_bytes=2 << 30)
    assert "raised MemoryError" in found


def test_what_is_printed_goes_to_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    score("floods", tmp_path)
    text = (tmp_path / "logs" / "worker.log").read_text()
    assert len(re.findall(r"^line \d+$", text, re.MULTILINE)) == 10_000
    assert text.count("to the descriptor\n") == 1000
    score("leaves", tmp_path)
    assert "last words" in (tmp_path / "logs" / "worker.log").read_text()


def test_one_process_serves_calls_one_after_the_other(tmp_path: Path):
    found = score("process_id", tmp_path, *[rollouts("one") for _ in range(5)], num_workers=3)
    assert len({pid for (pid,) in found}) == 1
    assert_gone(int(found[0][0]))


def test_as_many_processes_work_as_there_are_groups(tmp_path: Path):
    async def two_at_a_time(function: IsolatedFunction) -> list[float]:
        group = rollouts("one", directory=str(tmp_path / "here"))
        async with asyncio.TaskGroup() as tasks:
            both = [tasks.create_task(function(group)) for _ in range(2)]
        assert function.num_running == 2
        return [task.result()[0] for task in both]

    (tmp_path / "here").mkdir()
    assert len(set(using(isolated("together", tmp_path, num_workers=3), two_at_a_time))) == 2


def test_a_cancelled_call_ends_its_process_and_the_next_is_served(tmp_path: Path):
    async def cancel_one(function: IsolatedFunction) -> list[float]:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(function(rollouts("loop")))
            await asyncio.sleep(0.1)
            task.cancel()
        assert task.cancelled()
        assert function.num_running == 0
        return await function(rollouts("one"))

    assert using(isolated("loops_on_word", tmp_path), cancel_one) == [1.0]


def test_leaving_the_block_by_an_error_ends_every_process(tmp_path: Path):
    pids: list[float] = []

    async def fail(function: IsolatedFunction) -> None:
        pids.extend(await function(rollouts("one")))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        using(isolated("process_id", tmp_path), fail)
    assert_gone(int(pids[0]))


@pytest.mark.parametrize("word", ["loop", "one"])
def test_processes_that_user_code_started_end_with_the_worker(word: str, tmp_path: Path):
    timeout_s = 4.0 if word == "loop" else SOON_S
    score("starts_sleeper", tmp_path, rollouts(word, directory=str(tmp_path)), timeout_s=timeout_s)
    for pid in (tmp_path / "pids").read_text().split():
        assert_gone(int(pid))


@pytest.mark.parametrize("word", ["loop", "one", "die"])
def test_daemons_that_user_code_started_end_with_the_worker(word: str, tmp_path: Path):
    timeout_s = 8.0 if word == "loop" else SOON_S
    score("starts_daemon", tmp_path, rollouts(word, directory=str(tmp_path)), timeout_s=timeout_s)
    pids = (tmp_path / "pids").read_text().split()
    assert pids
    for pid in pids:
        assert_gone(int(pid))


def test_what_is_printed_is_bounded_and_said_to_be_cut(tmp_path: Path):
    assert score("prints_much", tmp_path, rollouts("a")) == [[0.0]]
    (log,) = tmp_path.rglob("*.log")
    assert MOST_OUTPUT_BYTES <= log.stat().st_size < MOST_OUTPUT_BYTES + 200
    assert b"more bytes were printed]" in log.read_bytes()[-100:]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("clipboard", r"raised ValueError: \x1b]52;c;cm0gLXJm\x07\x1b[2J\nflowrl: all is well\r\x9b31m\u202e"),
        ("surrogate", r"raised ValueError: half a pair: \ud800"),
        ("unsayable", "raised Unsayable: what it says cannot be shown (RuntimeError)"),
        ("beyond float32", "score 0 of 1 is 1e+39, beyond what float32 can sum"),
        ("endless", "returned 1001 or more scores for 1 completions"),
        ("interrupt", "raised KeyboardInterrupt: mine"),
        ("long name", " characters) ... "),
        ("streams", "raised ValueError: and then"),
    ],
)
def test_hostile_functions_are_told_of_in_one_harmless_line(word: str, said: str, tmp_path: Path):
    found, after = score("hostile", tmp_path, rollouts(word), rollouts("well"))
    assert said in found
    assert found.isprintable()
    assert len(found) < 5000
    assert after == [0.0], "whoever comes next is not harmed"


@pytest.mark.parametrize(("name", "timeout_s"), [("starts_sleeper", 600.0), ("regex", 1.0)])
def test_nothing_is_left_when_the_engine_is_killed(name: str, timeout_s: float, tmp_path: Path):
    program = (
        "from pathlib import Path\nfrom tests.support.one_stage import rollouts\n"
        "from tests.contracts.test_reward_workers import score\n"
        f"directory = Path({str(tmp_path)!r})\n"
        f"score({name!r}, directory, rollouts('loop', directory=str(directory)), timeout_s={timeout_s})"
    )
    os.mkfifo(tmp_path / "pids")
    told = os.open(tmp_path / "pids", os.O_RDWR)
    engine = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        assert select.select([told], [], [], SOON_S)[0], "the function was not called"
        pids = [int(pid) for pid in os.read(told, 100).split()]
    finally:
        engine.send_signal(signal.SIGKILL)
        engine.wait()
        os.close(told)
    for pid in pids:
        assert_gone(pid)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (f"{FUNCTIONS}:nothing", "has no 'nothing'"),
        ("no_such_module:score", "cannot import 'no_such_module'"),
        (f"{FUNCTIONS}:SLEEPER", "is a list, not a function"),
        ("bad_reward:score", "cannot import 'bad_reward': it raised ZeroDivisionError at"),
        ("deadly_reward:score", "importing deadly_reward:score ended its process (exit code 9)"),
        ("endless_reward:score", "took longer than 1 s"),
    ],
)
def test_a_function_that_does_not_load_is_refused(
    function: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "bad_reward.py").write_text("1 / 0")
    (tmp_path / "deadly_reward.py").write_text("import os\nos._exit(9)")
    (tmp_path / "endless_reward.py").write_text("while True: pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    named = msgspec.structs.replace(opening("length"), function=function)
    with pytest.raises(ConfigError) as caught:
        check_loads(named, timeout_s=1.0 if function.startswith("endless") else SOON_S)
    assert said in str(caught.value)


def test_a_function_that_loads_passes_the_check():
    check_loads(opening("length"), timeout_s=SOON_S)
    check_loads(opening("rubric", adapter="verifiers"), timeout_s=SOON_S)


def test_a_worker_is_tried_on_rows_and_says_whether_it_asks_for_labels():
    group = encode(made_group({"prompt": "a", "answer": "1"}))
    assert not check_loads(opening("length"), [("a row", group)], timeout_s=SOON_S).has_labels
    asking = msgspec.structs.replace(opening("length"), function=f"{FUNCTIONS}:openrlhf", adapter="auto")
    assert check_loads(asking, [("a row", group)], timeout_s=SOON_S).has_labels
    exact = msgspec.structs.replace(opening("length"), function="flowrl.rewards.verify:exact_answer")
    lacking = encode(made_group({"prompt": "a", "answer": None}))
    with pytest.raises(
        ConfigError, match="exact_answer was tried on row 3 and raised ValueError: a row of the data has"
    ):
        check_loads(exact, [("row 1", group), ("row 3", lacking)], timeout_s=SOON_S)


def test_a_worker_imports_what_this_process_can_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_rewards.py").write_text("def score(completions):\n    return [4.0] * len(completions)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir("/")
    named = msgspec.structs.replace(opening("length"), function="my_rewards:score")
    function = IsolatedFunction(named, num_workers=1, start_timeout_s=SOON_S, log=tmp_path / "worker.log")
    assert using(function, lambda function: function(rollouts("one"))) == [4.0]


def test_functions_for_openrlhf_and_verifiers_score_in_a_worker(tmp_path: Path):
    assert score("openrlhf", tmp_path, adapter="openrlhf") == [1.0, 0.0]
    assert score("rubric", tmp_path, adapter="verifiers") == [1.25, 0.0]


def test_the_stage_goes_on_after_a_death_and_keeps_what_died(tmp_path: Path):
    stage = Reward(Reward.Config(function=f"{FUNCTIONS}:loops_on_word", timeout_s=3.0, retries=0, concurrency=2))
    groups = [rollouts("loop" if k == 1 else "one", group_id=k) for k in range(4)]
    alone = run_alone(stage, groups, tmp_path)
    assert sorted(group.group_id for group in alone.put) == [0, 2, 3]
    assert all(group.scores == {"loops_on_word": [1.0]} for group in alone.put)
    assert [(group, kind) for group, kind, _ in alone.rejected] == [(1, "failed")]
    assert "no result after 3 s" in alone.rejected[0][2]
    assert (tmp_path / "quarantine" / "group-1.json").is_file()
    assert [event.level for event in alone.events if isinstance(event, Notice)] == ["warning"]


def test_the_stage_stops_where_that_is_set(tmp_path: Path):
    stage = Reward(Reward.Config(function=f"{FUNCTIONS}:leaves", on_error="stop", retries=0))
    with pytest.raises(ExceptionGroup) as caught:
        run_alone(stage, [rollouts("one")], tmp_path)
    assert caught.group_contains(RewardError, match="exit code 7")


def test_the_stage_refuses_a_function_that_does_not_load():
    with pytest.raises(ConfigError, match="did you mean 'length'"):
        Reward(Reward.Config(function=f"{FUNCTIONS}:lenght")).check(print)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        ("The answer is $x = 3$", "3", 1.0),
        (r"$\sqrt{8}$", r"2\sqrt{2}", 1.0),
        ("Think: 7. <answer>1/2</answer>", r"\frac{1}{2}", 1.0),
        ("4 + 4 = 8\n#### 8", "3 + 5 = 8\n#### 8", 1.0),
        (r"\boxed{12}", "13", 0.0),
        ("", "12", 0.0),
        ("I do not know", "12", 0.0),
        ("#### A", "A", 1.0),
        (r"\boxed{(A)}", "A", 1.0),
        ("A.", "(A)", 1.0),
        ("#### B", "A", 0.0),
        ("#### Paris", "Paris", 1.0),
        ("#### pairs", "Paris", 0.0),
        (r"first \boxed{3}, then \boxed{4}", "3", 0.0),
        ("#### 1, 2", "2", 0.0),
        (r"\boxed{12\text{ km}}", 12.0, 1.0),
        ("#### 1000000", "1e6", 1.0),
        ("#### 72", {"ground_truth": "72"}, 1.0),
        ("12:30", "12:30", 1.0),
        (r"\boxed{1\,000{,}000}", "1000000", 1.0),
        (r"\boxed{32348}", r"\$32,\!348", 1.0),
        (r"\boxed{32}", r"\$32,\!348", 0.0),
        (r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1.0),
        (r"It is \begin{pmatrix}1\\2\end{pmatrix}.", r"\begin{pmatrix}1\\2\end{pmatrix}", 1.0),
        (r"\boxed{2}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 0.0),
        (r"\boxed{x}", r"\begin{equation*}x\end{equation*}", 1.0),
    ],
)
def test_math_answers_are_compared_by_their_meaning(completion: str, answer: object, reward: float):
    from flowrl.rewards.math import math_answer

    assert math_answer([completion], answer=[answer]) == [reward]


def test_math_answers_are_verified_in_a_worker(tmp_path: Path):
    stage = Reward(Reward.Config(function="flowrl.rewards.math:math_answer"))
    groups = [rollouts(r"\boxed{0.5}", r"\boxed{2}", answer=r"\frac{1}{2}"), rollouts("1", group_id=8, answer="why?")]
    alone = run_alone(stage, groups, tmp_path)
    assert [group.scores for group in alone.put] == [{"math_answer": [1.0, 0.0]}]
    assert alone.rejected[0][0] == 8
    assert "'why?' is no mathematical expression" in alone.rejected[0][2]
