"""What people said about a run, in the formats of other tools; flowrl reads each of them as training data.

    jsonl        one line a judgment, with everything that is known of it
    trl          TRL's preference format: prompt, chosen, rejected; an answer that somebody mended is chosen over itself
    labelstudio  Label Studio's tasks with annotations, of its template for human preferences (`pairwise`)
    argilla      Argilla's records, of its settings for ranking (instruction, response1, response2)

Both tools refuse people that they do not know: Label Studio takes a judgment as the importing user's, and the rater's
name stands beside it; Argilla knows users by UUIDs, which are made of the names.

Invariant: ties, skipped and flagged questions are in no preference, and how many of them is said.

Tests: tests/unit/runs/test_feedback.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args
from uuid import UUID, uuid5

import msgspec

from flowrl.data.judgments import worths
from flowrl.errors import ConfigError
from flowrl.runs.feedback.questions import Questions, read_said
from flowrl.telemetry.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flowrl.data.judgments import Judgment, Question, Way

Format = Literal["jsonl", "trl", "labelstudio", "argilla"]
RATERS = UUID("e2a3f6d0-5c1b-4c5e-9b60-6f0f3d3a7c11")  # the name space of raters' UUIDs
FORMATS: tuple[Format, ...] = get_args(Format)
Judged = list[tuple["Question", list["Judgment"]]]


def export(run_dir: Path, out: Path, format: Format, *, way: Way, say: Callable[[str], None]) -> None:
    """Write what was said about a run's questions into a file.

    Raises:
        ConfigError: there is no run, or nobody said anything about it.
    """
    asked, said = Questions(run_dir, way=way), read_said(run_dir)
    judged: Judged = [(each, found) for each in asked.questions.values() if (found := said.of(each.id))]
    if not judged:
        raise ConfigError(str(run_dir), "nobody has judged anything yet", f"open flowrl feedback {run_dir}")
    if format == "jsonl":
        rows = [*_lines(judged)]
    elif format == "trl":
        rows = [*_preferences(judged)]
    else:
        pairs = [(question, found) for question, found in judged if len(question.answers) == 2]
        rows = [_task(*each) if format == "labelstudio" else _record(*each) for each in pairs]
    if format in ("jsonl", "trl"):
        body = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    else:
        body = msgspec.json.format(msgspec.json.encode(rows))
    try:
        replace_file(out, body, mode=0o600)
    except OSError as error:
        raise ConfigError(str(out), f"cannot be written ({error.strerror})", "name another file") from error
    num_decided = len({row.get("question") for row in rows}) if format == "trl" else len(rows)
    undecided = f"; {len(judged) - num_decided} ties or flags are in none" if format == "trl" else ""
    say(f"written: {out} ({len(rows)} of {len(judged)} judged questions{undecided})")


def _lines(judged: Judged) -> Iterator[dict[str, Any]]:
    for question, judgments in judged:
        about = msgspec.to_builtins(question)
        for name in ("type", "time_s"):
            del about[name]
        for judgment in judgments:
            said = msgspec.to_builtins(judgment, str_keys=True)
            for name in ("key", "question"):
                del said[name]
            yield {**about, **said}


def _preferences(judged: Judged) -> Iterator[dict[str, Any]]:
    """Yield pairs: the best and the worst by what all said, and each mended answer over what it was."""
    for question, judgments in judged:
        if any(each.flag for each in judgments):
            continue
        shared = {"prompt": question.prompt, "question": question.id, "version": question.version}
        found = worths(judgments)
        best, worst = (pick(range(len(found)), key=found.__getitem__) for pick in (max, min))
        if found[best] > found[worst]:
            yield {**shared, **_pair(question, question.answers[best], question.answers[worst])}
        for judgment in judgments:
            for place, text in judgment.edits.items():
                if text.strip() and text != question.answers[place]:
                    yield {**shared, **_pair(question, text, question.answers[place]), "mended_by": judgment.rater}


def _pair(question: Question, chosen: str, rejected: str) -> dict[str, Any]:
    if isinstance(question.prompt, str):
        return {"chosen": chosen, "rejected": rejected}
    return {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))
    }


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(str(message.get("content") or "") for message in prompt)


def _task(question: Question, judgments: list[Judgment]) -> dict[str, Any]:
    """Return a task of Label Studio."""
    names = ["answer1", "answer2"]
    annotations: list[dict[str, Any]] = []
    for judgment in judgments:
        found, result = judgment.worth(), list[dict[str, Any]]()
        if found is not None and found[0] != found[1]:
            selected = "left" if found[0] > found[1] else "right"
            result = [{"id": judgment.key[:10], "from_name": "comparison", "to_name": ",".join(names),
                       "type": "pairwise", "value": {"selected": selected}}]  # fmt: skip
        rater = {"rater": judgment.rater, "lead_time": judgment.took_s}
        annotations.append({**rater, "was_cancelled": bool(judgment.flag), "ground_truth": False, "result": result})
    data = {
        "prompt": _text(question.prompt),
        **dict(zip(names, question.answers, strict=True)),
        "question": question.id,
    }
    return {"data": data, "annotations": annotations}


def _record(question: Question, judgments: list[Judgment]) -> dict[str, Any]:
    """Return a record of Argilla."""
    names = ["response1", "response2"]
    responses: list[dict[str, Any]] = []
    for judgment in judgments:
        found = judgment.worth()
        if found is None or judgment.flag:
            continue
        order = sorted(range(2), key=lambda place, found=found: -found[place])
        ranks = [1, 1 if found[0] == found[1] else 2]
        value = [{"value": names[place], "rank": rank} for place, rank in zip(order, ranks, strict=True)]
        responses.append({"user_id": str(uuid5(RATERS, judgment.rater)), "value": value, "status": "submitted"})
    fields = {"instruction": _text(question.prompt), **dict(zip(names, question.answers, strict=True))}
    return {"id": question.id, "fields": fields, "suggestions": {}, "responses": {"ranking": responses}}
