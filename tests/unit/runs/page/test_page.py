"""The page: every section of a whole run, what is missing of others, and nothing that a rollout could do to it."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest

from flowrl.runs.page.page import Subject, page, write_page
from flowrl.runs.page.samples import MOST_TOKENS, ratio_class, shown_groups
from flowrl.telemetry.records import step_path, write_rollouts
from tests.support.past_run import HOSTILE, SECTIONS, past_run, sampled

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Reader(HTMLParser):
    """What a browser would make of a page: its elements, their attributes, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] or "" for tag, attributes in self.tags if tag == "section"]


def subject_of(run_dir: Path, **more: object) -> Subject:
    known: dict[str, object] = {
        "condition": "finished",
        "nodes": ["prompts", "generator", "reward", "learner"],
        "edges": [("queue", "a.b", "c.d", "depth 3")],
        "settings": [("learner.lr", "1e-05")],
        "totals": {"admitted": 25, "learned": 24, "filtered": 1},
        "advice": ["--set generator.replicas=2 is worth +31%"],
    }
    return Subject(run_dir=run_dir, **{**known, **more})  # type: ignore[arg-type]


def pieces(ids: Sequence[int]) -> list[str]:
    return [f"<{token}>" for token in ids]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return past_run(tmp_path_factory.mktemp("page") / "whole")


@pytest.fixture(scope="module")
def whole(run_dir: Path) -> str:
    return page(subject_of(run_dir), pieces)


def test_a_whole_run_has_every_section_and_lacks_nothing(whole: str) -> None:
    read = Reader(whole)
    assert read.sections == SECTIONS
    assert "its interval contains 0" in read.text
    assert "6 of 6 steps" in read.text
    assert "learner.lr" in read.text
    assert "bottleneck: " in read.text
    assert "--set generator.replicas=2 is worth +31%" in read.text


def test_the_page_asks_nothing_of_the_network_and_runs_only_its_own_script(whole: str) -> None:
    read = Reader(whole)
    links = [
        v for _, attributes in read.tags for k, v in attributes.items() if k in ("src", "href", "action", "srcset")
    ]
    assert all(link.startswith(("#", "data:")) for link in links if link)
    assert [attributes for tag, attributes in read.tags if tag == "script"] == [{}]
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    policy = next(a["content"] for t, a in read.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)
    assert "@import" not in whole
    assert "url(" not in whole


@pytest.mark.slow
def test_whatever_a_run_holds_stays_text(tmp_path: Path) -> None:
    run_dir = past_run(tmp_path / "hostile", text=HOSTILE, ending="failed")
    subject = subject_of(run_dir, failure=HOSTILE, settings=[("data.source", HOSTILE)], advice=[HOSTILE],
                         reasons=[("filtered", HOSTILE, 1)], verdict=[HOSTILE], edges=[(HOSTILE,) * 4], resume=HOSTILE,
                         condition=HOSTILE, nodes=[HOSTILE])  # fmt: skip
    text = page(subject, lambda ids: [HOSTILE] * len(ids))
    read = Reader(text)
    harmless = Reader(page(subject_of(past_run(tmp_path / "other"), reasons=[("filtered", "x", 1)]), pieces))
    assert sum(tag == "script" for tag, _ in read.tags) == 1
    assert not [tag for tag, _ in read.tags if tag == "img"]
    assert {tag for tag, _ in read.tags} - {"pre"} <= {tag for tag, _ in harmless.tags} | {"code"}
    assert "54439" not in read.text, "no template in a rollout is filled in"
    assert read.text.count("document.title='owned'") >= 8, "it is shown, as text"
    assert "\x1b" not in text


def test_an_unfinished_offline_run_says_what_it_lacks(tmp_path: Path) -> None:
    text = page(
        subject_of(tmp_path, has_generator=False, totals={}, advice=[], condition="killed", is_sound=False), None
    )
    read = Reader(text)
    assert read.sections == ["missing", "ledger", "settings"]
    for what in ("no step has been learned", "nothing was evaluated", "no timeline.json", "learns from given examples",
                 "the ledger", "there is no profile.json"):  # fmt: skip
        assert what in read.text


def test_a_killed_run_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    run_dir = past_run(tmp_path / "killed", ending="killed")
    timeline = run_dir / "timeline.json"
    timeline.write_bytes(timeline.read_bytes()[:4000])
    metrics = run_dir / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:2500])
    read = Reader(page(subject_of(run_dir, condition="killed", is_sound=False), None))
    assert {"learning", "time", "rollouts"} <= set(read.sections)
    assert "shown by number" in read.text


def test_tokens_are_coloured_by_version_and_by_ratio(run_dir: Path, tmp_path: Path) -> None:
    (group, _) = shown_groups(run_dir, pieces)[-2:]
    assert [(t.text, t.kinds, t.says) for t in group.samples[0].tokens] == [
        ("<5>", "a1", "version 4, p 0.607"),
        ("<6>", "a0", "version 5, p 0.368"),
    ]
    path = step_path(tmp_path / "rollouts", 0)
    ours = {(0, 0): np.array([-0.5, -0.1], dtype=np.float32)}
    write_rollouts(path, [sampled(0, 0, rewards=(1.0, 0.0))], 0, ours)
    (token, other) = shown_groups(tmp_path, pieces)[0].samples[0].tokens
    assert (token.kinds, token.says) == ("a0 r3", "version 0, p 0.607, ratio 1")
    assert (other.kinds, other.says) == ("a0 r6", "version 0, p 0.368, ratio 2.46")
    assert "No importance ratio" not in page(subject_of(tmp_path), pieces)


@pytest.mark.parametrize(("ratio", "kind"), [(0.1, 0), (0.5, 1), (0.9, 2), (1.0, 3), (1.1, 4), (1.5, 5), (9.0, 6)])
def test_ratios_fall_into_seven_colours(ratio: float, kind: int) -> None:
    assert ratio_class(ratio) == kind


def test_what_is_shown_of_a_step_tells_something(tmp_path: Path) -> None:
    for step in range(20):
        groups = [
            sampled(10 * step + k, step, rewards=(0.0, 3.0 if k == 2 else 0.1, 0.05), age=2 if k == 4 else 0)
            for k in range(6)
        ]
        write_rollouts(step_path(tmp_path / "rollouts", step), groups, step)
    groups = shown_groups(tmp_path, None)
    assert [group.step for group in groups] == [s for s in (0, 4, 8, 11, 15, 19) for _ in range(2)]
    assert [group.group_id % 10 for group in groups[2:]] == [2, 4] * 5, "rewards differ most, and the stalest"
    assert [(s.place, s.reward) for s in groups[2].samples] == [(1, "3"), (0, "0")], "best and worst"


@pytest.mark.slow
def test_the_size_is_bounded_however_long_the_run(tmp_path: Path) -> None:
    run_dir = past_run(tmp_path / "long", num_steps=250)
    path = step_path(run_dir / "rollouts", 0)
    table = pq.ParquetFile(path).read()
    rows = table.to_pylist()
    for row in rows:
        row.update(token_ids=[5] * 5000, logprobs=[-0.5] * 5000, token_versions=[0] * 5000)
    pq.write_table(table.from_pylist(rows, schema=table.schema), path)
    text = page(subject_of(run_dir), pieces)
    assert len(text) < 1_500_000
    assert f"and {5000 - MOST_TOKENS} more tokens" in text
    assert "each point is the mean of 2 versions" in text
    assert "the table of steps has 60 of 250" in html.unescape(text)


def test_the_page_is_written_whole(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_page(out, subject_of(run_dir), pieces)
    assert out.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
