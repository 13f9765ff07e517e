"""Throughput over its bound where answers have a long tail, at staleness 0 to 8, simulated on the real flow.

    python -m perf.longtail [--staleness 0 1 2 4 8] [--on-update keep resume abort wait] [--keep-cache] [--learner 0.5]

Answers are log-normal up to 16,384 tokens (median 2,000, sigma 1.1: one in 36 is cut), half of the scatter of their
logarithms being the prompt's. The costs are about those of 7 billion parameters on a GPU that decodes 256 samples
together, a step's 32 groups of 8, and of a learner on another that takes `--learner` of the time that the full batch's
decode slots take to sample a step. The bound is a step in max(G, T): G a step's tokens at the full batch's tokens/s, T
the learner's time. It is graphs/group_async.py on the virtual clock: one implementation of the flow, hours of it in
seconds.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from flowrl.graph.program import load_program
from flowrl.simulation.costs import FORMAT, CallCost, DecodeCost, NodeProfile, Profile, Spread
from flowrl.simulation.run import simulate
from perf.machine import machine
from perf.paper import write_settings
from perf.runs import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.simulation.prediction import Prediction

GRAPH = ROOT / "graphs/group_async.py"
QUEUE = "Queue(replay.samples, learner.samples)"
MOST_TOKENS = 16_384
MEDIAN_TOKENS, LOG_SIGMA = 2000.0, 1.1
SHARED = 0.5  # of the variance of log lengths that the samples of a prompt have in common
PROMPT_TOKENS = 256
GROUPS, GROUP_SIZE, SLOTS = 32, 8, 256
DECODE = DecodeCost(step_s=0.016, sample_s=5e-5, prompt_token_s=2e-5)
PAUSE_S, TRANSFER_S = 0.5, 1.0  # of a weight update
STEPS = 40
QUANTILES = 400


def lengths() -> Spread:
    """Return how long answers are."""
    normal = NormalDist()
    shares = ((place + 0.5) / QUANTILES for place in range(QUANTILES))
    values = [MEDIAN_TOKENS * math.exp(LOG_SIGMA * normal.inv_cdf(share)) for share in shares]
    return Spread(quantiles=tuple(min(float(MOST_TOKENS), value) for value in values), shared=SHARED)


def tokens_per_step() -> float:
    """Return how many tokens a step's answers have on average."""
    quantiles = lengths().quantiles
    return GROUPS * GROUP_SIZE * sum(quantiles) / len(quantiles)


def generating_s() -> float:
    """Return G: a step's answers at the full batch's tokens/s, its prompts read."""
    return tokens_per_step() / DECODE.tokens_per_s(SLOTS) + GROUPS * PROMPT_TOKENS * DECODE.prompt_token_s


def profile(learner: float) -> Profile:
    """Return the costs; the learner's step takes `learner` times G."""
    none = NodeProfile(calls={"score": CallCost()})
    updates = {"update_transfer": CallCost(call_s=TRANSFER_S), "update_pause": CallCost(call_s=PAUSE_S)}
    train = CallCost(token_s=learner * generating_s() / tokens_per_step())
    nodes = {
        "generator": NodeProfile(decode=DECODE, calls=updates),
        "reward": none,
        "reference": none,
        "advantage": none,
        "learner": NodeProfile(calls={"train": train, "publish": CallCost(), "transfer": CallCost()}),
    }
    prompt = Spread(quantiles=(float(PROMPT_TOKENS),))
    return Profile(format=FORMAT, cores=64.0, prompt_tokens=prompt, response_tokens=lengths(), nodes=nodes)


def settings(max_staleness: int, **generator: Any) -> dict[str, Any]:
    """Return the graph's settings: roles on GPUs of their own, a step's groups as many as there are slots for."""
    return {
        "steps": STEPS,
        "groups_per_step": GROUPS,
        "max_staleness": max_staleness,
        "sampling": {"max_tokens": MOST_TOKENS},
        "generator": {
            "gpus": 1, "group_size": GROUP_SIZE, "max_running": SLOTS, "max_groups": 64 * GROUPS,
            "max_model_len": MOST_TOKENS + PROMPT_TOKENS, **generator,
        },
        "learner": {"gpus": 1},
    }  # fmt: skip


def predicted(max_staleness: int, learner: float, *, window: int = 1, **generator: Any) -> Prediction:
    """Return what a run would do at a staleness, where the learner's queue has this window."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / GRAPH.name
        file.write_text(GRAPH.read_text().replace(QUEUE, f"{QUEUE[:-1]}, window={window})"))
        graph = load_program(file, config=write_settings(Path(directory), settings(max_staleness, **generator))).graph
    return simulate(graph, profile(learner), steps=STEPS, detail="causes")


def row(found: Prediction, learner: float) -> list[str]:
    """Return steps an hour, the part of the bound's rate, slot occupancy, the learner's waiting, staleness, length."""
    bound_s = generating_s() * max(1.0, learner)
    waits = found.shares["learner"].get("waiting_for_input", 0.0)
    length = found.tokens_per_s / found.samples_per_s
    return [f"{3600 * found.steps_per_s:.2f}", f"{bound_s * found.steps_per_s:.1%}", f"{found.slots['generator']:.1%}",
            f"{waits:.1%}", f"{found.mean_staleness:.2f}", f"{length:,.0f}"]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--on-update", nargs="+", default=["keep"], choices=["keep", "resume", "abort", "wait"])
    parser.add_argument("--keep-cache", action="store_true", help="keys and values of earlier weights are used on")
    parser.add_argument("--spare", type=int, nargs="+", default=[0], help="generator.spare_samples")
    parser.add_argument("--window", type=int, default=1, help="of the learner's queue, in groups")
    parser.add_argument("--learner", type=float, nargs="+", default=[0.5, 1.0], help="its step over G")
    options = parser.parse_args(argv)
    print(f"simulated on {machine()}")
    print(f"a step has {tokens_per_step():,.0f} tokens; G = {generating_s():,.0f} s at {SLOTS} slots")
    heads = ("learner / G", "on_update", "max_staleness", "spare", "steps/h", "of the bound", "slot occupancy",
             "learner waits", "staleness", "tokens an answer")  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for learner in options.learner:
        for on_update in options.on_update:
            for stale, spare in product(options.staleness, options.spare):
                chosen = {"on_update": on_update, "keep_cache": options.keep_cache, "spare_samples": spare}
                found = predicted(stale, learner, window=options.window, **chosen)
                cells = [f"{learner:g}", on_update, str(stale), str(spare), *row(found, learner)]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
