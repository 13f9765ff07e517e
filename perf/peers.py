"""`flowrl bench peers`: GRPO, SFT and DPO beside TRL's trainers, on the same model, data, sampling and optimizer.

    flowrl bench peers --python ENV/bin/python                 # all three; ENV has flowrl-engine[peers]
    flowrl bench peers --methods grpo --tokens 64 --steps 5 --set generator.threads=2

Both sides run one after the other in processes of their own, `--rounds` times in turns, and every step is timed from
one update of the weights to the next. TRL generates with Hugging Face `generate`; of the ways to hold its weights
(`--ways`) one step each is tried and the quickest is taken. Printed are sequences per second, what padding wastes, and
how near each side is to the floor (peers_floor.py). OUT gets results.json and results.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import msgspec

from flowrl.config import Config
from flowrl.data.models import prepare_model
from flowrl.errors import ConfigError, RunError
from flowrl.runtime.placement import num_cores
from flowrl.telemetry.events import Step
from flowrl.telemetry.metrics import events_in
from perf.machine import machine
from perf.peers_data import METHODS, write_data
from perf.peers_floor import OPERATIONS, data_sizes, floor_s, matrix_rate, num_parameters
from perf.peers_order import PeerOrder, PeerStep, PeerWork, Way
from perf.runs import ROOT, run_graph

GRAPHS = {"grpo": "group_async", "sft": "sft", "dpo": "preference"}
BETA = {"grpo": 0.04, "sft": 0.0, "dpo": 0.1}
DRAINING = 1  # asynchronous steps at the end that have no generation beside them


class Side(Config):
    """One side as it ran on one method."""

    name: str
    work: PeerWork
    steps: tuple[PeerStep, ...]
    floor_s: float  # of a mean step
    settings: dict[str, Any]

    @property
    def sequences_per_s(self) -> float:
        """Return the rate over all measured steps."""
        return sum(step.sequences for step in self.steps) / sum(step.wall_s for step in self.steps)

    @property
    def wall_s(self) -> float:
        """Return the mean step."""
        return sum(step.wall_s for step in self.steps) / len(self.steps)


def main(argv: list[str]) -> int:
    """Measure and print."""
    options = _parser().parse_args(argv)
    out: Path = options.out or ROOT / "runs" / f"bench-peers-{time.strftime('%Y%m%d-%H%M%S')}"
    out.mkdir(parents=True, exist_ok=True)
    _require_trl(options.python)
    rate = matrix_rate(prepare_model(options.model), cores=options.cores)
    head = [
        f"    {shlex.join(['flowrl', 'bench', 'peers', *argv])}",
        machine(),
        f"matrix products of the model's shapes, bfloat16, {options.cores} cores: {rate / 1e9:.0f} GFLOP/s",
    ]
    sides: list[Side] = []
    for method in options.methods:
        work = _work(options, method, out)
        sides += _measure(options, work, rate, out)
        (out / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode({"head": head, "sides": sides})))
        text = "\n\n".join([*head, *(table(sides, method) for method in dict.fromkeys(s.work.method for s in sides))])
        (out / "results.md").write_text(f"# flowrl beside TRL\n\n{text}\n")
    print((out / "results.md").read_text())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowrl bench peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the environment that has TRL")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    usual = PeerWork(method="sft", model="", data="")
    for name in ("groups", "group-size", "examples", "warmup", "steps", "seed"):
        default = getattr(usual, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--tokens", type=int, default=usual.max_tokens, help="of a response in GRPO (default: 64)")
    parser.add_argument("--fixed", action="store_true", help="every response in GRPO has --tokens tokens")
    parser.add_argument("--short", action="store_true", help="SFT and DPO on one-digit sums only, of equal lengths")
    parser.add_argument("--cores", type=int, default=num_cores())
    parser.add_argument("--rows", type=int, default=8, help="of TRL, in one backward (default: 8)")
    parser.add_argument("--ways", nargs="+", choices=get_args(Way), default=["autocast", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE",
                        help="of every flowrl run, or of one method: grpo:max_staleness=2")  # fmt: skip
    parser.add_argument("--out", type=Path, help="directory to write to")
    return parser


def _require_trl(python: Path) -> None:
    program = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    try:
        is_missing = subprocess.run([python, "-c", program], check=False).returncode != 0
    except OSError as error:
        raise ConfigError("--python", f"{python} does not start ({error.strerror})", "name a Python") from error
    if is_missing:
        raise ConfigError("--python", f"{python} has no trl", "pip install 'flowrl-engine[peers]' there")


def _work(options: argparse.Namespace, method: Any, out: Path) -> PeerWork:
    model, data = prepare_model(options.model), out / f"{method}.jsonl"
    write_data(data, method, model=model, num_rows=options.examples * 8, seed=options.seed,
               is_varied=method != "grpo" and not options.short)  # fmt: skip
    return PeerWork(method=method, model=str(model), data=str(data), groups=options.groups,
                    group_size=options.group_size, examples=options.examples, max_tokens=options.tokens,
                    is_fixed=options.fixed, warmup=options.warmup, steps=options.steps, beta=BETA[method],
                    seed=options.seed, cores=options.cores)  # fmt: skip


def _measure(options: argparse.Namespace, work: PeerWork, rate: float, out: Path) -> list[Side]:
    """Run both sides in turns and return them."""
    heads = [override.partition(":") for override in options.overrides]
    overrides = [rest if own == work.method else own + colon + rest for own, colon, rest in heads
                 if own not in METHODS or own == work.method]  # fmt: skip
    order = _quickest(options, work, out)
    steps: dict[str, list[PeerStep]] = {"TRL": [], "flowrl": []}
    for _ in range(options.rounds):
        steps["TRL"] += run_trl(order, options.python, out)
        steps["flowrl"] += run_flowrl(work, overrides, out / "runs")
        print(f"{work.method}: {', '.join(f'{n} {len(s)} steps' for n, s in steps.items())}", flush=True)
    sizes = data_sizes(Path(work.data), Path(work.model))
    said = {"TRL": {"way": order.way, "rows": order.rows}, "flowrl": {**placement(work), "set": overrides}}
    return [
        Side(name=name, work=work, steps=tuple(each), settings=said[name],
             floor_s=statistics.fmean(floor_s(work, step, sizes, rate=rate) for step in each))
        for name, each in steps.items()
    ]  # fmt: skip


def _quickest(options: argparse.Namespace, work: PeerWork, out: Path) -> PeerOrder:
    """Return TRL's order with the way to hold the weights whose step is shortest."""
    orders = [PeerOrder(work=work, way=way, rows=options.rows) for way in options.ways]
    if len(orders) == 1:
        return orders[0]
    trial = msgspec.structs.replace(work, warmup=1, steps=1)
    seconds = [run_trl(msgspec.structs.replace(order, work=trial), options.python, out)[0].wall_s for order in orders]
    for order, step_s in zip(orders, seconds, strict=True):
        print(f"{work.method}: trying TRL with {order.way}: {step_s:.2f} s a step", flush=True)
    return orders[seconds.index(min(seconds))]


