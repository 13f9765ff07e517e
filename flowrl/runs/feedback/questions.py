"""What people may be asked about a run: what its humans node asks, or the rollouts that it recorded.

Invariants:
- what training waits for comes first, the oldest first, so that the learner's window moves;
- while one rater has a question before him no other is given it;
- with nothing open, people are given what others have judged, from which their agreement is known, and what nobody
  judged in time.

Called by server.py and exports.py.

Tests: tests/unit/runs/test_feedback.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from flowrl.data.judgments import JUDGMENTS, QUESTIONS, SAYS, Closed, Judgment, Question, Said, Tail, ask
from flowrl.errors import ConfigError, number_of
from flowrl.runtime.rundir import existing_run, read_plan
from flowrl.telemetry.records import step_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flowrl.data.judgments import Way

HUMANS = "flowrl.stages.humans:Humans"
HELD_S = 120.0  # for which a question that somebody looks at is given to nobody else


class Offered(NamedTuple):
    """A question for one rater."""

    question: Question
    why: str  # "": training waits for it


class Questions:
    """The questions of a run and how far they are answered."""

    def __init__(self, run_dir: Path, *, way: Way = "pairs") -> None:
        """Read what there is.

        Raises:
            ConfigError: there is no run.
            DataError: a file of it is damaged.
        """
        self._run_dir = existing_run(run_dir)
        plan = read_plan(run_dir)
        self.node = next((name for name, node in plan.nodes.items() if node.stage == HUMANS), "")
        self._raters = plan.nodes[self.node].arguments["config"]["raters"] if self.node else 1
        self._way: Way = way
        self._tail = Tail(run_dir / QUESTIONS, Question | Closed)
        self._steps: set[str] = set()  # files of rollouts that were read
        self._held: dict[str, tuple[str, float]] = {}  # by whom and until when
        self.questions: dict[str, Question] = {}
        self.closed: dict[str, str] = {}
        self.look()

    def look(self) -> None:
        """Take in what was asked since the last look."""
        for line in self._tail.read() if self.node else []:
            if isinstance(line, Question):
                self.questions.setdefault(line.id, line)
                self.closed.pop(line.id, None)  # its group was issued again
            else:
                self.closed[line.id] = line.how
        for question in [] if self.node else self._recorded():
            self.questions.setdefault(question.id, question)

    def _recorded(self) -> Iterator[Question]:
        """Yield the questions that recorded rollouts give, of files not yet read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        paths = step_files(self._run_dir / "rollouts").values()
        names = ["group_id", "sample", "prompt", "response", "token_versions"]
        for path in [path for path in paths if path.name not in self._steps]:
            try:
                rows: list[dict[str, Any]] = pq.read_table(path, columns=names).to_pylist()
            except (OSError, pa.ArrowInvalid):
                continue  # it is not whole yet
            self._steps.add(path.name)
            groups: dict[int, list[dict[str, Any]]] = {}
            for row in rows:
                groups.setdefault(row["group_id"], []).append(row)
            for group, samples in groups.items():
                answers, places = [each["response"] for each in samples], [each["sample"] for each in samples]
                version = min((v for each in samples for v in each["token_versions"] if v >= 0), default=0)
                prompt = _prompt_of(samples[0]["prompt"] or "")
                question = ask(group, prompt, answers, way=self._way, version=version, places=places)
                if self._way == "ratings" or len(set(question.answers)) > 1:
                    yield question

    def check(self) -> str:
        """Insist that there is something to judge; returns what is to be said about it.

        Raises:
            ConfigError: there is nothing, and nothing will come.
        """
        if self.node:
            return ""
        if not self.questions:
            what = "has no humans node and no recorded rollouts with answers that differ: there is nothing to judge"
            remedy = "run graphs/humans_dpo.py, or a graph with learner.save_rollouts=true"
            raise ConfigError(str(self._run_dir), what, remedy)
        what = "the run has no humans node: what was recorded is shown, and training learns nothing of what is said"
        return f"{what} ({number_of(len(self.questions), 'question')})"

    def next(self, rater: str, said: Said, now_s: float) -> Offered | None:
        """Return what a rater is asked next, and hold it for him; None where there is nothing."""
        self._held = {each: (by, until) for each, (by, until) in self._held.items() if by != rater and until > now_s}
        mine = {each: judgments.get(rater) for each, judgments in said.by_question.items()}
        free = [each for each in self.questions.values() if each.id not in self._held]
        new = [each for each in free if _is_new(mine.get(each.id))]
        kinds: list[tuple[str, Callable[[Question], bool]]] = [
            ("", lambda each: self._is_wanted(each.id, said)),
            ("judged by others too: for agreement", lambda each: bool(said.of(each.id))),
            ("training waits for it no more", lambda each: True),
        ]
        for why, fits in kinds:
            if found := next((each for each in new if fits(each)), None):
                self._held[found.id] = (rater, now_s + HELD_S)
                return Offered(found, why)
        return next((Offered(each, "skipped before") for each in free if _is_skipped(mine.get(each.id))), None)

    def _is_wanted(self, question: str, said: Said) -> bool:
        """Return whether training waits for somebody to judge a question."""
        return question not in self.closed and len(said.of(question)) < self._raters

    def progress(self, rater: str, said: Said) -> dict[str, Any]:
        """Return how far it is."""
        judged = [each for each in self.questions if said.of(each)]
        raters = {found.rater for each in judged for found in said.of(each)}
        several = sum(len([each for each in said.of(name) if each.verdict in SAYS]) > 1 for name in judged)
        agreement = said.agreement()
        return {
            "mine": sum(1 for each in judged if any(found.rater == rater for found in said.of(each))),
            "judged": len(judged),
            "asked": len(self.questions),
            "waiting": sum(1 for each in self.questions if self._is_wanted(each, said)),
            "raters": len(raters),
            "several": several,
            "agreement": None if agreement is None else round(agreement, 3),
        }


def read_said(run_dir: Path) -> Said:
    """Return what was said about a run.

    Raises:
        DataError: a line is damaged.
    """
    return Said(Tail(run_dir / JUDGMENTS, Judgment).read())


def _is_new(judgment: Judgment | None) -> bool:
    return judgment is None or judgment.verdict == "undone"


def _is_skipped(judgment: Judgment | None) -> bool:
    return judgment is not None and judgment.verdict == "skip" and not judgment.flag


def _prompt_of(text: str) -> Any:
    """Return a recorded prompt: messages where it was written as such."""
    if text.startswith("[{"):
        try:
            return msgspec.json.decode(text, type=list[dict[str, Any]])
        except (ValueError, RecursionError):
            return text
    return text
