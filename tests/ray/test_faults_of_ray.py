"""What befalls Ray itself and the terminal of a run on it: a controlled stop or a recovery, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from flowrl.runtime.cluster import marked_processes
from flowrl.runtime.rundir import holders
from tests.contracts.test_stops import check_stopped
from tests.support.driven import Driven, Terminal

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def ray_processes(pid: int) -> dict[str, int]:
    """Return the processes of the Ray that a driver has started, by name."""
    found: dict[str, int] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found[Path(f"/proc/{child}/comm").read_text().strip()] = int(child)
    return found


def started_by(driver: int) -> list[int]:
    """Return the living processes that come of a driver's Ray."""
    return [pid for pid, mark in marked_processes() if mark.split()[1] == str(driver)]


def test_ctrl_c_during_set_up_stops_at_once(tmp_path: Path) -> None:
    run = Terminal(tmp_path / "run", runtime="ray")
    run.until("run directory")
    while not started_by(run.process.pid):
        time.sleep(0.02)
    run.look()
    run.press_ctrl_c()
    assert run.ends() == 0, run.text
    check_stopped(tmp_path / "run", with_checkpoint=False)
    assert started_by(run.process.pid) == []
    assert run.left_behind() == []


@pytest.mark.long
def test_sigterm_to_every_process_leaves_a_stop_all_its_time(tmp_path: Path) -> None:
    """As batch systems and Kubernetes send it; what is under way takes longer than the 3 s that Ray would leave it."""
    with (tmp_path / "said").open("wb") as said:
        run = Driven(tmp_path / "run", "flow.token_s=0.4", runtime="ray", start_new_session=True, stderr=said)
    run.until('"version":1,', patience_s=120)
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.ends() == 0
    check_stopped(tmp_path / "run")
    assert (tmp_path / "said").read_text() == ""


@pytest.mark.long
def test_a_killed_proxy_of_the_hub_costs_what_the_hub_s_death_costs(tmp_path: Path) -> None:
    run = Terminal(tmp_path / "run", "cluster.proxies=2", runtime="ray")
    run.until('"version":6,')
    assert "hub: is called through 2 proxies" in run.text
    logs = {os.path.basename(os.readlink(f"/proc/{pid}/fd/1")): pid for pid in holders(run.run_dir / "lock")}
    assert {"hub.log", "hub.proxy0.log", "hub.proxy1.log"} <= logs.keys()
    os.kill(logs["hub.proxy1.log"], signal.SIGKILL)
    run.until("everything starts again")
    run.until('"version":20,')
    run.press_ctrl_c()
    assert run.ends() == 0
    assert "its host's proxy1 died" in " ".join(run.text.split())
    check_stopped(tmp_path / "run")
    assert run.left_behind() == []


@pytest.mark.long
def test_a_killed_raylet_is_recovered_from_and_a_closed_terminal_stops_in_order(tmp_path: Path) -> None:
    run = Terminal(tmp_path / "run", "heartbeat_timeout_s=15", runtime="ray")
    run.until('"version":6,')
    old = holders(run.run_dir / "lock")
    assert len(old) >= 5, "hub, prompts, generator, scorer, learner"
    os.kill(ray_processes(run.process.pid)["raylet"], signal.SIGKILL)
    run.until("Ray is started again")
    run.until('"version":100,')  # long behind where it was: what had been done and not yet told is done anew
    assert not set(holders(run.run_dir / "lock")) & set(old), "a process of the attempt before lives on"
    run.hang_up()
    assert run.ends() == 0
    check_stopped(tmp_path / "run")
    assert started_by(run.process.pid) == []
    assert run.left_behind() == []
