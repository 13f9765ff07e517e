"""What raters are asked, in which order, and what becomes of it in other tools' formats, which flowrl reads again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
import pytest

from flowrl.cli import main
from flowrl.data.examples import ExampleData
from flowrl.data.formats import detect, normalise
from flowrl.data.judgments import JUDGMENTS, Closed, Judgment, JudgmentFile, Said, ask
from flowrl.data.naming import with_names
from flowrl.data.sources import read_rows
from flowrl.errors import DataError
from flowrl.runs.feedback.questions import Questions
from flowrl.runs.feedback.server import Names, token_of
from flowrl.telemetry.records import step_path, write_rollouts
from tests.support.feedback import asking_run, tell
from tests.support.past_run import past_run, sampled

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.data.judgments import Question

PAIRS = [(f"first {k}", f"second {k}") for k in range(4)]


def said_of(question: Question, verdict: str, rater: str = "ann", **fields: Any) -> Judgment:
    made = {"key": f"{question.id} {rater} {verdict}", "question": question.id, "rater": rater, "verdict": verdict}
    return msgspec.convert({**made, **fields}, Judgment)


def write(run_dir: Path, judgments: Sequence[Judgment]) -> None:
    file = JudgmentFile(run_dir / JUDGMENTS, now=lambda: 0.0)
    for each in judgments:
        file.add(each)
    file.close()


def test_what_training_waits_for_is_asked_first_and_of_one_rater_at_a_time(tmp_path: Path) -> None:
    questions = asking_run(tmp_path / "run", PAIRS)
    asked, said = Questions(tmp_path / "run"), Said()
    tell(tmp_path / "run", Closed(id=questions[0].id, how="unjudged"))
    asked.look()

    def given(rater: str, now_s: float = 0.0) -> tuple[int, str] | None:
        found = asked.next(rater, said, now_s)
        return found and (questions.index(found.question), found.why)

    assert [given("ann"), given("bob"), given("ann")] == [(1, ""), (2, ""), (1, "")]
    said.add(said_of(questions[1], "left"))
    assert given("ann") == (3, "")
    assert given("cal") == (1, "judged by others too: for agreement")
    assert given("dan") == (0, "training waits for it no more")
    said.add(said_of(questions[3], "skip"))
    assert given("eve", now_s=1000.0) == (2, ""), "bob has left"
    assert given("ann", now_s=1000.0) == (0, "training waits for it no more")
    said.add(said_of(questions[0], "tie"))
    assert given("ann", now_s=1000.0) == (3, "skipped before")
    progress = asked.progress("ann", said)
    assert (progress["mine"], progress["judged"], progress["waiting"], progress["raters"]) == (2, 2, 2, 1)


def test_recorded_rollouts_are_asked_about_where_there_is_no_humans_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = past_run(tmp_path / "run", num_steps=2, num_recorded=0)
    assert main(["feedback", str(run_dir)]) == 2
    assert "no humans node and no recorded rollouts with answers that differ" in capsys.readouterr().err
    group = sampled(1, 0, rewards=(0.0, 1.0))
    samples = [msgspec.structs.replace(each, text=f"answer {k}") for k, each in enumerate(group.samples)]
    messages = [{"role": "user", "content": "why?"}]
    group = msgspec.structs.replace(group, samples=samples, columns={"prompt": messages})
    write_rollouts(step_path(run_dir / "rollouts", 0), [group, sampled(2, 0, rewards=(0.0, 1.0))], 0)
    asked = Questions(run_dir)
    (question,) = asked.questions.values()
    assert (question.group, question.prompt, sorted(question.answers)) == (1, messages, ["answer 0", "answer 1"])
    assert "training learns nothing of what is said" in asked.check()
    assert len(Questions(run_dir, way="ratings").questions) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "holds no run"),
        (["run", "--export", "trl"], "--export and --out go together"),
        (["run", "--export", "trl", "--out", "f.jsonl"], "nobody has judged anything yet"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asking_run(tmp_path / "run", PAIRS)
    monkeypatch.chdir(tmp_path)
    assert main(["feedback", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_second_rater_that_training_waits_for_is_given_the_oldest_question_first(tmp_path: Path) -> None:
    first, second, *_ = asking_run(tmp_path / "run", PAIRS, overrides=["humans.raters=2"])
    asked, said = Questions(tmp_path / "run"), Said([])
    said.add(said_of(first, "left"))
    assert asked.progress("ann", said)["waiting"] == len(PAIRS), "one of two has judged it"
    assert asked.next("bob", said, 0.0) == (first, "")
    said.add(said_of(first, "left", "bob"))
    assert asked.next("bob", said, 0.0) == (second, "")
    assert asked.progress("bob", said)["waiting"] == len(PAIRS) - 1


@pytest.mark.parametrize("format", ["jsonl", "trl", "labelstudio", "argilla"])
def test_what_people_prefer_is_written_as_other_tools_have_it_and_read_again(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    questions = asking_run(run_dir, PAIRS)
    left, tied, mended, flagged = questions
    write(run_dir, [
        said_of(left, "left"), said_of(left, "left", "bob"), said_of(tied, "tie"),
        said_of(mended, "right", edits={1: "third"}), said_of(flagged, "skip", flag="no question"),
    ])  # fmt: skip
    out = tmp_path / ("f.json" if format in ("labelstudio", "argilla") else "f.jsonl")
    assert main(["feedback", str(run_dir), "--export", format, "--out", str(out)]) == 0
    assert out.stat().st_mode & 0o777 == 0o600
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.suffix == ".jsonl" else []
    if format == "jsonl":
        assert [(row["verdict"], row["rater"], row["flag"]) for row in rows][:2] == [
            ("left", "ann", ""), ("left", "bob", ""),
        ]  # fmt: skip
        assert len(rows) == 5
        return
    if format == "labelstudio":
        said = [each for task in json.loads(out.read_text()) for each in task["annotations"]]
        assert [each["rater"] for each in said] == ["ann", "bob", "ann", "ann", "ann"]
        assert all("completed_by" not in each for each in said), "an unknown annotator ends the whole import"
        assert [len(each["result"]) for each in said] == [1, 1, 0, 1, 0]
    if format == "argilla":
        ids = [{UUID(each["user_id"]) for each in row["responses"]["ranking"]} for row in json.loads(out.read_text())]
        assert [len(each) for each in ids] == [2, 1, 1, 0], "a name is one user"
        assert ids[0] > ids[1] == ids[2]
    bad: list[Exception] = []
    found = []
    for row in read_rows(str(out), split="train", subset="", bad=bad.append):
        try:
            named = with_names(row, {})
            found.append(normalise(named, detect(named)))
        except Exception as error:
            bad.append(error)
    wanted = [("question 0", left.answers), ("question 2", mended.answers[::-1])]
    if format == "trl":
        wanted.append(("question 2", ["third", mended.answers[1]]))
        assert "2 ties or flags are in none" in capsys.readouterr().out
    assert [(row.prompt, row.responses) for row in found] == wanted
    assert len(bad) == (0 if format == "trl" else 2), "the tie and the flag prefer nothing"
    assert all("prefers none" in str(error) for error in bad)
    assert ExampleData(source=str(out)).source


def test_label_studio_and_argilla_are_read_whatever_their_fields_are_called() -> None:
    from flowrl.data.sources import RawRow

    result = [{"type": "pairwise", "value": {"selected": "right"}, "to_name": "one,two"}]
    task = {"data": {"question": "q", "one": "x", "two": "y"}, "annotations": [{"result": result}], "id": 4}
    of_tags = {**task, "annotations": [{"result": [{**result[0], "to_name": "txt-1,txt-2"}]}]}
    record = {
        "fields": {"prompt": "q", "response-1": "x", "response-2": "y"},
        "responses": {"preference": [
            {"value": "response-2", "user_id": "u"},
            *({"value": "response-1", "user_id": status, "status": status} for status in ("draft", "discarded")),
        ]},
    }  # fmt: skip
    for columns in (task, of_tags, record):
        row = with_names(RawRow("a:1", columns), {})
        assert {name: row.columns[name] for name in ("prompt", "chosen", "rejected")} == {
            "prompt": "q", "chosen": "y", "rejected": "x",
        }  # fmt: skip


@pytest.mark.parametrize("wrong", [None, 7, "x", True, [], {}, [7], [[]], [{"value": []}], {"selected": ["left"]}])
def test_an_export_in_another_shape_prefers_nothing(wrong: Any) -> None:
    from flowrl.data.sources import RawRow

    data, fields = {"prompt": "q", "one": "x", "two": "y"}, {"prompt": "q", "response-1": "x", "response-2": "y"}
    for columns in (
        {"data": data, "annotations": [wrong]},
        {"data": data, "annotations": [{"result": wrong}]},
        {"data": data, "annotations": [{"result": [{"type": "pairwise", "value": wrong}]}]},
        {"fields": fields, "responses": {"ranking": wrong}},
        {"fields": fields, "responses": {"ranking": [{"value": wrong}]}},
        {"fields": fields, "responses": {"ranking": [{"value": [{"value": wrong, "rank": 1}]}]}},
    ):
        with pytest.raises(DataError, match="a:1: prefers none of"):
            with_names(RawRow("a:1", columns), {})


@pytest.mark.parametrize(
    ("opened", "header", "holds"),
    [
        ("127.0.0.1", "127.0.0.1:8791", True), ("127.0.0.1", "localhost:9", True), ("127.0.0.1", "[::1]:8791", True),
        ("127.0.0.1", "LOCALHOST.:8791", True), ("127.0.0.1", "site.example:8791", False), ("127.0.0.1", "", False),
        ("127.0.0.1", "localhost.site.example", False), ("127.0.0.1", "127.0.0.1.site.example", False),
        ("127.0.0.1", "10.0.0.7:8791", False), ("127.0.0.1", "a@localhost", True), ("127.0.0.1", "[::1", False),
        ("0.0.0.0", "10.0.0.7:8791", True), ("0.0.0.0", "site.example", False), ("0.0.0.0", "box:8791", True),
        ("127.0.0.1", "judge.example.org", True),
    ],
)  # fmt: skip
def test_a_page_answers_to_the_names_that_it_was_opened_for_alone(
    opened: str, header: str, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    assert Names(opened, ["judge.example.org"]).hold(header) == holds


def test_a_token_outlives_its_server_and_is_for_its_owner(tmp_path: Path) -> None:
    token = token_of(tmp_path)
    assert token_of(tmp_path) == token
    assert len(token) >= 32
    assert (tmp_path / "feedback.token").stat().st_mode & 0o777 == 0o600


def test_a_question_is_known_again_by_what_is_asked() -> None:
    one, same, other = (ask(1, "p", [a, "b"], way="pairs", version=v, places=[0, 1]) for a, v in
                        (("a", 0), ("a", 3), ("c", 0)))  # fmt: skip
    assert one.id == same.id != other.id
