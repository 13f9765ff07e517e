"""What benchmarks with a judge have in common: their settings, files that grow by lines, and the judge with its counts.

Invariants:
- what was answered or judged is in a file before the next is asked, and nothing in it is asked again;
- a question that the judge refuses or fails at is counted and never becomes a number, and where it fails at the first
  ones all, the evaluation ends.

Called by runs/mt_bench.py and runs/alpaca_eval.py.

Tests: tests/contracts/test_judged_benchmarks.py
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec

from flowrl.config import Config, Meta, resolve
from flowrl.errors import ConfigError, DataError, LastingError, RewardError, number_of
from flowrl.rewards.chat import ChatServer, chatting, check_chat
from flowrl.rewards.http import Unreachable
from flowrl.rewards.judging import correlated
from flowrl.runs.answering import Prepared, Progress, answering, check_reachable, for_each, is_url, prepare, short_name
from flowrl.telemetry.files import RecordFile, read_file, replace_file
from flowrl.telemetry.scores import wilson

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from flowrl.rewards.chat import Chat, Spoken
    from flowrl.rewards.judging import Messages
    from flowrl.runs.answering import Answer, EvalRequest, Say

FIRST = 8  # questions: a judge that fails at all of them is not asked the rest
LEANS = 0.3  # correlation of verdict and length that is worth a warning, from FEW on
FEW = 20
KEPT = "what was answered and judged is kept: the same command goes on from there"


class JudgedSettings(Config):
    """What `flowrl eval --set` takes beside an engine's settings, where a judge is asked."""

    judge: ChatServer = ChatServer(max_tokens=2048)
    server: ChatServer = ChatServer()  # how a model behind a URL is asked
    prompts: str = ""  # judge's: FastChat's judge_prompts.jsonl, or an AlpacaEval annotator's configs.yaml; "": our own
    way: Literal["single", "pairs"] = "single"  # MT-Bench: every answer alone, or against the other model's
    name: str = ""  # of the model in the benchmark's files; "": that of its directory or host
    answer_tokens: Annotated[int, Meta(ge=1)] = 1024  # of one answer at most
    gamed: str = ""  # AlpacaEval's df_gamed.csv, without which length is controlled by answers alone


_FIELDS = frozenset(JudgedSettings.__struct_fields__)
Q = TypeVar("Q")


class Contender(msgspec.Struct, frozen=True):
    """A model in a benchmark's files."""

    name: str
    target: str
    prepared: Prepared | None  # None: its answers are given


def settle(request: EvalRequest, say: Say, *, needs_judge: bool = True) -> tuple[JudgedSettings, list[Contender]]:
    """Return the settings and the models, each checked as far as can be before anything is asked.

    Raises:
        UserError: a setting, a model or a server is not what it should be.
    """
    own = [each for each in request.overrides if each.partition("=")[0].split(".")[0] in _FIELDS]
    settings = resolve(JudgedSettings, overrides=own)
    if needs_judge:
        check_chat(settings.judge, "judge")
        check_reachable(settings.judge.url)
    others = [each for each in request.overrides if each not in own]
    contenders: list[Contender] = []
    for target in [request.target, *([request.against] if request.against else [])]:
        is_given = target.endswith((".json", ".jsonl")) and not is_url(target)
        prepared = None if is_given else prepare(target, request, say, overrides=others)
        name = settings.name if settings.name and not contenders else short_name(target)
        contenders.append(Contender(name.removesuffix(".jsonl").removesuffix(".json"), target, prepared))
    if len({each.name for each in contenders}) < len(contenders):
        what = f"both models are called {contenders[0].name}"
        raise ConfigError("flowrl eval", what, "give the first another with --set name=NAME")
    return settings, contenders


class Lines:
    """A file of JSON lines in another project's format, to which rows are appended as they come."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that a kill cut short is taken off.

        Raises:
            DataError: another line cannot be read.
        """
        self.path = path
        whole, _, torn = (read_file(path) or b"").rpartition(b"\n")
        self.rows = rows_in(whole, path)
        if torn.strip():
            with contextlib.suppress(DataError):  # it was never acknowledged
                self.rows += rows_in(torn, path)
            self._rewrite()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: RecordFile | None = None

    def keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the other rows."""
        kept = [row for row in self.rows if is_kept(row)]
        if len(kept) < len(self.rows):
            self.rows = kept
            self._rewrite()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it is on the disk when this returns."""
        if self._file is None:
            self._file = RecordFile(self.path)
        self._file.append(msgspec.json.encode(row) + b"\n")
        self._file.sync()
        self.rows.append(row)

    def sort(self, key: Callable[[dict[str, Any]], Any]) -> None:
        """Write the rows in an order that does not depend on which came first."""
        self.close()
        self.rows.sort(key=key)
        self._rewrite()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rewrite(self) -> None:
        replace_file(self.path, b"".join(msgspec.json.encode(row) + b"\n" for row in self.rows))


