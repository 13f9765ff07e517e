"""A run's checkpoints on disk: one directory each, whole or not there.

`checkpoints/step-000040/` holds `model/` (Hugging Face format, with tokenizer and model card) and one directory of
state for each stateful node. Beside them are `cut.json` (where the flow stood) and `manifest.json`: the size and blake3
digest of every other file.

Invariants:
- a directory is written aside, brought to the disk, and renamed last, so a kill leaves either all of it or nothing
  under its name;
- a checkpoint is used only when every file agrees with the manifest.

What is kept: the newest few, the best, and those whose score is still to come. Written by the learner, read by the
runtimes and by `flowrl verify`.

The best is the one whose version scored best, of equal ones the earliest. Where evaluations score versions, after they
were saved as a rule, `scores.json` beside the checkpoints holds what each was given. Version 0 is the model that the
run began with; there is no checkpoint of it. Else the manifests hold the scores.

Tests: tests/unit/engines/test_checkpoint.py
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from flowrl.errors import ConfigError, DataError, ResourceError
from flowrl.telemetry.files import (
    UNREADABLE,
    check_fence,
    is_full,
    no_room,
    read_file,
    replace_file,
    steps_in,
    sync,
    why_closed,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

CARD = """---
library_name: transformers
tags: [flowrl, reinforcement-learning]
---
# {name}

Policy version {version}, trained with flowrl. Load it with `AutoModelForCausalLM.from_pretrained` or serve it with
vLLM. The run's settings are in `settings.yaml` and its figures in `metrics.jsonl` of the run directory.
"""
RATED = "scores.json"
SPARE = 1.1  # room asked for over the size of the last checkpoint


class FileDigest(msgspec.Struct, frozen=True, array_like=True):
    """A file as it was written."""

    size: int
    blake3: str


class CheckpointManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint consists of."""

    version: int  # policy versions published
    # What the best goes by: the mean reward of the steps since the checkpoint before; None: evaluations score versions
    score: float | None
    files: dict[str, FileDigest]  # by path within the checkpoint


