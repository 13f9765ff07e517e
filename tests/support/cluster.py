"""Machines made of namespaces: each has its own network, processes, host name, /tmp and /dev/shm, joined by a switch.

`machines(n)` yields them and takes everything down again, whatever happened: each machine lives in a process namespace,
whose end ends all that ran on it. Invariants: a machine reaches the others by its address alone (10.77.0.1, ...) and
knows its own name as 127.0.1.1, as Debian has it; every file outside /tmp and /dev/shm is the same one everywhere, as
on a shared disk. Needs root; `hindrance` says why it does not work here.

    with machines(2) as (head, other):
        head.start_ray()
        other.start_ray(head)
        head.run([sys.executable, "-m", "flowrl", "run", ..., "--address", head.ray])
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.support.command import ROOT

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from types import TracebackType

NETWORK = "10.77.0"
PORT = 6379  # of Ray's head
START_S = 90.0
ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}
NAMESPACES = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
# The first process of a machine takes in what others leave behind; the machine ends with it.
FURNISH = """
mount -t tmpfs tmp /tmp && mount -t tmpfs shm /dev/shm && hostname {name}
printf '127.0.0.1 localhost\\n{names}' > /tmp/.hosts && mount --bind /tmp/.hosts /etc/hosts
ip link set lo up
echo furnished
sleep infinity & wait
"""


def hindrance() -> str:
    """Return why this process cannot make machines; "": it can."""
    hidden = [each for each in (ROOT, Path(sys.prefix)) if Path("/tmp") in each.resolve().parents]
    if hidden:
        return f"{hidden[0]} lies in /tmp, which each machine has for itself"
    try:
        tried = "mount -t tmpfs tmp /tmp && ip link add switch type bridge && ip link add one type veth peer name two"
        done = subprocess.run(["unshare", *NAMESPACES, "bash", "-c", tried], capture_output=True)
    except OSError as error:
        return f"unshare cannot be run ({error.strerror})"
    return "network and mount namespaces cannot be made: they need root" if done.returncode else ""


class Machine:  # of the tests; what Ray knows of one is a RayNode
    """One of them; until `stop`."""

    def __init__(self, number: int, switch: int, *, is_known: bool = True) -> None:
        """Switch it on; `switch` is a process in the switch's network, `is_known` whether its own name resolves."""
        self.number = number
        self.address = f"{NETWORK}.{number}"
        self.name = f"machine{number}"
        self._switch = switch
        self._port = f"port{number}"
        names = f"127.0.1.1 {self.name}\\n" if is_known else ""
        command = ["unshare", *NAMESPACES, "bash", "-c", FURNISH.format(name=self.name, names=names)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                         start_new_session=True)  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "furnished\n", f"{self.name} cannot be furnished"
        self._first = int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text())
        self._started: list[subprocess.Popen[Any]] = []
        _run("ip", "link", "add", self._port, "netns", str(switch), "type", "veth",
             "peer", "name", "eth0", "netns", str(self._first))  # fmt: skip
        _within(switch, "ip", "link", "set", self._port, "master", "switch", "up")
        self._do("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self._do("ip", "link", "set", "eth0", "up")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def is_on(self) -> bool:
        """Return whether it has not been switched off."""
        return self._process.poll() is None

    @property
    def ray(self) -> str:
        """Return the address of the Ray whose head this machine is."""
        return f"{self.address}:{PORT}"

    def start(self, command: Sequence[str], *, log: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        """Start a command on the machine, from the checkout; it ends with the machine."""
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **ENVIRONMENT, **environment}
        within = ["nsenter", "-t", str(self._first), "-n", "-m", "-u", "-p", f"--wdns={ROOT}"]
        with contextlib.nullcontext(subprocess.PIPE) if log is None else log.open("w") as output:
            started = subprocess.Popen([*within, *command], text=True, env=variables, stdout=output,
                                       stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        self._started.append(started)
        return started

    def run(self, command: Sequence[str], *, within_s: float = 120.0) -> tuple[int, str]:
        """Return how a command on the machine ended and what it said."""
        started = self.start(command)
        try:
            said, _ = started.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            said, _ = started.communicate()
            raise AssertionError(f"{' '.join(command)}: not done after {within_s:.0f} s:\n{said}") from None
        return started.returncode, said

    def start_ray(
        self, head: Machine | None = None, *, cpus: float = 1, gpus: int = 0, environment: Mapping[str, str] = {},
        is_waited_for: bool = True,
    ) -> subprocess.Popen[str]:  # fmt: skip
        """Let the machine be the head of a cluster, or join that of `head`; returns what ends with its Ray."""
        joins = ["--address", head.ray] if head else ["--head", f"--port={PORT}", "--include-dashboard=false"]
        command = [f"{Path(sys.executable).parent}/ray", "start", *joins, "--block", f"--num-cpus={cpus:g}",
                   f"--node-ip-address={self.address}", "--object-store-memory=100000000",
                   "--disable-usage-stats", *([f"--num-gpus={gpus}"] if gpus else [])]  # fmt: skip
        log = Path(f"/proc/{self._first}/root/tmp/ray.log")
        started = self.start(command, log=log, **environment)
        deadline_s = time.monotonic() + START_S
        while is_waited_for and "Ray runtime started" not in log.read_text():
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)
        return started

    def file(self, path: str) -> Path:
        """Return a path by which a file of the machine, in /tmp for one, is reached from here."""
        return Path(f"/proc/{self._first}/root{path}")

    def processes(self) -> dict[int, str]:
        """Return the machine's processes, by the ids they have here, and their command lines."""
        mine = os.readlink(f"/proc/{self._first}/ns/pid")
        found: dict[int, str] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if os.readlink(entry / "ns/pid") == mine:
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send every process of the machine a signal: SIGSTOP is a machine that stands still."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                if pid != self._first:
                    os.kill(pid, number)
        for started in self._started:  # what brought a command here stops with it, and goes on only by itself
            if number == signal.SIGCONT and started.poll() is None:
                started.send_signal(number)

    def cut(self) -> None:
        """Pull the machine's cable."""
        _within(self._switch, "ip", "link", "set", self._port, "down")

    def restore(self) -> None:
        """Put it back."""
        _within(self._switch, "ip", "link", "set", self._port, "up")

    def _do(self, *command: str) -> None:
        _within(self._first, *command)

    def stop(self) -> None:
        """Switch the machine off."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._first, signal.SIGKILL)
        self._process.wait(20)
        assert self._process.stdout is not None
        self._process.stdout.close()
        for started in self._started:
            started.wait(20)
            if started.stdout is not None:
                started.stdout.close()


@contextlib.contextmanager
def machines(count: int, **options: Any) -> Generator[list[Machine]]:
    """Yield so many machines at one switch."""
    with contextlib.ExitStack() as held:
        switch = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], start_new_session=True)
        held.callback(switch.wait)
        held.callback(switch.kill)
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{switch.pid}/ns/net") == own:
            time.sleep(0.01)
        _within(switch.pid, "ip", "link", "add", "switch", "type", "bridge")
        _within(switch.pid, "ip", "link", "set", "switch", "up")
        yield [held.enter_context(Machine(number, switch.pid, **options)) for number in range(1, count + 1)]


def _within(process: int, *command: str) -> None:
    _run("nsenter", "-t", str(process), "-n", *command)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
