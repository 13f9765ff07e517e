"""Settings that every graph has, whatever its topology: the run's seed, name, limits and trackers.

A graph file's `Settings` extends `RunSettings`; the runtimes and the CLI read only these fields of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from flowrl.config import Config, Meta
from flowrl.telemetry.trackers import WandbConfig


class RunSettings(Config):
    """What a run needs to know besides its graph."""

    seed: int = 0  # data order, sampling and initialisation follow from it
    runtime: Literal["ray", "local"] = "ray"  # processes as Ray actors, or tasks of one process
    stall_timeout_s: Annotated[float, Meta(gt=0)] = 1800.0  # nothing moves on any edge for so long: stop and say why
    heartbeat_timeout_s: Annotated[float, Meta(gt=0)] = 60.0  # a replica not heard from for so long is replaced
    stop_grace_s: Annotated[float, Meta(gt=0)] = 600.0  # a stop by Ctrl-C, SIGTERM or SIGHUP may take so long
    max_restarts: Annotated[int, Meta(ge=0)] = 3  # of one node, or from a checkpoint, with no learned step between
    # node -> port -> depth of the queue into it, where it is to differ from the graph file's: depths.reward.rollouts=32
    depths: dict[str, dict[str, Annotated[int, Meta(ge=1)]]] = {}
    needs: dict[str, str] = {}  # directories that other runs make -> the command that makes each
    hints: bool = True  # say while the run goes on which setting would make it quicker
    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = False  # curves into the run directory, for `tensorboard --logdir`
    mlflow: str = ""  # tracking URI such as sqlite:///mlflow.db; "": none
    trackio: str = ""  # project there; "": none
    prometheus_port: Annotated[int, Meta(ge=0, le=65535)] = 0  # figures at http://127.0.0.1:PORT/metrics; 0: none
