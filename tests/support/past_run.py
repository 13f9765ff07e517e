"""The directory of a run that never took place: every file that a real one leaves, of hand-made events and rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.graph.graph import RunSettings
from flowrl.graph.program import load_program
from flowrl.messages import Buffer, Sample, Samples, VersionSpan
from flowrl.runtime.ledger import Ledger
from flowrl.runtime.rundir import create_run_dir, write_plan
from flowrl.telemetry.events import Status, Step
from flowrl.telemetry.records import step_path, write_rollouts
from flowrl.telemetry.report import Ending, write_ending
from flowrl.telemetry.sinks import open_sinks
from tests.support.command import ROOT
from tests.unit.telemetry.streams import evaluation, notice, random_run, span, step

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.telemetry.events import Event

SECTIONS = ["heldout", "learning", "time", "queues", "weights", "advice", "rollouts", "ledger", "notices", "settings"]
SCRIPT = "document.title='owned'"
HOSTILE = f'</script><script>{SCRIPT}</script><img src=x onerror="{SCRIPT}">&amp;\x1b[2J{{{{ 7777*7 }}}}'


def sampled(group_id: int, step: int, *, rewards: tuple[float, ...], text: str = "said", age: int = 1) -> Samples:
    """A group of two-token samples, learned in `step`; its first token is `age` versions old, its second one newer."""
    oldest = max(0, step - age)
    return Samples(
        group_id=group_id,
        token_ids=Buffer.ints([3, 4]),
        columns={"prompt": f"prompt {group_id} {text}"},
        num_samples=len(rewards),
        seed=0,
        samples=[
            Sample(
                token_ids=Buffer.ints([5, 6]),
                logprobs=Buffer.floats([-0.5, -1.0]),
                versions=[VersionSpan(oldest, 0, 1), VersionSpan(min(step, oldest + 1), 1, 2)],
                finish="stop",
                text=text,
            )
            for _ in rewards
        ],
        generator="generator.0",
        scores={"exact": list(rewards)},
        ref_logprobs=[Buffer.floats([0.0, 0.0]) for _ in rewards],
        advantages=[Buffer.floats([reward, reward]) for reward in rewards],
    )


def past_run(
    directory: Path, *, text: str = "said", num_steps: int = 6, num_recorded: int = 6, ending: str = "finished"
) -> Path:
    """Write a run of PPO and return its directory; `text` is what prompts, responses and notices hold.

    `ending` is "finished", "failed" or "killed"; the rollouts of the first `num_recorded` steps are on disk.
    """
    create_run_dir(directory)
    program = load_program(ROOT / "graphs" / "ppo_async.py", overrides=[f"steps={num_steps}"])
    write_plan(directory, program)
    events = _events(num_steps, text)
    sinks = open_sinks(directory, RunSettings(), title=directory.name, nodes=list(program.graph.nodes))
    with sinks as opened:
        opened.say = lambda line: None
        opened.consume(events)
    if ending == "killed":
        (directory / "state.json").unlink()
    else:
        write_ending(directory, Ending(name=directory.name, failure=f"learner.0: {text}" if ending == "failed" else ""))
    ledger = Ledger(directory / "ledger.jsonl")
    for version in range(num_steps):
        groups = [sampled(4 * version + k, version, rewards=(0.0, k - 1.0), text=text) for k in range(4)]
        for group in groups:
            ledger.admit(group.group_id)
            ledger.end(group.group_id, "learned", step=version, oldest=group.oldest_version)
        if version < num_recorded:
            write_rollouts(step_path(directory / "rollouts", version), groups, version)
    ledger.admit(4 * num_steps)
    ledger.end(4 * num_steps, "filtered", reason=f"all rewards are alike {text}")
    ledger.close()
    return directory


def _events(num_steps: int, text: str) -> list[Event]:
    draws = random_run(0, num_steps=num_steps)
    events: list[Event] = [evaluation(0, [[0.0, 1.0], [1.0, 1.0], [0.5, 0.0]])]
    for event in draws:
        if isinstance(event, Step):
            told = {"reward.mean": 0.1 * event.version, "kl": 0.01, "loss": 0.5, "response_tokens.mean": 2.0,
                    "tokens": 16.0, "samples": 8.0, "staleness.mean": 0.5, "staleness.max": 1.0,
                    "score.exact": 0.1}  # fmt: skip
            metrics = {name.replace(".", "__"): value for name, value in told.items()}
            event = step(event.version, at=event.time_s, of=num_steps, staleness=(0, 0, 1, 1), **metrics)
            at = event.time_s
            update = span("generator", f"weight update v{event.version}", at, at + 0.3)
            update.args.update(pause_s=0.25, transfer_s=0.1)
            events.append(update)
        events.append(event)
    end_s = max(event.time_s for event in events if isinstance(event, Status))
    events.append(notice(f"a warning {text}", at=end_s))
    events.append(evaluation(num_steps, [[1.0, 1.0], [1.0, 1.0], [0.5, 1.0]], at=end_s))
    return events
