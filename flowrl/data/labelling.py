"""Preferences as labelling tools export them, made into TRL's columns: Label Studio's tasks and Argilla's records.

Label Studio: `data` with what is asked and the two answers; `annotations` of type `pairwise`, whose `to_name` names the
two in their order, or the tags that show them, in the data's order. Argilla: `fields` with the same, submitted
`responses` to a ranking or to a question whose values are the fields' names. Several annotators vote.

Invariant: a row that prefers neither raises, which `data.on_bad` may skip.

Called by naming.py.

Tests: tests/unit/runs/test_feedback.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from flowrl.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Columns = dict[str, Any]
SIDES = ["left", "right"]
ASKED = ("prompt", "instruction", "question", "input", "text")


def preference_of(columns: Mapping[str, Any], place: str) -> Columns:
    """Return the columns that a labelling tool's row adds: prompt, chosen and rejected; none of another's row.

    Raises:
        DataError: nobody prefers either answer.
    """
    if isinstance(columns.get("data"), dict) and isinstance(columns.get("annotations"), list):
        return _preferred(columns["data"], _picked(columns["data"], columns["annotations"]), place)
    if isinstance(columns.get("fields"), dict) and isinstance(columns.get("responses"), dict):
        return _preferred(columns["fields"], _ranked(columns["responses"]), place)
    return {}


def _preferred(fields: Columns, votes: Iterator[str | int], place: str) -> Columns:
    asked = next((name for name in ASKED if isinstance(fields.get(name), str)), "")
    answers = [name for name, text in fields.items() if name != asked and isinstance(text, str)]
    counts = {name: 0 for name in answers}
    for vote in votes:
        name = vote if isinstance(vote, str) else answers[vote] if len(answers) == 2 else ""
        if name in counts:
            counts[name] += 1
    ranked = sorted(counts, key=lambda name: -counts[name])
    if not asked or len(ranked) < 2 or counts[ranked[0]] == counts[ranked[1]]:
        what = f"prefers none of {', '.join(answers) or 'no answers'}" if asked else "does not say what was asked"
        raise DataError(place, what, "drop the row, or set data.on_bad=skip")
    return {"prompt": fields[asked], "chosen": fields[ranked[0]], "rejected": fields[ranked[1]]}


def _picked(data: Columns, annotations: list[Any]) -> Iterator[str | int]:
    """Yield what each annotation of Label Studio prefers: an answer's name, or which of the two it is."""
    for annotation in annotations:
        if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
            continue
        results = annotation.get("result")
        for result in cast("list[Any]", results) if isinstance(results, list) else []:
            if isinstance(result, dict) and result.get("type") == "pairwise":
                names = str(result.get("to_name", "")).split(",")
                are_data = len(names) == 2 and all(name in data for name in names)
                value = result.get("value")
                selected = cast("Columns", value).get("selected") if isinstance(value, dict) else None
                if selected in SIDES:
                    yield names[SIDES.index(selected)] if are_data else SIDES.index(selected)


def _ranked(responses: Columns) -> Iterator[str]:
    """Yield what each response of Argilla prefers: a field's name, or the first of a ranking without a tie."""
    for answers in responses.values():
        for answer in answers if isinstance(answers, list) else []:
            is_given = isinstance(answer, dict) and answer.get("status", "submitted") in ("submitted", None)
            value = answer.get("value") if is_given else None
            if isinstance(value, str):
                yield value
            elif isinstance(value, list) and value and all(isinstance(each, str) for each in cast("list[Any]", value)):
                yield value[0]
            elif isinstance(value, list):
                ranked = [each for each in value if isinstance(each, dict) and isinstance(each.get("value"), str)]
                first = {each["value"] for each in ranked if each.get("rank") == 1}
                if len(first) == 1:
                    yield first.pop()