def run_trl(order: PeerOrder, python: Path, out: Path) -> list[PeerStep]:
    """Run TRL's side in its environment and return the measured steps."""
    stem = out / f"trl-{order.work.method}-{time.time_ns() // 1_000_000}"
    order_path, answer = stem.with_suffix(".order.json"), stem.with_suffix(".json")
    order_path.write_bytes(msgspec.json.encode(order))
    threads = str(order.work.cores)
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "ACTIVE",
                 "TOKENIZERS_PARALLELISM": "false", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1",
                 "DS_ACCELERATOR": "cpu"}  # fmt: skip
    command = [python, "-m", "perf.peers_trl", str(order_path), str(answer)]
    with stem.with_suffix(".out").open("w") as log:
        ended = subprocess.run(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **variables}, check=False
        )
    if ended.returncode:
        raise RunError("TRL", f"its process ended with {ended.returncode}", f"see {log.name}")
    return msgspec.json.decode(answer.read_bytes(), type=list[PeerStep])


def settings(work: PeerWork) -> dict[str, Any]:
    """Return the settings of flowrl's run as a tree."""
    data: dict[str, Any] = {"source": work.data}
    tree: dict[str, Any] = {
        "model": work.model,
        "seed": work.seed,
        "steps": work.warmup + work.steps,
        "data": data,
        "learner": {"lr": work.lr, "schedule": {"kind": "constant"}, "save_every": 0},
    }
    if work.method == "grpo":
        data |= {"chat_template": False, "num_heldout": 1}
        tree |= {
            "steps": work.warmup + work.steps + DRAINING,
            "groups_per_step": work.groups,
            "algorithm": {"kl": {"coef": work.beta}},
            "sampling": {"max_tokens": work.max_tokens, "ignore_stop": work.is_fixed},
            "generator": {"group_size": work.group_size, "max_running": max(64, work.sequences)},
            "reward": {"function": "perf.peers_data:contains_answer"},
            "evaluation": {"function": "perf.peers_data:contains_answer", "samples": 1},
        }
        tree["learner"]["save_rollouts"] = False
    else:
        data["num_heldout"] = 0
        tree["examples_per_step"] = work.examples
    if work.method == "dpo":
        tree["objective"] = {"beta": work.beta}
    for node, place in placement(work).items():
        tree[node] = tree.get(node, {}) | place
    return tree