def rows_in(body: bytes, path: Path) -> list[dict[str, Any]]:
    """Return the objects that stand one in a line.

    Raises:
        DataError: a line is none.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(body.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(msgspec.json.decode(line, type=dict[str, Any]))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{path}, line {number}", f"is not a JSON object ({error})", "mend the line") from error
    return rows


def given(path: Path, what: str) -> bytes:
    """Return what a file that has to be there holds.

    Raises:
        DataError: it is not there, or empty.
    """
    body = read_file(path)
    if body is None or not body.strip():
        raise DataError(str(path), "is not there" if body is None else "is empty", f"give {what}")
    return body


async def answer_all(
    contender: Contender,
    settings: JudgedSettings,
    request: EvalRequest,
    say: Say,
    questions: Sequence[Q],
    ask: Callable[[Q, Answer], Awaitable[None]],
) -> None:
    """Have one model answer questions, several at a time."""
    assert contender.prepared is not None
    server = msgspec.structs.replace(settings.server, url=contender.target, model=request.model)
    at_once = server.concurrency
    if contender.prepared.settings is not None:
        at_once = contender.prepared.settings.max_running
    progress = Progress("questions answered", len(questions), say)
    async with answering(contender.prepared, server, say) as answer:

        async def one(question: Q) -> None:
            await ask(question, answer)
            progress.step()

        await for_each(questions, one, at_once=at_once)


class Bench:
    """A judge, asked within its limits, and what can be said of its verdicts."""

    def __init__(self, chat: Chat, total: int, say: Say) -> None:
        self.counts: Counter[str] = Counter()  # questions by what became of them
        self._chat = chat
        self._progress = Progress("questions judged", total, say)

    async def ask(self, messages: Messages, **asked: Any) -> Spoken | None:
        """Return what the judge says; nothing where it fails, which is counted as a refusal is.

        Raises:
            Unreachable: the judge is away.
            RewardError: it failed at each of the first questions.
        """
        try:
            said = await self._chat.say(messages, **asked)
        except Unreachable:
            raise
        except RewardError:
            self.counts["failed"] += 1
            if self.counts["failed"] >= FIRST and not self.counts["answered"]:
                raise
            return None
        self._progress.step()
        self.counts["answered"] += 1
        self.counts["refused"] += said.is_refusal
        return said

    def cost(self) -> str:
        """Return how much was judged now, and what it cost."""
        return f"{number_of(self.counts['answered'], 'question')} judged now, {self._chat.said()}"


@asynccontextmanager
async def judging(settings: JudgedSettings, total: int, say: Say) -> AsyncIterator[Bench]:
    """Yield the judge over kept connections; what ends it is said with what to do."""
    try:
        async with chatting(settings.judge, "judge", now=time.monotonic) as chat:
            yield Bench(chat, total, say)
    except (RewardError, LastingError) as error:
        raise ConfigError(error.where, error.what, f"{error.remedy}; {KEPT}") from error


def order_note(first_wins: Sequence[float]) -> str:
    """Return how often the answer that is shown first wins, of verdicts for one of two; "" where there are none."""
    if not first_wins:
        return ""
    low, high = wilson(round(sum(first_wins)), len(first_wins))
    share = sum(first_wins) / len(first_wins)
    leans = "; the judge leans to a place" if not low <= 0.5 <= high else ""
    return f"the answer shown first wins {share:.0%} of {len(first_wins)} decided [{low:.0%}, {high:.0%}]{leans}"


def length_note(longer: Sequence[float], won: Sequence[float]) -> str:
    """Return how far verdicts go with length; "" where neither varies."""
    correlation = correlated(longer, won)
    if correlation is None:
        return ""
    leans = "; the judge may be paid in words" if correlation > LEANS and len(won) >= FEW else ""
    return f"verdict and length correlate {correlation:+.2f} over {number_of(len(won), 'answer')}{leans}"
