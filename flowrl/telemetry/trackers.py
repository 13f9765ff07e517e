"""Weights & Biases, TensorBoard, MLflow, trackio and Prometheus, for those who keep their curves there.

All get every step's figures and the held-out score, against the policy version; W&B also a table of completions.
`check_trackers` refuses before a run what cannot work; in a run a tracker that fails is left out with one notice (see
sinks.py).

Invariant: Prometheus' figures are offered on the loopback interface only.

Tests: tests/contracts/test_trackers.py
"""

from __future__ import annotations

import importlib.util
import re
import socket
from typing import TYPE_CHECKING, Any, Literal, Protocol

from flowrl.config import Config, load_class
from flowrl.errors import ConfigError
from flowrl.telemetry.events import EdgeStatus, Evaluation, Status, Step
from flowrl.telemetry.intervals import mean_interval, prompt_means

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from flowrl.telemetry.events import Event

COLUMNS = ("prompt", "completion", "reward")  # of the table of completions
EXPERIMENT = "flowrl"
LOOPBACK = "127.0.0.1"
INIT_TIMEOUT_S = 30.0  # to reach the wandb service; a run should not hang at its start for a tracker
FINISH_TIMEOUT_S = 120.0  # to send what is left at the end; the figures are in metrics.jsonl all the same


class WandbConfig(Config):
    """Settings of the Weights & Biases tracker."""

    mode: Literal["off", "online", "offline"] = "off"  # offline: kept in the run directory for `wandb sync`
    project: str = "flowrl"  # of the run there
    name: str = ""  # of the run there; "": as it is called here


class TrackerSettings(Protocol):
    """The part of a run's settings that says where its figures go."""

    @property
    def wandb(self) -> WandbConfig: ...

    @property
    def tensorboard(self) -> bool: ...

    @property
    def mlflow(self) -> str: ...

    @property
    def trackio(self) -> str: ...

    @property
    def sinks(self) -> Mapping[str, str]: ...

    @property
    def prometheus_port(self) -> int: ...


def check_trackers(settings: TrackerSettings) -> None:
    """Refuse a tracker that is not installed, wants a login there is not or has no free port, and what is no sink.

    Raises:
        ConfigError: with the setting and what to do.
    """
    mode = settings.wandb.mode
    for setting, is_wanted, packages, off in (
        ("wandb.mode", mode != "off", ("wandb",), "off"),
        ("tensorboard", settings.tensorboard, ("tensorboardX", "tensorboard"), "false"),
        ("mlflow", bool(settings.mlflow), ("mlflow",), "''"),
        ("trackio", bool(settings.trackio), ("trackio",), "''"),
        ("prometheus_port", bool(settings.prometheus_port), ("prometheus_client",), "0"),
    ):
        if is_wanted and not any(map(_is_installed, packages)):
            raise ConfigError(setting, f"needs the package {packages[0]}", f"pip install {packages[0]}, or set {off}")
    if mode == "online":
        _require_login()
    for name, path in settings.sinks.items():
        kind = load_class(path, f"sinks.{name}")
        if not (hasattr(kind, "consume") and hasattr(kind, "close")):
            raise ConfigError(f"sinks.{name}", f"{path} is no sink", "give it the methods consume(events) and close()")
    if settings.prometheus_port:
        try:
            socket.create_server((LOOPBACK, settings.prometheus_port)).close()
        except OSError as error:
            what = f"{settings.prometheus_port} cannot be listened on ({error.strerror})"
            raise ConfigError("prometheus_port", what, "choose another port") from error


def add_trackers(settings: TrackerSettings, sinks: TrackerSinks, *, run_dir: Path, title: str) -> None:
    """Open the trackers that the settings ask for."""
    if settings.wandb.mode != "off":
        sinks.add("wandb", lambda: WandbSink(settings.wandb, run_dir=run_dir, title=title))
    if settings.tensorboard:
        sinks.add("tensorboard", lambda: TensorBoardSink(run_dir / "tensorboard"))
    if settings.mlflow:
        sinks.add("mlflow", lambda: MlflowSink(settings.mlflow, title=title))
    if settings.trackio:
        sinks.add("trackio", lambda: TrackioSink(settings.trackio, title=title))
    if settings.prometheus_port:
        sinks.add("prometheus", lambda: PrometheusSink(settings.prometheus_port))


