"""The results of `flowrl bench dschat` as Markdown: rates, stages, where the gain is from, what was possible.

A pure function of `Results`, which is also what the JSON holds, so that a table can be written again from it. Every
table stands under the settings it was measured with, and nothing is left out where asynchrony loses. Called by
perf/dschat.py.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.config import Config, to_tree
from flowrl.data.prompts import PromptData
from perf.dschat_gains import causes, ceilings, mean
from perf.dschat_workload import StepTimes, Workload
from perf.markdown import markdown_table

if TYPE_CHECKING:
    from collections.abc import Sequence

STAGES = ("generation_s", "sync_s", "scoring_s", "training_s", "other_s", "overlap_s")
HEADS = ("generation", "sync", "logits + reward", "training", "other", "overlap")
WHY = """\
The baseline is called DSChat-*style* because it is DeepSpeed-Chat's design and not its program: the steps, the order,
the padding and the constants of its step 3, written anew in plain PyTorch and Hugging Face. It runs where its original
does not (no hybrid engine on CPUs), it is spared what is no part of the design (logits of prompt positions, generation
after the last response has ended, switching engines), and it has what PyTorch gives anyone: KV cache, SDPA, inference
mode, fused AdamW, every core."""
READING = """\
Seconds of a stage are those in which some replica worked at it. Where stages overlap they add up to more than the
step: `overlap` is how much. `sync` is time in which weights travelled and no stage worked; `other` is none of these.
Speed-ups compare samples per second over all measured steps."""


class Measured(Config):
    """One system as it ran."""

    name: str
    kind: str  # baseline | colocated | disaggregated | asynchronous
    steps: tuple[StepTimes, ...]
    settings: dict[str, Any]  # beside the workload
    share: float = 1.0  # busy share of a closed batch's decode slots, by the decoding costs of its run
    load: float = 0.0  # of the machine, a minute before it began

    @property
    def samples_per_s(self) -> float:
        """Return the rate over all measured steps."""
        return sum(step.samples for step in self.steps) / sum(step.wall_s for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Return the sampled tokens learned per second over all measured steps."""
        return sum(step.tokens for step in self.steps) / sum(step.wall_s for step in self.steps)


class Setting(Config):
    """One workload and every system that was measured on it."""

    work: Workload
    systems: tuple[Measured, ...] = ()

    def of(self, *kinds: str) -> list[Measured]:
        """Return the systems of these kinds."""
        return [system for system in self.systems if system.kind in kinds]


class Results(Config):
    """Everything that was measured."""

    machine: str
    versions: dict[str, str]
    command: str
    settings: tuple[Setting, ...] = ()


