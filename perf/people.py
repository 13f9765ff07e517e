"""People, or a judge, by a hidden rule: does the held-out score of that rule rise while what they depend on is killed?

    python -m perf.people [--rater browser] [--steps 10] [--set learner.lr=2e-4]
    python -m perf.people --rater judge        the same pairs decided by a server that speaks OpenAI's chat completions
    python -m perf.people --asked 0.5          half of the pairs from a data set of the same rule

A rater that knows nothing but two answers prefers the shorter one, in words, that says anything. `browser` sits at the
page of `flowrl feedback` in headless Chromium and presses keys (graphs/humans_dpo.py); `judge` is asked by
graphs/iterative_dpo.py. On the way, by the number of decided pairs (`--kills`): the page or the judge's server, the
queue host and the driver are killed by SIGKILL and come back, the driver by `--resume`. Prints what was killed, how
many judgments were made and are on the disk, what `flowrl verify` says, and the held-out score of the rule before and
after, with the paired change's 95 % interval. Needs perf/README.md's machine for twenty minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import time
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf.machine import machine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

ROOT = Path(__file__).resolve().parents[1]
MOST_WORDS = 40  # from which on an answer is worth nothing
LOOK_S = 0.2
ASKS = ("What is {} used for?", "Where would you look for {}?", "Describe {}.", "Why do people like {}?",
        "Tell a fact about {}.", "What does {} look like?", "Who would buy {}?", "How would you draw {}?")  # fmt: skip
THINGS = ("a river", "a kettle", "the moon", "a bicycle", "bread", "a lighthouse", "snow", "a violin", "a map", "salt",
          "a bridge", "an owl", "a clock", "a garden", "silk", "a candle", "a harbour", "chess", "an apple", "a train",
          "a mirror", "honey", "a desert", "a ladder", "rain", "a library", "a spoon", "a volcano", "wool", "a whale",
          "a window", "tea")  # fmt: skip
GIVEN_THINGS = ("a drum", "a hill", "ink", "a tent", "corn", "a bell", "fog", "a rope", "a fox", "glass", "a well",
                "a coat", "sand", "a crow", "soap", "a wheel")  # fmt: skip
SETTINGS = [
    "groups_per_step=16", "sampling.max_tokens=48", "generator.group_size=2", "data.num_heldout=48",
    "evaluation.samples=2", "evaluation.function=perf.people:brevity", "learner.lora.rank=16", "learner.save_every=2",
]  # fmt: skip


def worth(answer: str) -> float:
    """Return what the hidden rule says of an answer: 1 for one word, 0 for `MOST_WORDS` or none."""
    words = len(answer.split())
    return 1.0 - (words - 1) / (MOST_WORDS - 1) if 0 < words <= MOST_WORDS else 0.0


def brevity(completions: Sequence[str], **columns: Any) -> list[float]:
    """Score answers by the hidden rule, on which nothing is trained."""
    return [worth(answer) for answer in completions]


def write_prompts(path: Path) -> None:
    """Write what is asked."""
    asked = [ask.format(thing) for ask, thing in product(ASKS, THINGS)]
    path.write_text("".join(json.dumps({"prompt": f"{each} Answer in one sentence."}) + "\n" for each in asked))


def write_given(path: Path) -> None:
    """Write preferences by the hidden rule, about other things than are asked: one short sentence before five."""
    rows: list[dict[str, str]] = []
    for ask, thing in product(ASKS, GIVEN_THINGS):
        name = thing.capitalize()
        more = f"{name} can be found in many places, and there is a great deal that could be said about it."
        rejected = " ".join([f"That is a good question, and I am happy to help you with it. {more}", *[more] * 3])
        chosen = f"{name} is quite common."
        rows.append({"prompt": f"{ask.format(thing)} Answer in one sentence.", "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Training:
    """A `flowrl run` that is resumed when it was killed."""

    def __init__(self, graph: Path, run_dir: Path, settings: Sequence[str]) -> None:
        self.run_dir = run_dir
        self._graph = graph
        self._out = run_dir.parent / f"{run_dir.name}.out"
        told = [word for each in settings for word in ("--set", each)]
        self._start(graph, "--name", run_dir.name, "--runs-dir", run_dir.parent, *told)

    def _start(self, *arguments: Any) -> None:
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with self._out.open("ab") as out:
            self.process = subprocess.Popen(["flowrl", "run", *map(str, arguments)], cwd=self.run_dir.parent,
                                            env=variables, stdout=out, stderr=subprocess.STDOUT)  # fmt: skip

    def kill_driver(self) -> None:
        """Kill the driver as the machine would, and resume its run."""
        self.process.kill()
        self.process.wait()
        self._start(self._graph, "--resume", self.run_dir)

    def kill_hub(self) -> None:
        """Kill the process that holds the queues; the driver replaces it."""
        os.kill(self._pid_of("hub"), signal.SIGKILL)

    def _pid_of(self, name: str) -> int:
        """Return the process that writes a log of this name."""
        log = str(self.run_dir / "logs" / name)
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(f"{entry}/fd/1").startswith(log):
                    return int(entry.name)
        raise LookupError(f"no living process writes {log}")


class Kills:
    """What is killed when so many pairs are decided."""

    def __init__(self, counts: Sequence[int], **kills: Callable[[], object]) -> None:
        self._due = [each for each in zip(counts, kills.items(), strict=False) if each[0] >= 0]

    def look(self, num_decided: int) -> None:
        """Kill what is due."""
        while self._due and num_decided >= self._due[0][0]:
            _, (name, kill) = self._due.pop(0)
            kill()
            print(f"{num_decided} pairs decided: {name} killed", flush=True)


async def rated(training: Training, counts: Sequence[int], *, pause_s: float) -> None:
    """Judge in a browser until the run is over, thinking so long about each pair."""
    from tests.support.browser import Browser
    from tests.support.feedback import Served

    while not (training.run_dir / "questions.jsonl").exists():  # a file tells nobody
        assert training.process.poll() is None, "the run ended before it asked anything"
        await asyncio.sleep(LOOK_S)
    served, said = Served(training.run_dir), dict[str, str]()

    def kill_page() -> None:
        served.kill()
        served.start()

    kills = Kills(counts, page=kill_page, hub=training.kill_hub, driver=training.kill_driver)
    try:
        async with Browser() as page:
            await page.open(served.address)
            await page.until("!byId('sign').hidden")
            await page.write("rule")
            await page.press("Enter")
            while training.process.poll() is None:
                asked = await page.value("isBusy || !shown ? null : [shown.id, ...shown.answers.map((a) => a.text)]")
                if asked is None or asked[0] in said:
                    await asyncio.sleep(LOOK_S)
                    continue
                left, right = map(worth, asked[1:])
                await asyncio.sleep(pause_s)
                said[asked[0]] = {True: "left", False: "right"}[left > right] if left != right else "tie"
                await page.press({"left": "1", "right": "2", "tie": "3"}[said[asked[0]]])
                kills.look(len(said))
            await page.until("outbox().length === 0")
            progress, complaints = await page.value("byId('progress').textContent"), page.complaints
    finally:
        served.kill()
    kept = [json.loads(line) for line in (training.run_dir / "judgments.jsonl").read_text().splitlines()]
    is_same = {each["question"]: each["verdict"] for each in kept} == said and len(kept) == len(said)
    print(
        f"{len(said)} judgments made, {len(kept)} on the disk, {'the same' if is_same else 'NOT THE SAME'}; {progress}"
    )
    print(f"ties {sum(each == 'tie' for each in said.values())}; the page complained of {complaints or 'nothing'}")


@asynccontextmanager
async def judging(port: int) -> AsyncIterator[list[str]]:
    """Serve a judge that decides by the hidden rule; yields its verdicts."""
    from aiohttp import web

    verdicts: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        content = (await request.json())["messages"][0]["content"]
        a, b = (worth(re.findall(rf"<answer {name} \w+>\n(.*?)\n</", content, re.DOTALL)[0]) for name in "AB")
        verdicts.append("A" if a > b else "B" if b > a else "C")
        return web.json_response({"choices": [{"message": {"role": "assistant", "content": f"[[{verdicts[-1]}]]"}}]})

    application = web.Application()
    application.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield verdicts
    finally:
        await runner.cleanup()


async def judged(training: Training, counts: Sequence[int], port: int) -> None:
    """Judge by a server until the run is over."""
    kills = Kills(counts[1:], hub=training.kill_hub, driver=training.kill_driver)
    async with judging(port) as verdicts:
        while training.process.poll() is None:
            await asyncio.sleep(LOOK_S)
            kills.look(len(verdicts) // 2)  # each pair in both orders
    print(f"{len(verdicts)} verdicts of the judge")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rater", choices=["browser", "judge"], default="browser")
    parser.add_argument("--graph", type=Path, help="default: humans_dpo.py, with a judge iterative_dpo.py")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kills", type=int, nargs=3, default=[24, 56, 88], metavar="PAIRS",
                        help="decided pairs after which page, queue host and driver are killed; -1: never")  # fmt: skip
    parser.add_argument("--asked", type=float, default=1.0, metavar="SHARE",
                        help="of groups that people decide; the others are given pairs")  # fmt: skip
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that the browser's rater needs for a pair")
    parser.add_argument("--port", type=int, default=8797, help="of the judge")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="PATH=VALUE")
    options = parser.parse_args(argv)
    from flowrl.telemetry.metrics import read_steps
    from perf.improvement import held_out

    runs_dir = options.runs_dir.resolve()
    runs_dir.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    run_dir = runs_dir / f"{options.rater}-{int(time.time())}"
    prompts = runs_dir / f"{run_dir.name}.jsonl"
    write_prompts(prompts)
    settings = [*SETTINGS, f"steps={options.steps}", f"data.source={prompts}"]
    is_browser = options.rater == "browser"
    if is_browser:
        settings += ["humans.undo_s=1", "humans.deadline_s=1800"]
    else:
        settings += ["reward.function=", f"judge.server.url=http://127.0.0.1:{options.port}/v1",
                     "judge.server.model=rule", "judge.rubric.way=pairs"]  # fmt: skip
    if options.asked < 1:
        given = runs_dir / f"{run_dir.name}-given.jsonl"
        write_given(given)
        settings += [f"humans.asked={options.asked}", f"offline.data.source={given}"]
    graph = options.graph or ROOT / "graphs" / ("humans_dpo.py" if is_browser else "iterative_dpo.py")
    began_s = time.monotonic()
    training = Training(graph.resolve(), run_dir, [*settings, *options.settings])
    try:
        if is_browser:
            asyncio.run(rated(training, options.kills, pause_s=options.pause))
        else:
            asyncio.run(judged(training, options.kills, options.port))
    finally:
        if training.process.poll() is None:
            training.process.kill()
    print(f"the run ended with {training.process.wait()} after {(time.monotonic() - began_s) / 60:.1f} minutes")
    verified = subprocess.run(["flowrl", "verify", str(run_dir)], text=True, capture_output=True, check=False)
    print(verified.stdout.strip() or verified.stderr.strip())
    shares = [step["judged"] for step in read_steps(run_dir / "metrics.jsonl").values() if "judged" in step]
    if shares:
        print(f"share of people's pairs by step: {' '.join(f'{share:.2f}' for share in shares)}")
    before, after, change = held_out(run_dir)
    print(f"held-out score of the rule {before:.3f} -> {after:.3f}, change {change}")
    print(machine())


if __name__ == "__main__":
    main()
