"""Export: one checkpoint of a run as a directory that needs nothing of flowrl.

From a run, the newest sound checkpoint, the one of a version or the one that scored best; from a checkpoint, itself;
from an adapter in peft's format, its base model with the adapter merged in. A checkpoint's `model/` is plain weights
whatever was trained (full weights, adapters, a value or reward head), so exporting copies it.

Invariants:
- every file of a checkpoint is held against its digest before any of it is used;
- OUT is a whole model or not there.

Called by `flowrl export`.

Tests: tests/graphs/test_export.py
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from flowrl.data.adapters import is_adapter
from flowrl.data.models import inspect_model, prepare_model
from flowrl.engines.checkpoint import best_version, checkpoint_version, complete_checkpoints, damage, newest_sound
from flowrl.errors import ConfigError, ResourceError
from flowrl.runs.model_card import adapter_card, loading_of, merged_card, model_card

if TYPE_CHECKING:
    from collections.abc import Callable

    Say = Callable[[str], None]


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for."""

    source: Path  # a run, one of its checkpoints, or an adapter
    out: Path
    version: int | None = None  # of the checkpoint; None: the newest
    best: bool = False  # of the run's checkpoints the one that scored best
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""  # "": as it was saved
    adapter: bool = False  # only the adapter, in peft's format
    node: str = ""  # whose model: that of another trained node, such as "critic"; "": the learner's


def export(request: ExportRequest, *, say: Say) -> None:
    """Write what was asked for into `request.out`, and say what it is and how to load it.

    Raises:
        ConfigError: there is nothing to export, it is damaged, or the directory to write holds something.
        ResourceError: it could not be written.
    """
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise ConfigError(str(request.out), "is not an empty directory", "choose another to export to")
    if request.adapter and request.dtype:
        raise ConfigError("--dtype", "an adapter is written as it was saved", "leave --dtype or --adapter out")
    source, card = _from_adapter(request, say) if is_adapter(request.source) else _from_checkpoint(request, say)
    aside = request.out.with_name(f".{request.out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, aside)
        if request.dtype:
            from flowrl.engines.publishing import cast_saved

            cast_saved(aside, request.dtype)
        (aside / "README.md").write_text(card)
        os.replace(aside, request.out)
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise ResourceError(str(request.out), what, "make room, or choose another directory") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _describe(request.out, say)


def best_of_run(request: ExportRequest, say: Say) -> int:
    """Return the version of a run that scored best.

    Raises:
        ConfigError: there is none, or it is the model that the run began with.
    """
    if request.version is not None:
        raise ConfigError("--best", "and --version name two versions", "leave one of them out")
    if (request.source / "manifest.json").is_file():
        raise ConfigError("--best", f"{request.source} is one checkpoint", "name the run's directory")
    best = best_version(request.source / "checkpoints")
    if best is None:
        raise ConfigError("--best", f"no version of {request.source} has a score{_inventory(request.source)}")
    if best.version == 0:
        what = f"is version 0, the model that the run began with ({best.by} {best.score:.4g}): no other has more"
        raise ConfigError("--best", what, f"take that model, or one of these by --version{_inventory(request.source)}")
    say(f"version {best.version} scored best: {best.by} {best.score:.4g}")
    return best.version


def choose_checkpoint(source: Path, version: int | None, say: Say) -> Path:
    """Return the checkpoint to export, every file of which agrees with its manifest.

    Raises:
        ConfigError: there is none, or it is not whole.
    """
    if (source / "manifest.json").is_file():
        chosen = source
        if version is not None and version != checkpoint_version(chosen):
            raise ConfigError("--version", f"{chosen} is not of version {version}", "name the run's directory instead")
    elif version is not None:
        chosen = source / "checkpoints" / f"step-{version:06d}"
        if chosen not in complete_checkpoints(chosen.parent):
            raise ConfigError(str(source), f"has no complete checkpoint of version {version}{_inventory(source)}")
    else:
        found, passed_over = newest_sound(source / "checkpoints")
        if found is None:
            raise ConfigError(str(source), f"has no complete checkpoint{_inventory(source)}")
        for text in passed_over:
            say(f"passing over {text}")
        return found
    if wrong := damage(chosen):
        raise ConfigError(str(chosen), f"is not as it was written: {wrong}", "export another version")
    return chosen


def _inventory(run: Path) -> str:
    """Return which checkpoints a run has, the torn ones with what is wrong with them."""
    directory = run / "checkpoints"
    complete = complete_checkpoints(directory)
    wrong = {path.name: damage(path) for path in complete}
    unfinished = [path for pattern in ("step-*", ".step-*.partial") for path in sorted(directory.glob(pattern))]
    torn = [f"{name} ({what})" for name, what in wrong.items() if what]
    torn += [f"{path.name} (not finished)" for path in unfinished if path not in complete]
    sound = [name for name, what in wrong.items() if not what]
    has = f"; complete: {', '.join(sound)}" if sound else ""
    return f"{has}; torn: {', '.join(torn)}" if torn else has or f", nothing in {directory}"


def _from_checkpoint(request: ExportRequest, say: Say) -> tuple[Path, str]:
    """Return the directory to copy and the card to put in it."""
    version = best_of_run(request, say) if request.best else request.version
    checkpoint = choose_checkpoint(request.source, version, say)
    say(f"{checkpoint}: every file is as it was written")
    directory = checkpoint / request.node
    if not (directory / "model").is_dir():
        remedy = f"run it with {request.node}.save_model=true, or name another node"
        raise ConfigError("--node", f"{checkpoint} has no model of {request.node!r}", remedy)
    if not request.adapter:
        return directory / "model", model_card(checkpoint, request.node)
    if not (directory / "adapter").is_dir():
        raise ConfigError("--adapter", f"{directory} has none: every weight was trained", "leave --adapter out")
    return directory / "adapter", adapter_card(checkpoint, request.node)


def _from_adapter(request: ExportRequest, say: Say) -> tuple[Path, str]:
    given = {"--adapter": request.adapter, "--version": request.version is not None, "--node": request.node,
             "--best": request.best}  # fmt: skip
    for option in (name for name, is_given in given.items() if is_given):
        raise ConfigError(option, f"{request.source} is an adapter itself and not a run", "leave it out")
    return prepare_model(str(request.source), say=say), merged_card(request.source)


def _describe(out: Path, say: Say) -> None:
    size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(f"wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))} ({size_bytes / 2**20:.1f} MiB)")
    if (out / "adapter_config.json").is_file():
        say(f'load it with PeftModel.from_pretrained(base, "{out}")')
        return
    card = inspect_model(out)
    kind = "SequenceClassification" if card.architecture.endswith("SequenceClassification") else "CausalLM"
    say(f"{card.architecture}, {card.num_parameters:,} parameters in {card.dtype}")
    say(loading_of(out).replace("DIRECTORY", str(out)))
    if kind == "CausalLM":
        say(f"serve it with vllm serve {out}")