def markdown(results: Results) -> str:
    """Return the whole report."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    parts = ["# DSChat-style, synchronous, asynchronous", WHY, READING, f"    {results.command}", results.machine,
             versions]  # fmt: skip
    for setting in results.settings:
        parts += _setting(setting)
    return "\n\n".join(parts) + "\n"


def _setting(setting: Setting) -> list[str]:
    work = setting.work
    if work.mode == "fixed":
        title = f"`fixed`: every response has {work.max_tokens} tokens"
    else:
        title = f"`eos`: a response ends at its stop token, or at {work.max_tokens} tokens"
    parts = [f"## {title}", _settings_table(setting)]
    if setting.systems:
        parts += [_rates(setting), _stages(setting.systems)]
    parts += [table for table in (_gains(setting), _formula(setting)) if table]
    return parts


def _settings_table(setting: Setting) -> str:
    usual = _flat({"data": to_tree(PromptData())})
    flat = {**_flat(to_tree(setting.work)), "samples in a step": setting.work.samples}
    flat = {name: value for name, value in flat.items() if name not in usual or usual[name] != value}
    lines = [", ".join(f"{name} {value}" for name, value in flat.items() if value not in ("", None))]
    for system in setting.systems:
        said = ", ".join(f"{name} {value}" for name, value in _flat(system.settings).items())
        lines.append(f"- {system.name}: {said or 'no further settings'}; load before it {system.load:.1f}")
    return "\n".join(lines)


def _flat(tree: dict[str, Any], at: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{at}.{name}" if at else name
        found |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return found


def _rates(setting: Setting) -> str:
    baselines = setting.of("baseline")
    heads = ["system", "step, s: median (least to most)", "samples/s", "tokens/s", "mean length",
             *(f"over {baseline.name}" for baseline in baselines)]  # fmt: skip
    rows: list[list[str]] = []
    for system in setting.systems:
        walls = [step.wall_s for step in system.steps]
        rows.append(
            [
                system.name,
                f"{statistics.median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f}), {len(walls)} steps",
                _median(system.samples_per_s, [step.samples / step.wall_s for step in system.steps]),
                _median(system.tokens_per_s, [step.tokens / step.wall_s for step in system.steps]),
                f"{sum(step.tokens for step in system.steps) / sum(step.samples for step in system.steps):.1f}",
                *(f"{system.samples_per_s / baseline.samples_per_s:.2f}" for baseline in baselines),
            ]
        )
    return markdown_table(heads, rows)


def _median(whole: float, each: Sequence[float]) -> str:
    return f"{whole:.2f} (median {statistics.median(each):.2f}, {min(each):.2f} to {max(each):.2f})"


def _stages(systems: Sequence[Measured]) -> str:
    rows: list[list[str]] = []
    for system in systems:
        step = mean(system.steps)
        cells = [f"{getattr(step, name):.2f} ({getattr(step, name) / step.wall_s:.0%})" for name in STAGES]
        rows.append([system.name, *cells, f"{step.wall_s:.2f}"])
    return "Seconds of a step, mean (and part of the step):\n\n" + markdown_table(["system", *HEADS, "step"], rows)


def _gains(setting: Setting) -> str:
    """Return the table that splits each gain into causes, a column for each pair of systems."""
    synchronous = setting.of("colocated", "disaggregated")
    pairs = [(baseline, system) for baseline in setting.of("baseline") for system in synchronous]
    pairs += [(system, fast) for system in synchronous for fast in setting.of("asynchronous")]
    if not pairs:
        return ""
    columns: list[tuple[str, dict[str, float], float]] = []
    for slow, fast in pairs:
        # A faster engine also has less of a tail; only between runs of one engine can the two be told apart.
        share = 1.0 if slow.kind == "baseline" else slow.share
        before, after = mean(slow.steps), mean(fast.steps)
        title = f"{fast.name} over {slow.name}"
        columns.append((title, causes(before, after, share), before.wall_s - after.wall_s))
    rows = [[cause, *(f"{found[cause]:+.2f}" for _, found, _ in columns)] for cause in columns[0][1]]
    rows.append(["**together**", *(f"**{whole:+.2f}**" for _, _, whole in columns)])
    intro = (
        "Seconds of a step that each cause saves (+) or costs (-); the rows add up. Over the baseline, generation is "
        "the faster engine, logits + reward and training are prompts computed once and no padding. `long tail` is the "
        "part of a closed batch's decoding in which its slots stood empty."
    )
    return f"{intro}\n\n{markdown_table(['cause', *(title for title, _, _ in columns)], rows)}"


def _formula(setting: Setting) -> str:
    found = {kind: setting.of(kind) for kind in ("asynchronous", "disaggregated", "colocated")}
    if not found["asynchronous"] or not found["disaggregated"]:
        return ""
    means = {kind: mean(systems[0].steps) if systems else None for kind, systems in found.items()}
    share = found["disaggregated"][0].share
    assert means["asynchronous"] is not None
    said = ceilings(means["asynchronous"], means["disaggregated"], means["colocated"], share)
    lines = [f"What overlap could give at this setting (e = {share:.2f}, the busy share of a closed batch's slots):"]
    return "\n".join([lines[0], "", *(f"- {ceiling.verdict()}" for ceiling in said)])


def read_results(data: bytes) -> Results:
    """Return the results that a JSON file holds."""
    return msgspec.json.decode(data, type=Results)
