"""What people are asked about a run's answers, and what they said: two files in the run's directory.

`questions.jsonl` is written by whoever asks (the humans stage), `judgments.jsonl` by the page that people sit at
(`flowrl feedback`). They share nothing else, so either may be killed, restarted or run on another machine that sees the
directory.

Invariants:
- a judgment is on the disk before `JudgmentFile.add` returns;
- a line that a kill cut short was never acknowledged and counts for nothing;
- the same judgment sent again is one judgment, and of a rater's several on one question the last one counts.

A question's id is made of what is asked, so that a group that is issued again after a crash finds what was said about
it.

Tests: tests/unit/data/test_judgments.py
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from flowrl.errors import ConfigError, DataError
from flowrl.telemetry.files import UNREADABLE, sync, write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

QUESTIONS, JUDGMENTS = "questions.jsonl", "judgments.jsonl"
PRIVATE = 0o600
MOST_CHARS = 100_000  # of an edited answer
Way = Literal["pairs", "ratings"]
Verdict = Literal["left", "right", "tie", "bad", "rated", "skip", "undone"]
SAYS = ("left", "right", "tie", "bad", "rated")  # verdicts that say something about the answers
WORTH = {"left": (1.0, 0.0), "right": (0.0, 1.0), "tie": (0.5, 0.5), "bad": (0.0, 0.0)}  # of both answers
Ended = Literal["judged", "unjudged", "flagged"]


class Question(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answers of one group that somebody is to judge, in the order in which they are shown."""

    id: str
    group: int
    way: Way
    prompt: Any  # as the data have it: a text, or messages
    answers: list[str]
    places: list[int]  # of the answers among the group's samples
    version: int  # oldest policy version that sampled them
    time_s: float = 0.0


class Closed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A question that training waits for no more."""

    id: str
    how: Ended
    time_s: float = 0.0


class Judgment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one rater said about one question."""

    key: str  # made by the page: the same judgment sent twice has the same
    question: str
    rater: str
    verdict: Verdict
    ratings: list[int] = []  # rated: 1 to 5, one for each answer
    edits: dict[int, str] = {}  # answer -> what it should have been
    flag: str = ""  # what is wrong with the question as such; it is then not learned
    took_s: float = 0.0
    time_s: float = 0.0  # when it was written

    def fault(self, question: Question) -> str:
        """Return why this cannot be said about a question; "" where it can."""
        count = len(question.answers)
        if not self.key or len(self.key) > 64 or not self.rater.strip() or len(self.rater) > 64:
            return "key and rater are texts of 1 to 64 characters"
        if self.verdict == "rated" and (len(self.ratings) != count or any(not 1 <= each <= 5 for each in self.ratings)):
            return f"{self.ratings} are not {count} ratings from 1 to 5"
        if self.verdict in (WORTH if question.way == "ratings" else ["rated"]):
            return f"{self.verdict} is no answer to a question that asks for {question.way}"
        if self.verdict != "rated" and self.ratings:
            return f"{self.verdict} comes with ratings"
        if any(not 0 <= place < count or len(text) > MOST_CHARS for place, text in self.edits.items()):
            return f"edits are of answers 0 to {count - 1}, of at most {MOST_CHARS} characters"
        return "" if len(self.flag) <= 1000 else "a flag has at most 1000 characters"

    def worth(self) -> tuple[float, ...] | None:
        """Return what each answer is worth by it; None where it does not say."""
        if self.verdict == "rated":
            return tuple(map(float, self.ratings))
        return WORTH.get(self.verdict)


def ask(group: int, prompt: Any, answers: Sequence[str], *, way: Way, version: int, places: Sequence[int]) -> Question:
    """Return the question about a group's answers, in an order that follows from them, so that no side is the better.

    Of a pair the first two answers that differ are shown, `places` saying which samples all of them are.
    """
    shown = [*range(len(answers))]
    if way == "pairs":
        shown = next(([a, b] for a, b in combinations(shown, 2) if answers[a] != answers[b]), shown[:2])
    body = msgspec.json.encode([group, way, prompt, [answers[place] for place in shown]])
    digest = hashlib.blake2b(body, digest_size=12).hexdigest()
    if int(digest[-1], 16) % 2:
        shown.reverse()
    texts, of = [answers[place] for place in shown], [places[place] for place in shown]
    return Question(id=digest, group=group, way=way, prompt=prompt, answers=texts, places=of, version=version)


