"""The timeline: readable JSON, lanes that never overlap, arrows bound to spans."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.telemetry.timeline import Lanes, Timeline
from tests.unit.telemetry.streams import EDGE, edge, random_run, span, status

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.telemetry.events import Event

Record = dict[str, Any]


def written(path: Path, events: Sequence[Event], *, batch: int = 5, **options: int) -> tuple[list[Record], list[str]]:
    said: list[str] = []
    timeline = Timeline(path / "timeline.json", say=said.append, **options)
    for at in range(0, len(events), batch):
        timeline.consume(list(events[at : at + batch]))
    timeline.close()
    return json.loads((path / "timeline.json").read_text()), said


def slices(records: list[Record]) -> dict[tuple[int, int], list[Record]]:
    tracks: dict[tuple[int, int], list[Record]] = defaultdict(list)
    for record in records:
        if record["ph"] == "X":
            tracks[record["pid"], record["tid"]].append(record)
    return tracks


def arrows(records: list[Record]) -> dict[int, list[Record]]:
    found: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if record["ph"] in "stf":
            found[record["id"]].append(record)
    return found


def names(records: list[Record], kind: str) -> set[str]:
    return {record["args"]["name"] for record in records if record["ph"] == "M" and record["name"] == kind}


@pytest.mark.parametrize("seed", range(5))
def test_spans_on_one_track_never_overlap(tmp_path: Path, seed: int) -> None:
    records, _ = written(tmp_path, random_run(seed))
    tracks = slices(records)
    assert sum(len(track) for track in tracks.values()) == 6 * (4 + 4 + 2)
    for track in tracks.values():
        track.sort(key=lambda record: record["ts"])
        for earlier, later in pairwise(track):
            assert earlier["ts"] + earlier["dur"] <= later["ts"]


@pytest.mark.parametrize("seed", range(5))
def test_every_arrow_begins_and_ends_inside_a_span_of_its_group(tmp_path: Path, seed: int) -> None:
    records, _ = written(tmp_path, random_run(seed))
    tracks, found = slices(records), arrows(records)
    assert set(found) == set(range(24))
    for group, points in found.items():
        assert [point["ph"] for point in points] == ["s", "t", "f"]
        assert {point["bp"] for point in points} == {"e"}  # bound to the span around it, not to the next one
        assert [point["ts"] for point in points] == sorted(point["ts"] for point in points)
        held_by: list[str] = []
        for point in points:
            track = tracks[point["pid"], point["tid"]]
            (holder,) = [s for s in track if s["ts"] <= point["ts"] < s["ts"] + s["dur"]]
            assert group in holder["args"]["groups"]
            held_by.append(holder["name"].split()[0])
        assert held_by == ["generate", "score", "step"]


def test_an_arrow_follows_its_spans_in_the_file_even_when_they_arrive_late(tmp_path: Path) -> None:
    late = [
        span("learner", "step 0", 3, 4, 7),
        span("reward", "score", 2, 2.5, 7),
        span("generator", "generate", 0, 1, 7),
    ]
    later = [span("generator", "generate", 20, 30, 8)]
    records, _ = written(tmp_path, [*late, *later], batch=1)
    order = [record["ph"] + str(record["pid"]) for record in records if record["ph"] in "stfX"]
    assert order == ["X2", "X3", "X4", "X4", "s4", "t3", "f2"]


def test_a_group_that_was_never_learned_has_its_arrow_at_the_end(tmp_path: Path) -> None:
    filtered = [
        span("generator", "generate", 0, 1, 7),
        span("reward", "score", 2, 2.5, 7),
        span("generator", "g", 0, 1, 8),
    ]
    records, _ = written(tmp_path, filtered)
    assert {group: [p["ph"] for p in points] for group, points in arrows(records).items()} == {7: ["s", "f"]}


def test_nodes_are_processes_and_replicas_threads_with_lanes(tmp_path: Path) -> None:
    events: list[Event] = [
        span("generator", "generate", 0, 2, 0, replica=1),
        span("generator", "generate", 1, 3, 1, replica=1),
    ]
    records, _ = written(tmp_path, [*events, edge(3, at=1.0)])
    assert names(records, "process_name") == {"generator", "queues"}
    assert names(records, "thread_name") == {"generator.1", "generator.1 lane 2"}


def test_counters_show_fill_and_where_time_went(tmp_path: Path) -> None:
    events: list[Event] = [
        edge(3, at=1.0),
        edge(3, at=2.0),  # unchanged: not written again
        status(at=1.0, computing=1.0),
        status(at=3.0, computing=1.5, waiting_for_input=1.5),
    ]
    records, _ = written(tmp_path, events)
    counters = [(r["name"], r["ts"], r["args"]) for r in records if r["ph"] == "C"]
    assert counters == [
        (f"{EDGE} (of 10)", 1_000_000, {"items": 3}),
        ("generator.0 %", 1_000_000, {"computing": 100.0}),
        ("generator.0 %", 3_000_000, {"computing": 25.0, "waiting for input": 75.0}),
    ]


def test_a_killed_run_leaves_an_array_that_only_lacks_its_end(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json", say=print)
    timeline.consume(random_run(1))
    text = (tmp_path / "timeline.json").read_text()
    timeline.close()
    assert text.startswith("[\n")
    assert text.endswith(",\n")
    assert len(json.loads(text[:-2] + "]")) > 60


def test_what_is_beyond_the_cap_is_counted_and_said(tmp_path: Path) -> None:
    spans: list[Event] = [span("generator", "generate", at, at + 1) for at in range(100)]
    records, said = written(tmp_path, spans, max_records=24)
    assert len(records) == 24 + 1  # and the one that closes the array
    assert said == ["timeline.json holds the first 24 records of the run; 80 later ones were left out"]


def test_a_span_of_no_length_can_still_hold_an_arrow(tmp_path: Path) -> None:
    records, _ = written(tmp_path, [span("reward", "score", 1, 1, 0), span("learner", "step 0", 1, 1, 0)])
    assert [record["dur"] for record in records if record["ph"] == "X"] == [1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_lanes_are_as_few_as_the_most_spans_at_once(seed: int) -> None:
    draw = random.Random(seed)
    starts = [draw.randrange(1000) for _ in range(300)]
    spans = sorted(((start, start + draw.randrange(1, 100)) for start in starts), key=lambda pair: pair[1])
    lanes = Lanes()
    num_lanes = 1 + max(lanes.place(start, end) for start, end in spans)
    assert num_lanes == max(sum(start <= at < end for start, end in spans) for at in range(1100))
