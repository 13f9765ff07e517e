"""The built wheel in an environment of its own: it has its own name, and its graphs run outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from typing import TYPE_CHECKING

import pytest

from flowrl import shipped
from tests.support.command import ROOT, tiny_settings

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TORCH = "flowrl.engines.torch:TorchEngine"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("flowrl", "graphs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the console script in an environment that has the wheel, and everything else from this one."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    packages = next(place.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip("--python", place / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    return place / "bin" / "flowrl"


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True)


def said_by(script: Path, *arguments: object, cwd: Path) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([script, *map(str, arguments)], cwd=cwd, env=variables, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_distribution_has_a_name_of_its_own_and_all_it_needs(wheel: Path):
    assert wheel.name.startswith("flowrl_engine-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        scripts = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "flowrl = flowrl.cli:main" in scripts
    assert set(re.findall("^Provides-Extra: (.*)$", metadata, re.M)) >= {"cpu", "gpu", "tensorboard", "dev"}
    for folder, kinds in (("flowrl", (".py", ".html", ".css", ".js")), ("graphs", (".py", ".yaml", ".jsonl"))):
        files = [file for file in (ROOT / folder).rglob("*") if file.suffix in kinds and file.is_file()]
        wanted = {str(file.relative_to(ROOT)) for file in files}
        if folder == "graphs":
            wanted = {f"flowrl/{name}" for name in wanted}
        assert not wanted - names


def test_what_is_read_tells_nobody_to_install_another_projects_package():
    for file in [ROOT / "README.md", *(ROOT / "flowrl").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"pip install '?flowrl(?!-engine)\b", file.read_text()), file


def test_its_graphs_are_listed_written_and_run_outside_the_checkout(installed: Path, tiny: Path, tmp_path: Path):
    listed = said_by(installed, "graphs", cwd=tmp_path)
    assert "graphs/ppo_async.py" in listed
    assert "graphs/recipes/smollm2-grpo.yaml" in listed
    assert str(installed.parents[1]) in listed
    assert "written: " in said_by(installed, "init", tmp_path / "mine", cwd=tmp_path)
    mine = tmp_path / "mine"
    for file in (ROOT / "graphs").rglob("*.*"):
        if "__pycache__" not in file.parts:
            assert (mine / "graphs" / file.relative_to(ROOT / "graphs")).read_bytes() == file.read_bytes()
    graph = mine / "graphs" / "sft.py"
    settings = [*tiny_settings(tiny, graph), "--set", f"learner.engine={TORCH}", "--set", "runtime=local"]
    more = ["--set", "steps=2", "--set", "examples_per_step=2", "--set", "hints=false"]
    said = said_by(installed, "run", "graphs/sft.py", *settings, *more, "--name", "first", cwd=mine)
    assert (mine / "runs" / "first" / "report.txt").is_file(), said


def test_a_recipe_is_told_by_its_first_sentence():
    assert shipped.graphs()["graphs/recipes/smollm2-dr-grpo.yaml"].startswith("Dr. GRPO (")
