"""Sampled responses as rows that are read again: prompt-completion and preference data (formats.py), in JSONL files.

Invariants:
- a prompt with its completion, read again, is rendered to the text that the policy read and wrote;
- a file appears whole under its name, on the disk, or not at all;
- a prompt under a chat template becomes messages, the settings' system prompt included;
- what a prompt put into the policy's mouth (`answer_prefix`) begins the completion, for there it is the assistant's
  message.

Called by the writer stage.

Tests: tests/unit/data/test_templates.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.data.prompts import prompt_of
from flowrl.data.sources import RawRow
from flowrl.telemetry.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from flowrl.data.formats import Text
    from flowrl.data.prompts import PromptData


def asked_and_answered(data: PromptData, columns: Mapping[str, Any], text: str) -> tuple[Text, Text]:
    """Return prompt and completion of a response to a prompt's columns.

    A prompt "2 + 2?" with the prefix "It is" and the text " 4." gives a user's message and the assistant's "It is 4.".
    """
    prefix = columns.get("answer_prefix") or ""
    prompt = prompt_of(data, RawRow("prompt", dict(columns))).prompt
    if isinstance(prompt, str):
        return (f"{prompt}\n{prefix}" if prefix else prompt), text
    return prompt, [{"role": "assistant", "content": prefix + text}]


def template_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that the chat template was given besides the prompt."""
    return {name: columns[name] for name in ("tools", "chat_template_kwargs") if columns.get(name)}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, replacing a file of an earlier attempt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
