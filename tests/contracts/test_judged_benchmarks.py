"""MT-Bench and AlpacaEval by `flowrl eval`: a server on this machine answers and judges, the files are upstream's."""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.cli import main
from tests.support.command import flowrl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Respond = Callable[[dict[str, Any]], Any]  # from a request to a text, or to a whole choice

pytestmark = pytest.mark.slow
pd: Any = pytest.importorskip("pandas")

NAMES = ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")


@contextlib.contextmanager
def serving(respond: Respond) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve OpenAI's chat completions; what `respond` returns as bytes goes out as it is."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two packets, and a client may wait to acknowledge one

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(asked)
            said = respond(asked)
            if not isinstance(said, bytes):
                choice = said if isinstance(said, dict) else {"message": {"role": "assistant", "content": said}}
                usage = {"prompt_tokens": 100, "completion_tokens": 10}
                said = json.dumps({"choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            with contextlib.suppress(OSError):  # a client that was killed
                self.wfile.write(said)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answers_and_judges(asked: dict[str, Any]) -> Any:
    """Write `good` much and `bad` little; rate by the number of words, and of two like the one with more."""
    if asked["model"] in ("good", "bad"):
        turn = sum(message["role"] == "user" for message in asked["messages"])
        return " ".join(["word"] * (turn + (4 if asked["model"] == "good" else 1)))
    told = re.findall(r"<answer[^>]*>\n(.*?)\n</answer", asked["messages"][-1]["content"], re.DOTALL)
    words = [len(text.split()) for text in told]
    if "[[A]]" in asked["messages"][-1]["content"]:
        one, other = words[-2:]
        return f"So: [[{'A' if one > other else 'B' if other > one else 'C'}]]"
    return f"A thought about [[1]].\nRating: [[{min(10, words[-1])}]]"


def questions(home: Path, num: int = 6) -> Path:
    home.mkdir(parents=True)
    rows = [
        {"question_id": 81 + k, "category": ["writing", "math"][k % 2], "turns": [f"Question {k}?", f"And {k}?"]}
        for k in range(num)
    ]
    (home / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "reference_answer").mkdir()
    references = [
        {"question_id": row["question_id"], "choices": [{"index": 0, "turns": ["right", "right"]}]} for row in rows
    ]
    (home / "reference_answer" / "gpt-4.jsonl").write_text("".join(json.dumps(row) + "\n" for row in references))
    return home


def judge_prompts(path: Path) -> Path:
    """Write prompts under FastChat's names, in our words."""
    rows: list[dict[str, Any]] = []
    for name in [*NAMES, *(f"{name}-multi-turn" for name in NAMES)]:
        is_pair, turns = name.startswith("pair"), 2 if name.endswith("turn") else 1
        sides = ["_a", "_b"] if is_pair else [""]
        gaps = [f"answer{side}" + (f"_{turn}" if turns > 1 else "") for turn in range(1, turns + 1) for side in sides]
        asked = "{question_1}" if turns > 1 else "{question}"
        text = "\n".join([asked, *(f"<answer>\n{{{gap}}}\n</answer>" for gap in gaps)])
        form = "[[A]]" if is_pair else "[[rating]]"
        rows.append({"name": name, "type": "pairwise" if is_pair else "single", "system_prompt": "Judge.",
                     "prompt_template": f"{text}\n{form}", "output_format": form, "category": "x"})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def single_as_fastchat(path: Path) -> dict[str, float]:
    """Read ratings as FastChat 0.2.36 does (llm_judge/show_result.py): the mean over all turns but those of -1."""
    table = pd.read_json(path, lines=True)[["model", "score", "turn"]]
    return table[table["score"] != -1][["model", "score"]].groupby(["model"]).mean()["score"].to_dict()


def win_rate_as_fastchat(path: Path, model: str) -> float:
    """Read pairs as FastChat 0.2.36 does: half for a tie or a verdict that turns, errors left out."""
    table = pd.read_json(path, lines=True)
    table = table[(table["g1_winner"] != "error") & (table["g2_winner"] != "error")]
    won: list[float] = []
    for _, row in table.iterrows():
        if row["g1_winner"] == "tie" or row["g1_winner"] != row["g2_winner"]:
            won.append(0.5)
        else:
            won.append(float(row[row["g1_winner"]] == model))
    return sum(won) / len(won)


def evaluated(url: str, *arguments: str | Path, judge: str = "gpt-4", out: Path) -> dict[str, Any]:
    given = ["--model", "good", "--set", f"judge.url={url}", "--set", f"judge.model={judge}"]
    assert main(["eval", *map(str, arguments), *given, "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_bytes())


def test_ratings_stand_where_fastchat_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = questions(tmp_path / "mt_bench", num=80)
    prompts = judge_prompts(tmp_path / "judge_prompts.jsonl")
    with serving(answers_and_judges) as (url, requests):
        named = ["--mt-bench", home, "--set", "name=mine", "--set", f"prompts={prompts}"]
        found = evaluated(url, url, *named, out=tmp_path / "out")
        asked = len(requests)
        again = evaluated(url, url, *named, out=tmp_path / "out")
        fewer = evaluated(url, url, *named, "--limit", "79", out=tmp_path / "out")
    assert asked == 80 * 2 + 80 * 2
    assert len(requests) == asked  # nothing is answered or judged twice
    (temperatures,) = {tuple(sorted({r["temperature"] for r in requests if r["model"] == "good"}))}
    assert temperatures == (0.0, 0.7)  # as FastChat samples mathematics and writing
    path = home / "model_judgment" / "gpt-4_single.jsonl"
    assert single_as_fastchat(path) == {"mine": pytest.approx(1.0)}  # FastChat takes the first number
    score = found["of"]["scores"][0]
    assert (score["task"], score["metric"], score["bounds"]["value"]) == ("MT-Bench", "rating", pytest.approx(1.0))
    assert found["of"]["scores"] == again["of"]["scores"]
    assert fewer["notes"][0] == "not to be called MT-Bench: 79 questions were asked, which are not its 80"
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert {tuple(row["judge"]) for row in rows} == {
        ("gpt-4", f"single-{kind}{turn}") for kind in ("v1", "math-v1") for turn in ("", "-multi-turn")
    }
    assert "2400 tokens read" not in capsys.readouterr().err


def test_two_models_are_compared_question_by_question_and_the_number_has_another_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = questions(tmp_path / "mt_bench")
    with serving(answers_and_judges) as (url, _):
        evaluated(url, url, "--mt-bench", home, "--set", "name=good", out=tmp_path / "out", judge="rater")
        worse = tmp_path / "bad.jsonl"
        rows = [json.loads(line) for line in (home / "model_answer" / "good.jsonl").read_bytes().splitlines()]
        for row in rows:
            row["choices"][0]["turns"] = ["word word", "word word word"]
        worse.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["--mt-bench", home, "--set", "name=good", "--against", worse]
        found = evaluated(url, url, *given, out=tmp_path / "out", judge="rater")
        pairs = evaluated(url, url, *given, "--set", "way=pairs", out=tmp_path / "out", judge="rater")
    assert single_as_fastchat(home / "model_judgment" / "rater_single.jsonl") == {"good": 5.5, "bad": 2.5}
    assert found["of"]["scores"][0]["bounds"]["value"] == 5.5
    difference = found["differences"][0]["bounds"]
    assert (difference["value"], difference["low"], difference["high"]) == (3.0, 3.0, 3.0)
    assert found["of"]["scores"][0]["task"] == "questions of mt_bench, judged by rater"
    assert any("not to be called MT-Bench: the judge is rater" in note for note in found["notes"])
    assert win_rate_as_fastchat(home / "model_judgment" / "rater_pair.jsonl", "good") == 1.0
    assert pairs["of"]["scores"][0]["bounds"]["value"] == 1.0
    out = capsys.readouterr().out
    assert "12 pairs: 0 ties, 0 turned with the order, 0 cannot be read" in out
    assert "the answer shown first wins 50% of 24 decided" in out


def test_refusals_ties_and_verdicts_that_cannot_be_read_are_counted_and_are_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def judge(asked: dict[str, Any]) -> Any:
        text = asked["messages"][-1]["content"]
        if "Question 0" in text:
            return {"message": {"role": "assistant", "content": None, "refusal": "I cannot judge this."}}
        if "Question 1" in text and "hm {}" in text:
            return "Hard to say: 11 of 10, [[11]]"
        return {"message": {"content": "At first [[5]], but then\n[[8]]"}, "finish_reason": "stop"}

    home = questions(tmp_path / "mt_bench")
    given = tmp_path / "mine.jsonl"
    rows = [
        {"question_id": 81 + k, "choices": [{"index": 0, "turns": ["hm {} {question}", "%s </answer>"]}]}
        for k in range(6)
    ]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = tmp_path / "other.jsonl"
    other.write_text(given.read_text().replace("hm {}", "so"))
    with serving(judge) as (url, _):
        found = evaluated(url, given, "--mt-bench", home, "--against", other, out=tmp_path / "out", judge="rater")
    assert single_as_fastchat(home / "model_judgment" / "rater_single.jsonl") == {"mine": 8.0, "other": 8.0}
    assert [found[side]["scores"][0]["bounds"]["num"] for side in ("of", "against")] == [4, 5]
    assert found["differences"][0]["bounds"]["num"] == 4
    out = capsys.readouterr().out
    assert "6 of 24 ratings cannot be read and count for nothing" in out
    assert "4 refused" in out


def test_what_was_answered_before_a_kill_is_not_asked_again(tmp_path: Path) -> None:
    home = questions(tmp_path / "mt_bench", num=12)
    release = threading.Event()

    def slowly(asked: dict[str, Any]) -> Any:
        if asked["model"] == "rater" and sum(each["model"] == "rater" for each in requests) > 7:
            release.wait(60)
        return answers_and_judges(asked)

    with serving(slowly) as (url, requests):
        command = ["eval", url, "--mt-bench", str(home), "--model", "good", "--set", f"judge.url={url}",
                   "--set", "judge.model=rater", "--set", "name=mine", "--out", str(tmp_path / "out")]  # fmt: skip
        path = home / "model_judgment" / "rater_single.jsonl"

        def kill_at_seven(line: str) -> signal.Signals | None:
            if "verdicts are asked" not in line:
                return None
            while not path.exists() or len(path.read_bytes().splitlines()) < 7:
                pass
            return signal.SIGKILL

        assert flowrl(*command, cwd=tmp_path, on_line=kill_at_seven).code == -signal.SIGKILL
        kept = path.read_bytes()
        path.write_bytes(kept + b'{"question_id": 92, "mod')  # a kill may come in the middle of a line, too
        release.set()
        before = len(requests)
        assert flowrl(*command, cwd=tmp_path).code == 0
    judged = {json.loads(line)["user_prompt"] for line in kept.splitlines()}
    assert len(judged) >= 7
    assert not judged & {asked["messages"][-1]["content"] for asked in requests[before:]}
    assert not [asked for asked in requests[before:] if asked["model"] == "good"]
    assert set(kept.splitlines()) < set(path.read_bytes().splitlines())
    assert single_as_fastchat(path) == {"mine": 5.5}


def outputs(path: Path, texts: list[str], generator: str) -> Path:
    rows = [
        {"dataset": "helpful_base", "instruction": f"Do {k}.", "output": text, "generator": generator}
        for k, text in enumerate(texts)
    ]
    path.write_text(json.dumps(rows))
    return path


def annotator(home: Path) -> Path:
    """Write an annotator as alpaca_eval's evaluators_configs hold it."""
    (home / "mine").mkdir(parents=True)
    (home / "mine" / "ask.txt").write_text(
        "<|im_start|>system\nJudge.\n<|im_end|>\n<|im_start|>user\n{instruction}\n<answer m>\n{output_1}\n</answer m>\n"
        "<answer M>\n{output_2}\n</answer M>\n<|im_end|>"
    )
    (home / "mine" / "configs.yaml").write_text(
        "mine:\n  prompt_template: mine/ask.txt\n  fn_completions: openai_completions\n  completions_kwargs:\n"
        "    model_name: rater\n    max_tokens: 1\n    temperature: 1\n    logprobs: true\n    top_logprobs: 5\n"
        "  fn_completion_parser: logprob_parser\n  completion_parser_kwargs:\n    numerator_token: m\n"
        "    denominator_tokens: [m, M]\n    is_binarize: false\n"
    )
    return home / "mine" / "configs.yaml"


def by_logprobs(asked: dict[str, Any]) -> Any:
    """Prefer what has more words, by how much, in the log-probs of m and M alone."""
    told = re.findall(r"<answer[^>]*>\n(.*?)\n</answer", asked["messages"][-1]["content"], re.DOTALL)
    one, other = (len(text.split()) for text in told)
    m = 1 / (1 + math.exp((other - one) / 4))
    likely = [{"token": "m", "logprob": math.log(m)}, {"token": "M", "logprob": math.log(1 - m)},
              {"token": "x", "logprob": -1.0}]  # fmt: skip
    logprobs = {"content": [{"token": "m", "logprob": 0.0, "top_logprobs": likely}]}
    return {"message": {"content": "m"}, "logprobs": logprobs}


def test_an_annotator_of_alpaca_eval_is_asked_and_read_as_upstream_does(tmp_path: Path) -> None:
    baseline = outputs(tmp_path / "baseline.json", ["word " * 3] * 12, "base")
    mine = outputs(tmp_path / "mine.json", ["word " * (2 + k % 6) + f"{k}" for k in range(11)] + ["word " * 3], "mine")
    with serving(by_logprobs) as (url, requests):
        given = [mine, "--alpaca-eval", baseline, "--set", f"prompts={annotator(tmp_path / 'configs')}"]
        found = evaluated(url, *given, judge="rater", out=tmp_path / "out")
    assert {(r["max_tokens"], r["logprobs"], r["top_logprobs"]) for r in requests} == {(1, True, 5)}
    assert len(requests) == 11  # equal answers are a tie that nobody is asked about
    rows = json.loads((tmp_path / "out" / "mine" / "mine" / "annotations.json").read_bytes())
    for k, row in enumerate(rows[:11]):
        assert row["preference"] == pytest.approx(1 + 1 / (1 + math.exp((3 - (3 + k % 6)) / 4)))
        assert (row["generator_1"], row["generator_2"], row["annotator"]) == ("base", "mine", "mine")
    assert rows[11]["preference"] == 1.5
    frame = pd.DataFrame(rows)  # as alpaca_eval reads them
    assert found["of"]["scores"][0]["bounds"]["value"] == pytest.approx(100 * (frame["preference"] - 1).mean())
    again = evaluated(url, tmp_path / "out" / "mine" / "mine" / "annotations.json", "--alpaca-eval", baseline,
                      out=tmp_path / "again")  # fmt: skip
    assert [score["bounds"] for score in again["of"]["scores"]] == [s["bounds"] for s in found["of"]["scores"]]


def test_our_own_prompt_is_asked_in_both_orders_and_two_models_are_compared(tmp_path: Path) -> None:
    baseline = outputs(tmp_path / "baseline.json", ["word " * (3 + k % 2) for k in range(8)], "base")
    better = outputs(tmp_path / "better.json", [f"{k} " + "word " * (4 + k % 3) for k in range(8)], "better")
    worse = outputs(tmp_path / "worse.json", [f"{k}" + " word" * (k % 2) for k in range(8)], "worse")
    with serving(answers_and_judges) as (url, requests):
        given = [better, "--alpaca-eval", baseline, "--against", worse]
        found = evaluated(url, *given, judge="rater", out=tmp_path / "out")
    assert len(requests) == 2 * 2 * 8
    assert found["of"]["scores"][0]["bounds"]["value"] == 100
    assert found["against"]["scores"][0]["bounds"]["value"] == 0
    assert found["differences"][0]["bounds"]["value"] == 100
    assert any("not to be called AlpacaEval" in note for note in found["notes"])


@pytest.mark.parametrize(("read", "num"), [(range(0, 8, 2), None), (range(1, 8), 4)])
def test_two_models_are_compared_where_both_were_judged(tmp_path: Path, read: range, num: int | None) -> None:
    baseline = outputs(tmp_path / "baseline.json", ["word"] * 8, "base")
    mine = outputs(tmp_path / "mine.json", ["word word"] * 8, "mine")
    other = outputs(tmp_path / "other.json", ["word " * 3] * 8, "other")

    def judge(asked: dict[str, Any]) -> str:
        text = asked["messages"][-1]["content"]
        number = int(text.partition("Do ")[2][0])
        is_read = number in read if "word word word" not in text else number % 2
        return answers_and_judges(asked) if is_read else "hm"

    with serving(judge) as (url, _):
        found = evaluated(url, mine, "--alpaca-eval", baseline, "--against", other, judge="rater", out=tmp_path / "out")
    assert [each["bounds"]["num"] for each in found["differences"]] == ([num] if num else [])
    assert any("not compared: no instruction was judged" in note for note in found["notes"]) == (num is None)


def test_what_is_spent_ends_it_and_another_prompt_asks_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = outputs(tmp_path / "baseline.json", ["word"] * 8, "base")
    mine = outputs(tmp_path / "mine.json", ["word word"] * 8, "mine")
    prompts = annotator(tmp_path / "configs")
    with serving(by_logprobs) as (url, requests):  # 110 tokens an answer
        given = ["eval", mine, "--alpaca-eval", baseline, "--set", f"prompts={prompts}", "--set", f"judge.url={url}"]
        given += ["--set", "judge.model=rater", "--out", tmp_path / "out", "--set", "judge.concurrency=1"]
        limited = [*given, "--set", "judge.price_read=10000", "--set", "judge.most_cost=3"]
        assert main([*map(str, limited)]) == 2
        assert "3 is spent, of most_cost=3: 300 tokens read and 30 written" in capsys.readouterr().err
        assert main([*map(str, given)]) == 0
        assert len(requests) == 8
        ask = prompts.parent / "ask.txt"
        ask.write_text(ask.read_text().replace("Judge.", "Judge well."))
        assert main([*map(str, given)]) == 0
        assert len(requests) == 16


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"<html>Sign in</html>", "not a chat completion"),
        (b"", "not a chat completion"),
        (b"x" * (10 << 20), "answered more than 2 MiB"),
        ("", "answered no text"),
    ],
)
def test_a_judge_that_judges_nothing_ends_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: Any, said: str
) -> None:
    baseline = outputs(tmp_path / "baseline.json", ["a"] * 20, "base")
    mine = outputs(tmp_path / "mine.json", ["b"] * 20, "mine")
    with serving(lambda asked: answer) as (url, requests):
        given = ["--set", f"judge.url={url}", "--set", "judge.model=rater", "--set", "judge.concurrency=2"]
        assert main(["eval", str(mine), "--alpaca-eval", str(baseline), *given, "--out", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flowrl:")]
    assert said in line
    assert "the same command goes on" in line
    assert len(requests) <= 10  # not all twenty are tried


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("question.jsonl", '{"question_id": 1, "turns": ["a"]}\nnot json\n', "line 2: is not a JSON object"),
        ("question.jsonl", '{"question_id": 1, "turns": "a"}\n', "question 1: Expected `array`, got `str`"),
        ("question.jsonl", '{"question_id": 1, "turns": ["a"]}\n' * 2, "question 2: has the id 1 of another"),
        ("question.jsonl", "", "is empty"),
        ("other.jsonl", "{}\n", "question.jsonl: is not there"),
        ("question.jsonl", '{"question_id": 1, "category": "math", "turns": ["a"]}\n', "no right answer to question 1"),
    ],
)
def test_questions_of_a_wrong_form_are_refused_by_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "mine.jsonl").write_text('{"question_id": 1, "choices": [{"turns": ["a"]}]}\n')
    with serving(answers_and_judges) as (url, _):
        given = ["--set", f"judge.url={url}", "--set", "judge.model=rater"]
        assert main(["eval", str(tmp_path / "mine.jsonl"), "--mt-bench", str(tmp_path), *given]) == 2
    assert said in capsys.readouterr().err


def test_a_judge_that_is_not_there_is_told_before_anything_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = questions(tmp_path / "mt_bench")
    with serving(answers_and_judges) as (url, requests):
        given = ["--model", "good", "--set", "judge.url=http://127.0.0.1:9/v1", "--set", "judge.model=rater"]
        assert main(["eval", url, "--mt-bench", str(home), *given]) == 2
    assert "does not answer" in capsys.readouterr().err
    assert not requests