class Sealed(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest and the digest of its own JSON."""

    manifest: CheckpointManifest
    blake3: str


class Rated(msgspec.Struct, frozen=True, kw_only=True):
    """What evaluations gave a run's versions."""

    by: str  # what was evaluated
    scores: dict[int, float] = {}  # by version; more is better


class Best(NamedTuple):
    """The version of a run that scored best."""

    version: int
    score: float
    by: str  # what gave the score
    checkpoint: Path | None  # None: it is not saved; of version 0 there is none


class CheckpointWriter:
    """Writes checkpoints into one directory; keeps the newest `keep`, the best, and the versions in `awaited`."""

    def __init__(self, directory: Path, *, keep: int, awaited: frozenset[int] = frozenset()) -> None:
        self._directory = directory
        self._keep = keep
        self._awaited = awaited

    def begin(self, version: int) -> Path:
        """Make the directory to write into and return it.

        Raises:
            ResourceError: the disk has less room than the last checkpoint took, or takes nothing.
        """
        known = complete_checkpoints(self._directory)
        needed = int(SPARE * _size(known[-1])) if known else 0
        aside = self._directory / f".step-{version:06d}.partial"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._directory).free
            if free < needed:
                raise _no_room(self._directory, version, needed, free)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        except OSError as error:
            raise self.failure(aside, version, error) from error
        return aside

    def commit(self, aside: Path, *, version: int, cut: bytes, score: float | None) -> Path:
        """Seal what was written and give it its name; returns that directory.

        Raises:
            ResourceError: the disk is full; the checkpoints before are as they were.
        """
        try:
            (aside / "cut.json").write_bytes(cut)
            files = {str(path.relative_to(aside)): _sealed(path) for path in _files(aside)}
            manifest = CheckpointManifest(version=version, score=score, files=files)
            sealed = Sealed(manifest=manifest, blake3=_digest_of(manifest))
            (aside / "manifest.json").write_bytes(msgspec.json.encode(sealed))
            sync(aside / "manifest.json")
            for folder in [aside, *(path for path in aside.rglob("*") if path.is_dir())]:
                sync(folder)
            check_fence()
            final = self._directory / f"step-{version:06d}"
            if final.exists():  # of a history that was rolled back
                os.replace(final, _unused(final))
            os.replace(aside, final)
            sync(self._directory)
            self._prune()
        except OSError as error:
            raise self.failure(aside, version, error) from error
        return final

    def failure(self, aside: Path, version: int, error: Exception) -> Exception:
        """Clear away what was written; returns a ResourceError where the disk takes no more, else the error itself."""
        written = _size(aside)
        shutil.rmtree(aside, ignore_errors=True)
        disk = self._directory if self._directory.exists() else self._directory.parent
        free = shutil.disk_usage(disk).free
        if why_closed(disk) or (isinstance(error, OSError) and error.errno == errno.EDQUOT):
            return ResourceError(str(disk), f"{no_room(disk)} ({error})", "mend that; the checkpoints before are kept")
        was_full = is_full(error) or free <= written
        return _no_room(self._directory, version, 2 * written, free) if was_full else error

    def rate(self, version: int, score: float | None, *, by: str) -> bool:
        """Note what an evaluation gave a version, None where it gave nothing; returns whether no other has as much."""
        rated = read_rated(self._directory)
        before = rated.scores if rated else {}
        scores = before if score is None else {**before, version: score}
        if score is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            replace_file(self._directory / RATED, msgspec.json.encode(Rated(by=by, scores=scores)))
        self._prune()
        return score is not None and best_of(scores) == version

    def _prune(self) -> None:
        known = complete_checkpoints(self._directory)
        best = best_of(_scores(known, read_rated(self._directory)))
        for old in known[: -self._keep]:
            if version_of(old) not in {best, *self._awaited}:
                os.replace(old, _unused(old))  # at once: a kill while it is removed leaves no half of it
        for old in self._directory.glob("*.replaced-*"):
            shutil.rmtree(old, ignore_errors=True)  # what somebody has open on a file server goes the next time


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in a directory that have a manifest, oldest first; their files are not looked at."""
    return [path for path in checkpoints_in(directory) if (path / "manifest.json").is_file()]


def best_of(scores: Mapping[int, float]) -> int | None:
    """Return the version that scored best, of equal ones the earliest; None where there is none.

    >>> best_of({2: 0.5, 4: 0.75, 6: 0.75})
    4
    """
    return max(scores, key=lambda version: (scores[version], -version), default=None)


def best_version(directory: Path) -> Best | None:
    """Return the version that scored best among a run's, or None where none has a score.

    Raises:
        ConfigError: what evaluations gave cannot be read.
    """
    rated, known = read_rated(directory), {version_of(path): path for path in complete_checkpoints(directory)}
    scores = rated.scores if rated else _scores([*known.values()], None)
    if (version := best_of(scores)) is None:
        return None
    by = rated.by if rated else "the mean of its steps"
    return Best(version=version, score=scores[version], by=by, checkpoint=known.get(version))


def read_rated(directory: Path) -> Rated | None:
    """Return what evaluations gave the versions of a run; None where they give nothing.

    Raises:
        ConfigError: the file is damaged.
    """
    path = directory / RATED
    if (body := read_file(path)) is None:
        return None
    try:
        return msgspec.json.decode(body, type=Rated)
    except UNREADABLE as error:
        what = f"is damaged ({error})"
        raise ConfigError(
            str(path), what, "restore it, or remove it: the versions before then have no score"
        ) from error


def forget_ratings(directory: Path, after: int) -> None:
    """Forget what versions after this one were given: the run goes on from it, and makes them again."""
    rated = read_rated(directory)
    if rated and max(rated.scores, default=0) > after:
        kept = {version: score for version, score in rated.scores.items() if version <= after}
        replace_file(directory / RATED, msgspec.json.encode(Rated(by=rated.by, scores=kept)))


def _scores(checkpoints: Iterable[Path], rated: Rated | None) -> dict[int, float]:
    """Return the scores of those checkpoints that have one."""
    found = {version_of(path): rated.scores.get(version_of(path)) if rated else _score(path) for path in checkpoints}
    return {version: score for version, score in found.items() if score is not None}


def version_of(checkpoint: Path) -> int:
    """Return the version that a checkpoint is named by."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints_in(directory: Path) -> list[Path]:
    """Return whatever has the name of a checkpoint, oldest first, damaged ones too; not a copy of another name."""
    return [path for _, path in steps_in(directory)]


