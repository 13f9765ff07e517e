"""What `flowrl bench paper` found, as data and as Markdown.

A pure function of `Report`, which is also what its JSON holds. Invariant: every figure of ours stands beside the words
that it is simulated, and every figure of the DSChat column beside the doubt about it. Called by perf/paper.py.
"""

from __future__ import annotations

from flowrl.config import Config
from perf.markdown import markdown_table
from perf.paper_rows import SOURCE, Row

REMEASURED_S = 538.0  # DSChat 7B on 16 A800, by a user in OpenRLHF's issue 327
WHAT = f"""\
Simulated, not measured: no GPU was used. The columns of DSChat and OpenRLHF are those of the OpenRLHF paper,
{SOURCE}: seconds for one batch of 1024 prompts on A800 GPUs. Those of flowrl come from its simulator, which runs the
stages, edges and credits of `graphs/ppo_async.py` on a virtual clock, where each stage takes the seconds that the paper
measured for OpenRLHF. So they say what overlap would make of OpenRLHF's own engines on those GPUs, not how fast
flowrl's engines are.

Assumed: a stage is as many times faster as it has data-parallel replicas (linear scaling; only the best placement needs
it). All responses are equally long, so nothing is gained from a long tail. The whole of `sync` stops the generators.
The four forwards of logits + reward are equally much work. `max_staleness` is 1."""
DISPUTE = f"""\
The DSChat column is disputed. In OpenRLHF's issue 327 a user who ran DSChat 7B on 16 A800 got about
{REMEASURED_S:.0f} s over a few rounds (328 s of them generation, 148 s training) where the paper has 855 s. We cannot
say which of the two is DSChat at its best, so read every ratio over it as the paper's claim, carried on, and rather
look at those over OpenRLHF."""
ROLES = {"generator": "generation", "learner": "actor", "critic": "critic", "reference": "reference",
         "reward_model": "reward"}  # fmt: skip


class Placed(Config):
    """Asynchronous flowrl on one placement."""

    step_s: float  # for one batch
    gpus: dict[str, int]  # by node
    num_settings: int = 0  # that a search looked at to find it


class Found(Config):
    """One size of model: what the simulations gave, in seconds for one batch."""

    row: Row
    dschat_s: float  # serial
    openrlhf_s: float  # serial
    same: Placed  # as OpenRLHF's
    best: Placed | None = None

    @property
    def errors(self) -> tuple[float, float]:
        """Return how far the serial simulations are from the paper's totals of DSChat and of OpenRLHF."""
        return self.dschat_s / self.row.dschat.total - 1, self.openrlhf_s / self.row.openrlhf.total - 1

    @property
    def distance(self) -> float:
        """Return how far asynchronous flowrl on the same placement is above what overlap could give."""
        return self.same.step_s / self.row.openrlhf.bound_s - 1

    @property
    def in_flight_s(self) -> float:
        """Return what two batches in flight allow: each goes through every stage, and is stopped by both updates."""
        return (self.row.openrlhf.total + self.row.openrlhf.sync) / 2


class Report(Config):
    """Everything that was found."""

    source: str
    notes: tuple[str, ...]
    sizes: tuple[Found, ...]


def markdown(report: Report) -> str:
    """Return the whole report."""
    parts = ["# The paper's table 2, and flowrl simulated beside it", WHAT, _table_2(report), DISPUTE,
             _remeasured(report), "## Are the simulated stages the paper's?", _serial(report),
             "## How near to what overlap can give?", _bounds(report)]  # fmt: skip
    if any(found.best for found in report.sizes):
        parts += ["## GPUs of each role", _placements(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table_2(report: Report) -> str:
    heads = ["size", "GPUs", "DSChat, s (disputed)", "OpenRLHF, s", "OpenRLHF over DSChat",
             "flowrl, same placement, s (simulated)", "over OpenRLHF", "over DSChat",
             "flowrl, best placement, s (simulated, linear scaling)", "over OpenRLHF", "over DSChat"]  # fmt: skip
    rows = [
        [f.row.size, str(f.row.gpus), f"{f.row.dschat.total:.1f}", f"{f.row.openrlhf.total:.1f}",
         f"{f.row.dschat.total / f.row.openrlhf.total:.2f}", *_ratios(f, f.same), *_ratios(f, f.best)]
        for f in report.sizes
    ]  # fmt: skip
    return markdown_table(heads, rows)


def _ratios(found: Found, placed: Placed | None) -> list[str]:
    if placed is None:
        return ["not searched", "", ""]
    each = (found.row.openrlhf.total / placed.step_s, found.row.dschat.total / placed.step_s)
    return [f"{placed.step_s:.1f}", *(f"{ratio:.2f}" for ratio in each)]


def _remeasured(report: Report) -> str:
    found = next((f for f in report.sizes if f.row.size == "7B"), None)
    if found is None:
        return ""
    over = [REMEASURED_S / seconds for seconds in (found.row.openrlhf.total, found.same.step_s)]
    return f"With {REMEASURED_S:.0f} s for DSChat 7B, OpenRLHF is {over[0]:.2f} times as fast and flowrl {over[1]:.2f}."


def _serial(report: Report) -> str:
    heads = ["size", "DSChat, paper", "simulated", "error", "OpenRLHF, paper", "simulated", "error"]
    rows = [
        [f.row.size, f"{f.row.dschat.total:.1f}", f"{f.dschat_s:.1f}", f"{f.errors[0]:+.2%}",
         f"{f.row.openrlhf.total:.1f}", f"{f.openrlhf_s:.1f}", f"{f.errors[1]:+.2%}"]
        for f in report.sizes
    ]  # fmt: skip
    intro = (
        "Seconds of one batch at `max_staleness=0` with one stage after the other, against the totals of tables 5 and "
        "6. What is above them is the last message on its way from stage to stage."
    )
    return f"{intro}\n\n{markdown_table(heads, rows)}"


def _bounds(report: Report) -> str:
    heads = ["size", "generation", "logits + reward", "training", "sync", "bound", "two batches in flight allow",
             "flowrl", "above the bound"]  # fmt: skip
    rows = [
        [f.row.size, *(f"{seconds:.1f}" for seconds in (
            f.row.openrlhf.generation, f.row.openrlhf.logits_reward, f.row.openrlhf.training, f.row.openrlhf.sync,
            f.row.openrlhf.bound_s, f.in_flight_s, f.same.step_s)), f"{f.distance:+.1%}"]
        for f in report.sizes
    ]  # fmt: skip
    intro = (
        "OpenRLHF's placement. The bound is max(generation, logits + reward, training) + sync. A staleness of 1 lets "
        "two batches be in flight; each goes through every stage once, and the updates of both stop its generation, so "
        "a step takes at least (generation + logits + reward + training + 2 sync) / 2."
    )
    return f"{intro}\n\n{markdown_table(heads, rows)}"


def _placements(report: Report) -> str:
    heads = ["size", "placement", *ROLES.values(), "placements looked at"]
    rows: list[list[str]] = []
    for found in report.sizes:
        for name, placed in (("the paper's", found.same), ("best found", found.best)):
            if placed is not None:
                gpus = [str(placed.gpus.get(node, 0)) for node in ROLES]
                rows.append([found.row.size, name, *gpus, str(placed.num_settings or "")])
    return markdown_table(heads, rows)
