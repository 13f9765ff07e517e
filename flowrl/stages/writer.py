"""Writer: puts scored samples into JSONL files, in the order of the prompts, and ends when every prompt has been.

What it takes of a group (`take`) makes the format: every sample, or the best one, as prompt-completion rows; the best
and the worst as a preference row. Responses that were cut are candidates for neither, for as text they would be given
an end.

Invariants:
- file k holds the groups that the ledger says were learned in step k, `groups_per_file` of them or what is left;
- it is on the disk before they are settled, and a checkpoint follows it;
- files of a history that was given up are deleted. So each group is written exactly once, or is in the ledger as
  filtered or failed. Its return ends the run.

Tests: tests/unit/stages/test_writer.py
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from flowrl.config import Meta
from flowrl.data.models import prepare_model
from flowrl.data.prompts import load_tokenizer
from flowrl.data.written import asked_and_answered, template_columns, write_rows
from flowrl.ending import ending_of, sample_text
from flowrl.engines.checkpoint import read_version, write_version
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage
from flowrl.graph.staleness import Admission
from flowrl.messages import Credit, End, Referenced, Sample, Scored
from flowrl.stages.sampler import Sampler
from flowrl.stages.saving import save_parts
from flowrl.stages.selector import Selection, choose
from flowrl.stages.step import step_metrics
from flowrl.stages.tokens import mask_of
from flowrl.telemetry.events import Cause, Step
from flowrl.telemetry.files import set_aside

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.data.formats import Text
    from flowrl.graph.stage import Context


class Writer(Stage):
    """Writes samples with their rewards."""

    class Config(Selection):
        """Settings of the writer node."""

        take: Literal["all", "best", "pair"] = "all"  # of each group's samples
        turns: Literal["all", "last"] = "all"  # of an episode; "last": what the policy wrote last is the completion
        groups_per_file: Annotated[int, Meta(ge=1)] = 64  # prompt groups in one JSONL file

    ordered = frozenset({"scored"})
    is_stateful = True
    scored: In[Scored]
    ended: In[End]
    released: Out[Credit]

    def __init__(self, config: Config, sampler: Sampler) -> None:
        self.config: Writer.Config = config
        self.sampler = sampler
        self._num_groups: int | None = None  # of the whole run, once the source has said so
        self._tokenizer: Any = None  # where only the last turn is kept
        self._num_files = 0  # of the whole run, as far as it is known

    @property
    def admission(self) -> Admission:
        """Return what goes into a file, which is its version; the source says when it has ended."""
        return Admission(self.config.groups_per_file)

    async def run(self, context: Context) -> None:
        """Write until every group has ended, or the user asks to stop."""
        with context.clock.charge(Cause.START):
            context.version = 0
            if self.config.turns == "last":
                self._tokenizer = await context.compute(load_tokenizer, prepare_model(self.sampler.model))
            if context.resume_from is not None:
                context.version = await context.compute(read_version, context.resume_from / context.node)
            await context.compute(forget_files, context.run_dir / "data", context.version)
        ending = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            waits = [tasks.create_task(self._await_end(ending)), tasks.create_task(_await_stop(context, ending))]
            await self._write_files(context, ending)
            for wait in waits:
                wait.cancel()
        text = f"{context.version} files are in {context.run_dir / 'data'}; data.source={context.run_dir} reads them"
        context.notice(text, level="info")

    async def _await_end(self, ending: asyncio.Event) -> None:
        end = await self.ended.get()
        self._num_groups = end.version
        ending.set()
        await self.ended.done(end)

    async def _write_files(self, context: Context, ending: asyncio.Event) -> None:
        is_last = False
        while not is_last:
            groups: list[Scored] = []
            rows: list[dict[str, Any]] = []
            start_s = context.now()
            while len(groups) < self.config.groups_per_file and not is_last:
                group = await self._next(context, ending, num_held=len(groups))
                if group is None:
                    is_last = True
                elif found := await self._rows(group):
                    groups.append(group)
                    rows += found
            if groups:
                await self._write(context, groups, rows, start_s)
        if context.version and self._num_groups is not None and self._num_files != context.version:
            self._record_step(context, {})  # what was to come was filtered or failed

    async def _next(self, context: Context, ending: asyncio.Event, *, num_held: int) -> Scored | None:
        """Wait for a group; returns None once none is admitted any more and only those held here have not ended."""

        async def drained() -> None:
            await ending.wait()
            await context.fewer_out(num_held + 1)

        taking, draining = asyncio.ensure_future(self.scored.get()), asyncio.ensure_future(drained())
        try:
            await asyncio.wait([taking, draining], return_when=asyncio.FIRST_COMPLETED)
            return taking.result() if taking.done() else None
        finally:
            for waiting in (taking, draining):
                waiting.cancel()
            await asyncio.gather(taking, draining, return_exceptions=True)

    async def _rows(self, group: Scored) -> list[dict[str, Any]]:
        """Return a group's rows, or none where it is filtered."""
        if self.config.take == "all":
            return [self._row(group, place) for place in range(len(group.samples))]
        places, reason = choose(group, self.config.take, self.config, whole_answers(group))
        if reason:
            await self.scored.reject(group, kind="filtered", reason=reason)
            return []
        return [self._row(group, places[0]) if self.config.take == "best" else self._pair(group, *places)]

    def _written(self, group: Scored, sample: Sample) -> tuple[Text, Text]:
        """Return the prompt and what of a sample is the completion."""
        if self._tokenizer is None:
            return asked_and_answered(self.sampler.data, group.columns, sample.text)
        sampled = mask_of(sample).tolist()
        start = next((k + 1 for k in reversed(range(len(sampled))) if not sampled[k]), 0)
        text = sample_text(self._tokenizer, sample.token_ids.tolist()[start:], ending_of(self._tokenizer).stops)
        columns = {name: value for name, value in group.columns.items() if name != "answer_prefix"}  # began the first
        return asked_and_answered(self.sampler.data, columns, text)

    def _row(self, group: Scored, place: int) -> dict[str, Any]:
        sample = group.samples[place]
        prompt, completion = self._written(group, sample)
        logprobs = {"logprob": float(sample.logprobs.numpy().sum(dtype="float64"))}
        if isinstance(group, Referenced) and group.ref_logprobs:
            logprobs["ref_logprob"] = float(group.ref_logprobs[place].numpy().sum(dtype="float64"))
        return {
            "prompt": prompt,
            "completion": completion,
            **template_columns(group.columns),
            "reward": group.rewards[place],
            **{f"score.{name}": scores[place] for name, scores in group.scores.items()},
            **logprobs,
            "num_tokens": len(sample.token_ids),
            "finish": sample.finish,
            "group_id": group.group_id,
            "sample": place,
            "row": group.columns,
        }

    def _pair(self, group: Scored, best: int, worst: int) -> dict[str, Any]:
        prompt, chosen = self._written(group, group.samples[best])
        _, rejected = self._written(group, group.samples[worst])
        return {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "finish": "stop",
            **template_columns(group.columns),
            "score_chosen": group.rewards[best],
            "score_rejected": group.rewards[worst],
            "group_id": group.group_id,
            "row": group.columns,
        }

    async def _write(self, context: Context, groups: list[Scored], rows: list[dict[str, Any]], start_s: float) -> None:
        version = context.version
        await context.write(write_rows, file_path(context.run_dir / "data", version), rows)
        context.version += 1
        context.done += len(groups)
        ids = [group.group_id for group in groups]
        await self.scored.done(*groups, learned_in=version)
        await self.released.put(Credit(groups=ids))
        context.span(f"file {version}", start_s, groups=ids)
        metrics = {**step_metrics(groups, [0] * len(groups)), "rows": float(len(rows))}
        if ratios := [row["logprob"] - row["ref_logprob"] for row in rows if "ref_logprob" in row]:
            metrics["kl"] = sum(ratios) / len(ratios)  # of whole responses, nats
        num_to_come = None if self._num_groups is None else self._num_groups - ids[-1] - 1
        self._record_step(context, metrics, num_to_come=num_to_come)
        await save_parts(
            context, partial(_write_state, context.node, context.version), keep=1, score=0.0, saving=self.saving
        )

    def _record_step(self, context: Context, metrics: dict[str, float], *, num_to_come: int | None = 0) -> None:
        """Record a file as a step; `num_to_come` groups have not arrived, None where that is not known."""
        num_more = 1 if num_to_come is None else -(-num_to_come // self.config.groups_per_file)
        self._num_files = context.version + num_more
        context.recorder.record(
            Step(version=context.version, num_steps=self._num_files, time_s=context.now(), metrics=metrics)
        )


def whole_answers(group: Scored) -> list[int]:
    """Return the places of the samples that came to their end and say something."""
    return [place for place, sample in enumerate(group.samples) if sample.finish == "stop" and sample.text.strip()]


async def _await_stop(context: Context, ending: asyncio.Event) -> None:
    await context.stopping.wait()
    ending.set()


def _write_state(node: str, version: int, aside: Path) -> None:
    (aside / node).mkdir()
    write_version(aside / node, version)


def file_path(directory: Path, number: int) -> Path:
    """Return the file of a number; names begin as data.split does by default."""
    return directory / f"train-{number:06d}.jsonl"


def forget_files(directory: Path, first: int) -> None:
    """Set file `first` and later ones aside, of a history that was given up."""
    number = first
    while (path := file_path(directory, number)).exists():
        set_aside([path])
        number += 1
