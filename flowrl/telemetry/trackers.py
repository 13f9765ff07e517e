"""Weights & Biases and TensorBoard, for those who keep their curves there.

Both get every step's figures and the held-out score, against the policy version. `check_trackers` refuses before a run
what cannot work; once a run is under way a tracker that fails is left out with one notice (see sinks.py).
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from flowrl.config import Config
from flowrl.errors import ConfigError
from flowrl.telemetry.events import Evaluation, Step
from flowrl.telemetry.intervals import mean_interval, prompt_means

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.telemetry.events import Event

INIT_TIMEOUT_S = 30.0  # to reach the wandb service; a run should not hang at its start for a tracker
FINISH_TIMEOUT_S = 120.0  # to send what is left at the end; the figures are in metrics.jsonl all the same


class WandbConfig(Config):
    """Settings of the Weights & Biases tracker."""

    mode: Literal["off", "online", "offline"] = "off"  # offline: kept in the run directory for `wandb sync`
    project: str = "flowrl"
    name: str = ""  # of the run there; "": as it is called here


def check_trackers(wandb: WandbConfig, *, tensorboard: bool) -> None:
    """Refuse a tracker that is not installed, or that wants a login there is not.

    Raises:
        ConfigError: a tracker is asked for and its package or its API key is missing.
    """
    if wandb.mode != "off" and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb.mode", f"{wandb.mode!r} needs the package wandb", "pip install wandb, or set off")
    if wandb.mode == "online":
        _require_login()
    if tensorboard and not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        raise ConfigError("tensorboard", "needs a package", "pip install tensorboardX, or set tensorboard=false")


class WandbSink:
    """Logs figures to Weights & Biases."""

    def __init__(self, config: WandbConfig, *, run_dir: Path, title: str) -> None:
        import wandb

        mode: Any = config.mode
        if mode == "online":
            _require_login()  # or init would ask for a key in the middle of the live view
        quiet = wandb.Settings(
            silent=True,
            console="off",
            x_disable_stats=True,
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
        )
        self._run = wandb.init(
            project=config.project, name=config.name or title, dir=run_dir, mode=mode, settings=quiet
        )
        self._run.define_metric("version")
        self._run.define_metric("*", step_metric="version")

    def consume(self, events: list[Event]) -> None:
        """Log the steps and evaluations among the events."""
        for event in events:
            if figures := figures_of(event):
                self._run.log(figures)

    def close(self) -> None:
        """Send what is left and end the run there; offline, the last of the file is written as the process ends."""
        self._run.finish()


class TensorBoardSink:
    """Writes figures as TensorBoard scalars."""

    def __init__(self, directory: Path) -> None:
        self._writer = _summary_writer()(str(directory))

    def consume(self, events: list[Event]) -> None:
        """Write the steps and evaluations among the events."""
        for event in events:
            figures = figures_of(event)
            version = int(figures.pop("version", 0))
            for name, value in figures.items():
                self._writer.add_scalar(name.replace(".", "/", 1), value, version)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def figures_of(event: Event) -> dict[str, float]:
    """Return what a tracker keeps of an event: a step's figures or the held-out score, and the version."""
    match event:
        case Step():
            return {**event.metrics, "version": event.version}
        case Evaluation() if event.scores:
            interval = mean_interval(prompt_means(event.scores))
            return {"heldout.mean": interval.mean, "version": event.version}
        case _:
            return {}


def _require_login() -> None:
    import wandb

    if not wandb.login(prompt=False):
        raise ConfigError("wandb.mode", "'online' needs an API key", "run `wandb login`, or set wandb.mode=offline")


def _summary_writer() -> Any:
    if importlib.util.find_spec("tensorboardX") is not None:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    else:
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter
