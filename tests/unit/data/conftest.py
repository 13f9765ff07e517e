from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def jsonl(tmp_path: Path):
    """Writes rows (or raw lines) to data.jsonl and returns its path."""

    def write(rows: list[Any], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write
