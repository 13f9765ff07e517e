"""The doctor says ok or what to do, and its exit code is 1 only when something has to be fixed."""

from __future__ import annotations

import inspect
import subprocess
from typing import TYPE_CHECKING

import pytest

from flowrl import doctor
from flowrl.doctor import (
    GIB,
    Finding,
    companions,
    device_findings,
    diagnose,
    disk_finding,
    memory_finding,
    memory_limit,
    package_finding,
)
from flowrl.runtime.devices import Machine
from tests.support.command import SCRIPT
from tests.support.devices import machine

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("levels", "code", "last"), [(["ok", "note"], 0, "ready: nothing to fix"), (["ok", "FIX", "FIX"], 1, "2 to fix")]
)
def test_only_what_must_be_fixed_makes_the_exit_code_1(monkeypatch: pytest.MonkeyPatch, levels, code, last):
    monkeypatch.setattr(doctor, "CHECKS", [lambda level=level: [Finding(level, "x", "y")] for level in levels])
    lines: list[str] = []
    assert diagnose(lines.append) == code
    assert len(lines) == len(levels) + 1
    assert lines[-1].strip() == last


def test_a_finding_is_one_line_with_its_remedy():
    line = str(Finding("FIX", "torch", "does not load", "remove .venv"))
    assert line.split() == ["FIX", "torch", "does", "not", "load;", "remove", ".venv"]


LIGHT = [check for check in doctor.CHECKS if check.__name__ not in ("_torch", "_port")]  # torch and sockets: see below


@pytest.mark.parametrize("check", LIGHT, ids=lambda check: check.__name__.strip("_"))
def test_every_check_answers_in_single_lines(check):
    findings = list(check())
    assert findings
    assert all("\n" not in str(finding) for finding in findings)


def test_a_ray_that_lets_everybody_in_must_be_mended(monkeypatch: pytest.MonkeyPatch):
    def found() -> list[str]:
        monkeypatch.setattr(doctor, "CHECKS", [check for check in LIGHT if "ray" in check.__name__])
        lines: list[str] = []
        return [str(diagnose(lines.append)), *lines]

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert found()[0] == "0"
    for mode, code in (("token", "0"), ("disabled", "1")):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        assert found()[0] == code
    assert "RAY_AUTH_MODE=disabled" in found()[1]


def test_every_check_there_is_is_in_the_list():
    written = {
        each for name, each in vars(doctor).items() if name.startswith("_") and inspect.isgeneratorfunction(each)
    }
    assert written == set(doctor.CHECKS)
    assert len(doctor.CHECKS) == len(written), "each once"


def test_a_cuda_companion_beside_a_cpu_torch_must_go():
    versions = {"torchvision": "0.28.0", "torchaudio": "2.13.0+cpu", "torchcodec": "99.0.0+stub", "other": None}
    assert [(each.level, each.name) for each in companions(versions, torch_is_cpu=True)] == [("FIX", "torchvision")]
    assert not list(companions(versions, torch_is_cpu=False))


@pytest.mark.parametrize(
    ("name", "wanted", "level"),
    [
        ("msgspec", ">=0.1", "ok"),
        ("msgspec", ">=999", "FIX"),
        ("msgspec", "", "ok"),
        ("no-such-package-anywhere", ">=1", "FIX"),
    ],
)
def test_a_package_is_held_against_what_is_wanted(name, wanted, level):
    finding = package_finding(name, wanted)
    assert finding.level == level
    assert (f"pip install '{name}{wanted}'" == finding.remedy) is (level == "FIX")


@pytest.mark.parametrize(("text", "limit"), [("1073741824", GIB), ("max", None)])
def test_a_container_s_memory_is_read(tmp_path: Path, text, limit):
    (tmp_path / "memory.max").write_text(f"{text}\n")
    assert memory_limit(tmp_path) == limit


@pytest.mark.parametrize(("free", "level"), [(2 * GIB - 1, "FIX"), (2 * GIB, "note"), (12 * GIB, "ok")])
def test_only_a_disk_on_which_no_run_would_start_must_be_mended(tmp_path: Path, free, level):
    assert disk_finding("disk", tmp_path, free).level == level


def test_a_machine_without_control_groups_has_no_limits(tmp_path: Path):
    assert memory_limit(tmp_path) is None


@pytest.mark.parametrize(
    ("total", "available", "level"), [(24, 20, "ok"), (24, 8, "note"), (8, 7, "note"), (4, 4, "FIX")]
)
def test_memory_is_held_against_the_default_graph(total, available, level):
    assert memory_finding(total * GIB, available * GIB).level == level


@pytest.mark.slow
def test_the_command_names_every_package_and_ends_with_a_verdict(tmp_path: Path):
    result = subprocess.run([SCRIPT, "doctor"], cwd=tmp_path, capture_output=True, text=True)
    for name in (*doctor.PACKAGES, "vllm", "torch build", "cores", "memory", "/dev/shm", "127.0.0.1", "default model"):
        assert name in result.stdout, result.stderr
    lines = result.stdout.splitlines()
    num_to_fix = sum(line.startswith("FIX") for line in lines)
    assert lines[-1] == (f"{num_to_fix} to fix" if num_to_fix else "ready: nothing to fix")
    assert result.returncode == bool(num_to_fix)


def test_gpus_are_listed_with_what_keeps_a_run_from_them() -> None:
    lines = [str(finding) for finding in device_findings(machine(80, 80))]
    assert [line.split()[0] for line in lines] == ["ok"] * 4
    assert "varlen by" in lines[-1]
    levels = {finding.name: finding.level for finding in device_findings(machine(80, 24))}
    assert levels["gpus"] == "FIX"
    old = Machine(gpus=machine(80).gpus, driver_cuda="11.8", torch_cuda="13.0")
    assert {f.name: f.level for f in device_findings(old)}["CUDA"] == "FIX"
    (lost,) = device_findings(Machine(why_none="1 NVIDIA GPU is on the bus, but no driver answers"))
    assert lost.level == "FIX"
    (none,) = device_findings(Machine(why_none="no device"))
    assert none.level == "ok"
