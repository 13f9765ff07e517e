"""What a node of a cluster must have, and what there is room for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from flowrl.errors import ResourceError
from flowrl.graph.program import EdgePlan, GraphPlan
from flowrl.graph.stage import Specification
from flowrl.runtime.devices import Machine
from flowrl.runtime.nodes import NodeQuestion, NodeReport, RayNode, check_node, lacking, paths_in, report_on, user_files
from flowrl.runtime.readiness import bring_code, moved


def node(number: int, cpus: float, gpus: float = 0.0) -> RayNode:
    return RayNode(id=f"n{number}", address=f"10.0.0.{number}", is_alive=True, cpus=cpus, gpus=gpus)


HERE = NodeReport(
    host_name="a", is_resolved=True, versions={"python": "3.11.4", "torch": "2.13.0", "flowrl-engine": "0.1"},
    machine=Machine(cores=2), shm_bytes=1 << 30, time_s=0.0, seen="word", wrote="file", missing=[],
    differing=[],
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "gap_s", "words"),
    [
        ({"versions": HERE.versions | {"torch": "2.12.0"}}, 0.0, "has torch 2.12.0, this machine has 2.13.0"),
        ({"versions": {"python": "3.11.4", "torch": "2.13.0"}}, 0.0, "has flowrl-engine not installed"),
        ({"versions": HERE.versions | {"python": "3.12.1"}}, 0.0, "has python 3.12, this machine has 3.11"),
        ({}, 180.0, "its clock is 180 s ahead of this machine's"),
        ({}, -61.0, "its clock is 61 s behind this machine's"),
        ({"missing": ["/data/model", "/data/rows"]}, 0.0, "has no /data/model and 1 more"),
        ({"seen": ""}, 0.0, "does not see the run's directory"),
        ({"seen": "another word"}, 0.0, "does not see the run's directory"),
    ],
)
def test_what_a_node_lacks_is_said_with_its_address(changes: dict[str, Any], gap_s: float, words: str) -> None:
    report = msgspec.structs.replace(HERE, **changes)
    with pytest.raises(ResourceError) as caught:
        check_node("10.0.0.2", report, HERE, gap_s=gap_s, token="word")
    assert caught.value.where == "node 10.0.0.2"
    assert words in caught.value.what


def test_a_node_with_another_patch_of_python_will_do() -> None:
    report = msgspec.structs.replace(HERE, versions=HERE.versions | {"python": "3.11.9"})
    check_node("10.0.0.2", report, HERE, gap_s=30.0, token="word")


def test_a_node_reads_the_token_and_writes_it_back(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("word")
    (tmp_path / "code.py").write_text("a = 1\n")
    question = NodeQuestion(
        run_dir=str(tmp_path), token="token", folder=str(tmp_path), paths=["code.py", "gone"],
        files={str(tmp_path / "code.py"): "another", str(tmp_path / "gone.py"): ""},
    )  # fmt: skip
    found = report_on(question)
    assert found.seen == (tmp_path / found.wrote).read_text() == "word"
    assert found.missing == ["gone"]
    assert found.differing == [str(tmp_path / "code.py")]
    assert report_on(msgspec.structs.replace(question, run_dir=str(tmp_path / "elsewhere"))).seen == ""


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        ([("a", {"CPU": 1.0}), ("b", {"CPU": 1.0}), ("c", {"CPU": 0.5})], []),
        ([("a", {"CPU": 2.0}), ("b", {"CPU": 1.5})], ["b (1.5 CPU)"]),
        ([("a", {"CPU": 3.0})], ["a (3 CPU)"]),
        ([("a", {"GPU": 2.0}), ("b", {"GPU": 3.0, "CPU": 1.0})], ["a (2 GPU)"]),
        ([("a", {})], []),
    ],
)
def test_what_no_node_has_room_for_is_named(wanted: list[tuple[str, dict[str, float]]], left: list[str]) -> None:
    assert lacking(wanted, [node(1, 2.0), node(2, 1.0, gpus=4.0)]) == left
    assert lacking([("a", {"CPU": 0.1})], []) == ["a (0.1 CPU)"]


def test_paths_are_told_from_names(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    tree = {"model": str(tmp_path / "model"), "more": [{"hub": "org/name"}, "model", 3, str(tmp_path / "gone")]}
    assert paths_in(tree) == [str(tmp_path / "model")]


def test_user_code_travels_with_what_it_imports_and_paths_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code" / "package").mkdir(parents=True)
    (tmp_path / "code" / "package" / "__init__.py").touch()
    names = {"graph": "graph.py", "package": "package/__init__.py", "package.part": "package/part.py"}
    placed = {name: tmp_path / "code" / file for name, file in names.items()}
    for name, file in placed.items():
        file.write_text(f"# {name}\n")
        module = ModuleType(name)
        module.__file__ = str(file)
        monkeypatch.setitem(sys.modules, f"travels_{name}", module)
    assert {str(file) for file in placed.values()} <= set(user_files({}))
    report = msgspec.structs.replace(HERE, differing=[str(placed["graph"])])

    class Found:
        reports = {"10.0.0.2": report}
        files = [str(file) for file in placed.values()]

    said: list[str] = []
    places = bring_code(Found(), tmp_path / "run", said.append)  # pyright: ignore[reportArgumentType]
    graph, part = Path(places[str(placed["graph"])]), Path(places[str(placed["package.part"])])
    assert part == graph.parent / "package" / "part.py"
    assert part.read_text() == "# package.part\n"
    assert "node 10.0.0.2 has no graph.py" in said[0]
    spec = Specification(stage=f"{placed['graph']}:Mine", arguments={"config": {"function": "math:gcd", "rows": [1]}})
    edge = EdgePlan(kind="queue", source="a.x", target="b.y", bounds={"depth": 2})
    plan = moved(GraphPlan(nodes={"a": spec}, edges=[edge], until="a"), places)
    assert plan.nodes["a"].stage == f"{graph}:Mine"
    assert plan.nodes["a"].arguments == spec.arguments
    assert plan.edges == [edge]


def test_what_is_loaded_elsewhere_is_found_by_its_path_and_its_imports(tmp_path: Path) -> None:
    files = {
        "reward.py": "import json\nfrom words import GOOD\nimport package.part\n",
        "words.py": "from math import pi\nGOOD = 1\n",
        "package/__init__.py": "",
        "package/part.py": "from . import other\n",
        "package/other.py": "",
        "unused.py": "",
    }
    (tmp_path / "package").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = user_files({"nodes": {"reward": [f"{tmp_path}/reward.py:score", "math:gcd"]}})
    here = {str(Path(file).relative_to(tmp_path)) for file in found if file.startswith(str(tmp_path))}
    assert here == {*files} - {"unused.py"}