class JudgmentFile:
    """The judgments of one run, as the one process that writes them holds the file."""

    def __init__(self, path: Path, *, now: Callable[[], float]) -> None:
        """Open the file, take back a line that a kill cut short, and read what is there.

        Raises:
            ConfigError: another process writes it.
            DataError: a line is damaged.
        """
        self._now = now
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, PRIVATE)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise ConfigError(str(path), "another `flowrl feedback` writes it", "open its page, or stop it") from error
        sync(path.parent)
        tail = Tail(path, Judgment)
        self.said = Said(tail.read())
        self._end = tail.offset
        os.ftruncate(self._file, self._end)

    def add(self, judgment: Judgment) -> bool:
        """Bring a judgment to the disk; returns whether it is new. What was sent before is not written again.

        Raises:
            OSError: it could not be written; the file is as it was.
        """
        if judgment.key in self.said.keys:
            return False
        judgment = msgspec.structs.replace(judgment, time_s=self._now())
        line = msgspec.json.encode(judgment) + b"\n"
        try:
            write_all(self._file, line)
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)
        self.said.add(judgment)
        return True

    def close(self) -> None:
        """Let the file go."""
        os.close(self._file)


class Tail:
    """Reads the whole lines that a growing file has got since the last look."""

    def __init__(self, path: Path, kind: Any) -> None:
        self.path = path
        self.offset = 0
        self._num_lines = 0
        self._decoder = msgspec.json.Decoder(kind)

    def read(self) -> list[Any]:
        """Return what the new lines hold; nothing where there is no file.

        Raises:
            DataError: a line is damaged.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                body = file.read()
        except FileNotFoundError:
            return []
        whole = body[: body.rfind(b"\n") + 1]
        self.offset += len(whole)
        found: list[Any] = []
        for line in whole.splitlines():
            self._num_lines += 1
            try:
                if line:  # a line that was cut short is followed by an empty one
                    found.append(self._decoder.decode(line))
            except UNREADABLE as error:
                raise DataError(f"{self.path}:{self._num_lines}", f"is damaged ({error})", "mend the line") from error
        return found


class Said:
    """What raters said: of each on each question the last."""

    def __init__(self, judgments: Iterable[Judgment] = ()) -> None:
        self.keys: set[str] = set()
        self.by_question: dict[str, dict[str, Judgment]] = {}
        for judgment in judgments:
            self.add(judgment)

    def add(self, judgment: Judgment) -> None:
        """Take note of a judgment."""
        if judgment.key not in self.keys:
            self.keys.add(judgment.key)
            self.by_question.setdefault(judgment.question, {})[judgment.rater] = judgment

    def of(self, question: str) -> list[Judgment]:
        """Return the judgments that say something about a question's answers, or flag it, by the rater's name."""
        found = self.by_question.get(question, {})
        return [found[rater] for rater in sorted(found) if found[rater].verdict in SAYS or _is_flag(found[rater])]

    def agreement(self) -> float | None:
        """Return Krippendorff's alpha over questions that several judged; None where nothing can be said.

        Comparisons are nominal, ratings are intervals; of the two the ones there are more of.
        """
        compared: list[list[Any]] = []
        rated: list[list[float]] = []
        for question in self.by_question:
            judgments = [each for each in self.of(question) if each.verdict in SAYS]
            compared.append([each.verdict for each in judgments if each.verdict != "rated"])
            rows = [each.ratings for each in judgments if each.verdict == "rated"]
            rated += [[float(each) for each in answer] for answer in zip(*rows, strict=True)]
        if sum(map(len, rated)) > sum(map(len, compared)):
            return alpha(rated, lambda one, other: (one - other) ** 2)
        return alpha(compared, lambda one, other: float(one != other))


def _is_flag(judgment: Judgment) -> bool:
    return bool(judgment.flag) and judgment.verdict != "undone"


def worths(judgments: Sequence[Judgment]) -> list[float]:
    """Return what each answer is worth by several judgments: their mean.

    left and tie give [0.75, 0.25].
    """
    rows = [row for each in judgments if (row := each.worth()) is not None]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def alpha(units: Iterable[Sequence[Any]], distance: Callable[[Any, Any], float]) -> float | None:
    """Return Krippendorff's alpha of units with any number of values each; None where no two could differ.

    1 - observed / expected disagreement (Krippendorff 2011, "Computing Krippendorff's alpha-reliability"). Units
    (a, a), (b, b), (a, b) give 1 - (1/3) / (3/5) = 0.444.
    """
    pairable = [unit for unit in units if len(unit) > 1]
    counts = Counter(value for unit in pairable for value in unit)
    total = sum(counts.values())
    within = sum(
        2 * sum(distance(one, other) for one, other in combinations(unit, 2)) / (len(unit) - 1) for unit in pairable
    )
    between = sum(2 * counts[one] * counts[other] * distance(one, other) for one, other in combinations(counts, 2))
    return 1.0 - (total - 1) * within / between if between else None