def set_checkpoints_aside(directory: Path) -> None:
    """Rename every checkpoint: none is gone on from any more, and each goes once there is a new one; forget scores."""
    (directory / RATED).unlink(missing_ok=True)
    for path in checkpoints_in(directory):
        os.replace(path, _unused(path))


def damage(checkpoint: Path) -> str:
    """Return what is wrong with a checkpoint's files, or "" where every one agrees with the manifest."""
    try:
        manifest = _manifest(checkpoint)
    except ValueError as error:
        return f"manifest.json cannot be read ({error})"
    if checkpoint.name != f"step-{manifest.version:06d}":
        return f"its manifest is of version {manifest.version}"
    for name, expected in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():  # a device or a pipe might never end
            return f"{name} is {'no file' if path.exists() else 'missing'}"
        if (size := path.stat().st_size) != expected.size:
            return f"{name} has {size} bytes, written were {expected.size}"
        try:
            digest = _digest(path)
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({error})"
        if digest != expected:
            return f"{name} has {size} bytes of digest {digest.blake3[:12]}, written were {expected.blake3[:12]}"
    return ""


def strays(checkpoint: Path) -> list[str]:
    """Return the files of a checkpoint that its manifest does not name: an editor's, a file server's."""
    try:
        known = _manifest(checkpoint).files.keys()
    except ValueError:
        return []
    found = {str(path.relative_to(checkpoint)) for path in _files(checkpoint)} - {"manifest.json"}
    return sorted(found - known)


def newest_sound(directory: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files are all as they were written, and what is wrong with newer ones."""
    passed_over: list[str] = []
    for checkpoint in reversed(checkpoints_in(directory)):
        wrong = damage(checkpoint)
        if not wrong:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.name}: {wrong}")
    return None, passed_over


def read_cut(checkpoint: Path) -> bytes:
    """Return where the flow stood, as the runtime gave it.

    Raises:
        DataError: it cannot be read.
    """
    return read_file(checkpoint / "cut.json") or b""


def checkpoint_version(checkpoint: Path) -> int:
    """Return the policy version a checkpoint holds."""
    return _manifest(checkpoint).version


def write_version(directory: Path, version: int) -> None:
    """Note beside a node's state at which policy version it was saved."""
    (directory / "version.json").write_bytes(msgspec.json.encode({"version": version}))


def read_version(directory: Path) -> int:
    """Return what `write_version` noted."""
    return msgspec.json.decode((directory / "version.json").read_bytes(), type=dict[str, int])["version"]


def _manifest(checkpoint: Path) -> CheckpointManifest:
    """Read a manifest; raises ValueError where it cannot be read, or is not as it was written."""
    try:
        sealed = msgspec.json.decode(read_file(checkpoint / "manifest.json") or b"", type=Sealed)
    except (DataError, RecursionError) as error:
        raise ValueError(error.what if isinstance(error, DataError) else str(error)) from error
    if sealed.blake3 != _digest_of(sealed.manifest):
        raise ValueError("its digest does not fit")
    return sealed.manifest


def _digest_of(manifest: CheckpointManifest) -> str:
    from blake3 import blake3

    return blake3(msgspec.json.encode(manifest)).hexdigest()


def _score(checkpoint: Path) -> float | None:
    try:
        score = _manifest(checkpoint).score
    except ValueError:
        return None  # damaged: never the best
    return None if score is None or math.isnan(score) else score


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in _files(directory))


def _digest(path: Path) -> FileDigest:
    from blake3 import blake3

    hasher = blake3()
    hasher.update_mmap(path)
    return FileDigest(path.stat().st_size, hasher.hexdigest())


def _sealed(path: Path) -> FileDigest:
    """Bring a file to the disk and return its digest."""
    sync(path)
    return _digest(path)


def _unused(path: Path) -> Path:
    number = 0
    while (name := path.with_name(f"{path.name}.replaced-{number}")).exists():
        number += 1
    return name


def _no_room(directory: Path, version: int, needed: int, free: int) -> ResourceError:
    what = f"the checkpoint of version {version} needs about {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
    return ResourceError(str(directory), what, "make room on that disk; the checkpoints before it are kept")
