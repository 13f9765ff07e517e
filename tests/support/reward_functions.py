"""Reward functions that do what user code does at its worst; tests run them in worker processes by import path."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


def length(completions: list[str]) -> list[int]:
    return [len(text) for text in completions]


async def length_async(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


def process_id(completions: list[str]) -> list[int]:
    return [os.getpid()] * len(completions)


def together(completions: list[str], directory: list[str]) -> list[int]:
    """Wait until two processes are here, each leaving a file: ends only if two groups are scored at a time."""
    here = Path(directory[0])
    (here / str(os.getpid())).touch()
    while len(list(here.iterdir())) < 2:
        time.sleep(0.01)
    return [os.getpid()] * len(completions)


def partly(completions: list[str]) -> list[float | None]:
    return [None, 1.5]


def numpy_scalars(completions: list[str]) -> Any:
    import numpy as np

    return np.array([len(text) / 2 for text in completions], dtype=np.float32)


def torch_scalars(completions: list[str]) -> Any:
    import torch

    return [torch.tensor(0.5), torch.tensor([2])]


def raises(completions: list[str]) -> list[float]:
    raise KeyError("gone")


def nan(completions: list[str]) -> list[float]:
    return [0.0, float("nan")]


def fails_on_word(completions: list[str]) -> list[float]:
    if "bad" in completions:
        raise ValueError("a bad one")
    return [1.0] * len(completions)


def exits(completions: list[str]) -> list[float]:
    sys.exit(3)


def leaves(completions: list[str]) -> list[float]:
    print("last words")
    os._exit(7)


def segfaults(completions: list[str]) -> list[float]:
    ctypes.string_at(0)
    return []


def loops_on_word(completions: list[str]) -> list[float]:
    """Loop for ever where a completion says so."""
    while "loop" in completions:
        pass
    return [1.0] * len(completions)


def regex(completions: list[str], directory: list[str]) -> list[float]:
    """Hold the interpreter's lock for ever, so that no other thread of the process runs; first say who does."""
    Path(directory[0], "pids").write_text(str(os.getpid()))
    return [float(bool(re.fullmatch(r"(a+)+b", "a" * 60)))]


def ignores_signals(completions: list[str]) -> list[float]:
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGABRT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    while True:
        time.sleep(60)


def floods(completions: list[str]) -> list[float]:
    for line in range(10_000):
        print(f"line {line}")
    sys.stderr.write("e" * 1_000_000)
    os.write(1, b"to the descriptor\n" * 1000)
    return [1.0] * len(completions)


def reads_input(completions: list[str]) -> list[int]:
    return [len(sys.stdin.read())] * len(completions)


def eats_memory(completions: list[str]) -> list[float]:
    return [float(len(bytearray(8 << 30)))] * len(completions)


def starts_sleeper(completions: list[str], directory: list[str]) -> list[float]:
    """Start a process that outlives the call, then say who is here."""
    process = subprocess.Popen(SLEEPER)
    Path(directory[0], "pids").write_text(f"{os.getpid()} {process.pid}")
    while "loop" in completions:
        pass
    return [1.0] * len(completions)


def forks_and_leaves(completions: list[str]) -> list[float]:
    """Die while a forked child lives on."""
    if os.fork() == 0:
        time.sleep(600)
    os._exit(5)


def alarm(completions: list[str]) -> list[float]:
    """Rely on a signal, as some libraries' time limits do; they work in a main thread only."""
    assert threading.current_thread() is threading.main_thread()
    caught: list[float] = []
    signal.signal(signal.SIGALRM, lambda *_: caught.append(1.0))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while not caught:
        pass
    return caught * len(completions)


def takers_of_alarms(completions: list[str]) -> list[float]:
    """Score with how many threads besides the main one would take an alarm in its place."""
    others = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
    masks = [re.search(r"^SigBlk:\s*(\w+)", (task / "status").read_text(), re.MULTILINE) for task in others]
    taking = sum(not int(mask[1], 16) >> signal.SIGALRM - 1 & 1 for mask in masks if mask)
    return [float(len(others)), float(taking)]


def writes_to_channel(completions: list[str]) -> list[float]:
    for descriptor in range(3, 10):
        try:
            os.write(descriptor, b"\x05\x00\x00\x00hello")
        except OSError:
            continue
    return [1.0] * len(completions)


def heavy_modules(completions: list[str]) -> list[float]:
    return [float(any(name in sys.modules for name in ("torch", "ray", "vllm", "transformers", "numpy")))] * 2


def openrlhf(queries: list[str], prompts: list[str], labels: list[str], **_: Any) -> Any:
    """Look for the label in the response, as functions for OpenRLHF do."""
    import numpy as np

    given = zip(queries, prompts, labels, strict=True)
    rewards = np.array([float(label in query.removeprefix(prompt)) for query, prompt, label in given])
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"mean": rewards.mean()}}


@dataclass
class Rubric:
    """As verifiers' has them: functions, weights, and objects that functions may ask for by name."""

    funcs: list[Callable[..., Any]]
    weights: list[float]
    class_objects: dict[str, Any] = field(default_factory=dict)


def exact(completion: str, answer: str) -> float:
    return float(completion == answer)


async def short(completion: str, state: dict[str, Any], **_: Any) -> float:
    await asyncio.sleep(0)
    state["short"] = len(completion) < 5
    return float(state["short"])


def rubric() -> Rubric:
    return Rubric(funcs=[exact, short], weights=[1.0, 0.25])


def starts_daemon(completions: list[str], directory: list[str]) -> list[float]:
    """Start a process as daemons do: in a session of its own, without a parent or an environment; then hang or die."""
    program = (
        "import os, sys, subprocess\nos.setsid()\n"
        f"p = subprocess.Popen({SLEEPER!r}, start_new_session=True, env={{}})\n"
        f"open({str(Path(directory[0]) / 'pids')!r}, 'a').write(f'{{p.pid}} ')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    if completions[0] == "die":
        os._exit(3)
    while completions[0] == "loop":
        pass
    return [1.0 for _ in completions]


def prints_much(completions: list[str]) -> list[float]:
    """Print forty megabytes."""
    for _ in range(40):
        print("x" * (1 << 20))
    return [0.0 for _ in completions]


def replaces_checks(completions: list[str]) -> list[float]:
    """Let nothing in this process look at what is returned from now on."""
    from flowrl.rewards.function import RewardFunction

    RewardFunction.call_here = lambda self, group, runner: [float("nan")] * len(group.samples)
    return [1.0 for _ in completions]


class Unsayable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def hostile(completions: list[str]) -> list[float]:
    """Raise, or return, what the completion asks for."""
    match completions[0]:
        case "endless":
            return itertools.count()  # type: ignore[return-value]
        case "interrupt":
            raise KeyboardInterrupt("mine")
        case "long name":
            raise type("E" * 1_000_000, (Exception,), {})("x")
        case "streams":
            sys.stdout = sys.stderr = None  # type: ignore[assignment]
            raise ValueError("and then")
        case "clipboard":
            raise ValueError("\x1b]52;c;cm0gLXJm\x07\x1b[2J\nflowrl: all is well\r\x9b31m\u202e")
        case "surrogate":
            raise ValueError("half a pair: \ud800")
        case "unsayable":
            raise Unsayable
        case "beyond float32":
            return [1e39 for _ in completions]
    return [0.0 for _ in completions]
