"""A learner's checkpoints on disk, and how far a run had come at each.

`checkpoints/step-000040/` holds `model/` (Hugging Face format, with tokenizer and model card), `state/` (the engine's
own, to go on training) and `progress.json`, written last: a directory without it is not a checkpoint. The directory is
written aside and renamed, so a kill leaves either the whole of it or nothing under its name.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import msgspec

from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.engines.base import TrainingEngine

CARD = """---
library_name: transformers
tags: [flowrl, reinforcement-learning]
---
# {name}

Policy version {version}, trained with flowrl. Load it with `AutoModelForCausalLM.from_pretrained` or serve it with
vLLM. The run's settings are in `settings.yaml` and its figures in `metrics.jsonl` of the run directory.
"""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a run had come."""

    version: int  # policy versions published
    next_group: int  # the first group not yet learned


class CheckpointWriter:
    """Writes checkpoints into one directory and keeps the newest few."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._directory = directory
        self._keep = keep

    def save(self, engine: TrainingEngine, version: int, next_group: int) -> Path:
        """Write the engine's model and state as `version`; returns the checkpoint's directory."""
        final = self._directory / f"step-{version:06d}"
        aside = self._directory / f".step-{version:06d}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        name = self._directory.parent.name
        engine.save_model(aside / "model", card=CARD.format(name=name, version=version))
        engine.save_state(aside / "state")
        progress = Progress(version=version, next_group=next_group)
        (aside / "progress.json").write_bytes(msgspec.json.encode(progress))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        for old in complete_checkpoints(self._directory)[: -self._keep]:
            shutil.rmtree(old)
        return final


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in a directory, oldest first."""
    return sorted(path.parent for path in directory.glob("step-*/progress.json"))


def read_progress(checkpoint: Path) -> Progress:
    """Return how far the run had come at a checkpoint.

    Raises:
        ConfigError: `progress.json` is missing or unreadable.
    """
    path = checkpoint / "progress.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Progress)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})", "resume from another checkpoint") from error
