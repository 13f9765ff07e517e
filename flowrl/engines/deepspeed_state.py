"""The state of a DeepSpeed engine on disk, and its way to another number of ranks.

Each rank writes its own shard in DeepSpeed's format; `state.json` beside them says how many ranks there were. A state
of another number of ranks is first converted by rank 0 into DeepSpeed's universal format, one file a parameter, in a
directory of its own beside the checkpoint, whose files are sealed. Invariant: a state is loaded whole or an error says
why not. Called by the DeepSpeed engine, on every rank together.

Tests: tests/unit/engines/test_deepspeed_state.py
"""

from __future__ import annotations

import io
import shutil
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import StageError

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.engines.ranks import RankLink

TAG = "deepspeed"  # DeepSpeed's own directory within a state


class StateNote(msgspec.Struct, frozen=True, kw_only=True):
    """What a state is of."""

    num_steps: int  # optimizer steps taken
    num_ranks: int
    zero_stage: int


def write_state(engine: Any, directory: Path, note: StateNote, *, line: RankLink, leave_out_frozen: bool) -> None:
    """Write every rank's shard, and the note."""
    directory.mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(str(directory), tag=TAG, client_state={}, exclude_frozen_parameters=leave_out_frozen)
    if line.rank == 0:
        (directory / "state.json").write_bytes(msgspec.json.encode(note))


def read_state(
    engine: Any, directory: Path, *, zero_stage: int, line: RankLink, where: str, leave_out_frozen: bool
) -> StateNote:
    """Load a state into the engine; returns its note.

    Raises:
        StageError: there is none, it is of another ZeRO stage, or DeepSpeed refuses it.
    """
    try:
        note = msgspec.json.decode((directory / "state.json").read_bytes(), type=StateNote)
    except (OSError, msgspec.DecodeError) as error:
        raise StageError(where, f"no state of this engine in {directory} ({error})", "check --resume") from error
    if note.zero_stage != zero_stage:
        what = f"the state in {directory} was saved at zero_stage={note.zero_stage}, and zero_stage is {zero_stage} now"
        raise StageError(where, what, f"resume with zero_stage={note.zero_stage}")
    is_resharded = note.num_ranks != line.world_size and zero_stage > 0  # at stage 0 every rank holds everything
    source = _resharded(directory, line) if is_resharded else directory
    engine._config.load_universal_checkpoint = is_resharded
    loaded, _ = engine.load_checkpoint(str(source), tag=TAG, load_module_strict=not leave_out_frozen)
    engine._config.load_universal_checkpoint = False
    if loaded is None:
        what = f"DeepSpeed found no state of {note.num_ranks} ranks in {directory}"
        raise StageError(where, what, "resume from another checkpoint")
    line.sum(0.0)  # every rank has read it
    if is_resharded and line.rank == 0:
        shutil.rmtree(source)
    return note


def _resharded(directory: Path, line: RankLink) -> Path:
    """Have rank 0 write a state in the form that any number of ranks can load; returns where."""
    checkpoint = directory.parent
    target = checkpoint.with_name(f".{checkpoint.name}.{directory.name}.universal")
    if line.rank == 0:
        from deepspeed.checkpoint.ds_to_universal import main as convert

        shutil.rmtree(target, ignore_errors=True)
        options = Namespace(
            input_folder=str(directory / TAG),
            output_folder=str(target / TAG),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            convert(options)
    line.sum(0.0)
    return target