class TrackerSinks(Protocol):
    """What trackers are added to."""

    def add(self, name: str, open_sink: Callable[[], Any]) -> None: ...


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
                self._run.log({**figures, **self._table_of(event)})

    def _table_of(self, event: Event) -> dict[str, Any]:
        """Return an evaluation's completions as a table."""
        import wandb

        if not isinstance(event, Evaluation) or not event.completions:
            return {}
        rows: list[Any] = [[event.version, *(row.get(name, "") for name in COLUMNS)] for row in event.completions]
        return {"heldout.completions": wandb.Table(columns=["version", *COLUMNS], data=rows)}

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


class MlflowSink:
    """Logs figures to MLflow, as metrics of a run in the experiment "flowrl"."""

    def __init__(self, uri: str, *, title: str) -> None:
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._client: Any = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(EXPERIMENT)
        self._run: str = self._client.create_run(experiment, run_name=title).info.run_id

    def consume(self, events: list[Event]) -> None:
        """Log the steps and evaluations among the events."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        for event in events:
            figures = figures_of(event)
            version = int(figures.pop("version", 0))
            now_ms = int(getattr(event, "time_s", 0.0) * 1000)
            metrics = [Metric(name, value, now_ms, version) for name, value in figures.items()]
            if metrics:
                self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """End the run there."""
        self._client.set_terminated(self._run)


class TrackioSink:
    """Logs figures to trackio, which keeps them on this machine."""

    def __init__(self, project: str, *, title: str) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._run: Any = trackio.init(project=project, name=title)

    def consume(self, events: list[Event]) -> None:
        """Log the steps and evaluations among the events."""
        for event in events:
            figures = figures_of(event)
            if figures:
                self._run.log(figures, step=int(figures["version"]))

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class PrometheusSink:
    """Offers the newest figures to Prometheus, at http://127.0.0.1:PORT/metrics."""

    def __init__(self, port: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._registry = CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._server, self._thread = start_http_server(port, addr=LOOPBACK, registry=self._registry)

    def consume(self, events: list[Event]) -> None:
        """Take in the figures of steps and evaluations, and the state of replicas and edges."""
        for event in events:
            for name, value in figures_of(event).items():
                self._set(name, value)
            match event:
                case Status():
                    where = {"replica": f"{event.node}.{event.replica}"}
                    self._set("groups_done", event.done, **where)
                    self._set("requests_running", event.running, **where)
                    for cause, seconds in event.seconds.items():
                        self._set("seconds", seconds, **where, cause=cause)
                case EdgeStatus():
                    self._set("edge_items", event.items, edge=event.edge)
                    self._set("edge_bytes", event.size_bytes, edge=event.edge)
                case _:
                    pass

    def _set(self, name: str, value: float, **labels: str) -> None:
        from prometheus_client import Gauge

        plain = "flowrl_" + re.sub(r"\W", "_", name)
        if plain not in self._gauges:
            self._gauges[plain] = Gauge(plain, name, list(labels), registry=self._registry)
        gauge = self._gauges[plain]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def figures_of(event: Event) -> dict[str, float]:
    """Return what a tracker keeps of an event: a step's figures or the held-out score, and the version."""
    match event:
        case Step():
            return {**event.metrics, "version": event.version}
        case Evaluation() if event.scores or event.sets or event.tasks:
            told = {"heldout.mean": event.scores, **{f"heldout.{name}.mean": each for name, each in event.sets.items()}}
            means = {name: mean_interval(found).mean for name, each in told.items() if (found := prompt_means(each))}
            tasks = {f"tasks.{name}": bounds.value for name, bounds in event.tasks.items()}
            return {**means, **tasks, "version": event.version}
        case _:
            return {}


def _require_login() -> None:
    import wandb

    if not wandb.login(prompt=False):
        raise ConfigError("wandb.mode", "'online' needs an API key", "run `wandb login`, or set wandb.mode=offline")


def _is_installed(package: str) -> bool:
    """Say whether a package can be imported; a mere directory of its name in the working directory is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _summary_writer() -> Any:
    if _is_installed("tensorboardX"):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    else:
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter
