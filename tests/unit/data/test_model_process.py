"""What is done in a process of its own says nothing here, and fails here in one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from flowrl.data.model_process import run_in_process
from flowrl.errors import ModelError

pytestmark = pytest.mark.slow


def talks(source: Path, target: Path) -> None:
    print("a progress bar")
    print("a warning", file=sys.stderr)
    os.write(2, b"from a library\n")
    target.write_text(source.read_text())


def refuses(source: Path) -> None:
    print("something before")
    raise ModelError(f"model {source}", 'is not right; "quoted"\nin two lines', "mend it")


def fails(source: Path) -> None:
    raise KeyError("gone")


def dies(source: Path) -> None:
    os._exit(9)


def test_it_works_and_nothing_it_says_is_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "a").write_text("content")
    run_in_process(talks, tmp_path / "a", tmp_path / "b", where="model a")
    assert (tmp_path / "b").read_text() == "content"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (refuses, r'model /a: is not right; "quoted"\nin two lines; mend it'),
        (fails, "model a: cannot be prepared (exit code 1: KeyError: 'gone'); see `flowrl doctor`"),
        (dies, "model a: cannot be prepared (exit code 9: it said nothing); see `flowrl doctor`"),
    ],
)
def test_its_failure_is_an_error_here(function, said: str):
    with pytest.raises(ModelError) as caught:
        run_in_process(function, Path("/a"), where="model a")
    assert str(caught.value) == said