def placement(work: PeerWork) -> dict[str, Any]:
    """Return which cores each node has: half for generation in GRPO, else all for each."""
    if work.method == "grpo":
        half = max(1, work.cores // 2)
        rest = max(1, work.cores - half)
        return {"generator": {"cpus": half, "threads": half}, "learner": {"cpus": rest, "threads": rest},
                "reference": {"threads": rest}}  # fmt: skip
    found: dict[str, Any] = {"learner": {"cpus": work.cores, "threads": work.cores}}
    return found | ({"reference": {"threads": work.cores}} if work.method == "dpo" else {})


def run_flowrl(work: PeerWork, overrides: list[str], runs_dir: Path) -> list[PeerStep]:
    """Run flowrl's side and return the measured steps."""
    graph = ROOT / "graphs" / f"{GRAPHS[work.method]}.py"
    run_dir = run_graph(graph, settings(work), label=work.method, overrides=overrides, runs_dir=runs_dir)
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines()
    steps = [event for event in events_in(lines) if isinstance(event, Step)]
    return [
        PeerStep(
            wall_s=after.time_s - before.time_s,
            sequences=work.sequences,
            sampled_tokens=int(after.metrics["tokens"]) if work.method == "grpo" else 0,
        )
        for before, after in pairwise(steps[work.warmup - 1 : work.warmup + work.steps])
    ]


def table(sides: list[Side], method: str) -> str:
    """Return the Markdown of one method."""
    own = [side for side in sides if side.work.method == method]
    work = own[0].work
    unit = {"grpo": "rollouts", "sft": "sequences", "dpo": "pairs"}[method]
    said = ", ".join(f"{name} {value}" for name, value in msgspec.structs.asdict(work).items() if name != "method")
    lines = [
        f"## {method.upper()}",
        f"{said}\n" + "\n".join(f"- {side.name}: {side.settings}" for side in own),
        f"| | step, s: median (least to most) | {unit}/s | padding | floor, s | of the floor's speed |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(_row(side) for side in own),
        f"Floor: {OPERATIONS[method]} x {num_parameters(work.model) / 1e6:.1f} M parameters x tokens over "
        "the matrix rate; prompts counted once, padding not.",
    ]
    rates = {side.name: side.sequences_per_s for side in own}
    lines.append(f"flowrl over TRL: **{rates['flowrl'] / rates['TRL']:.2f}**")
    return "\n\n".join(lines)


def _row(side: Side) -> str:
    walls = [step.wall_s for step in side.steps]
    fed = sum(step.fed_tokens for step in side.steps)
    waste = f"{1 - sum(step.tokens for step in side.steps) / fed:.0%} of what is fed" if fed else "not counted"
    cells = (
        side.name,
        f"{statistics.median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f}), {len(walls)} steps",
        f"{side.sequences_per_s:.2f}",
        waste,
        f"{side.floor_s:.2f}",
        f"{side.floor_s / side.wall_s:.0%}",
    )
    return "| " + " | ".join(cells) + " |"
