"""Another user of the machine neither reads what lets one into a run nor is heard by its listeners."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from flowrl.engines.weights.shm import ShmSender
from flowrl.runtime.cluster import Cluster
from flowrl.stages.learner import Learner
from tests.contracts.test_hostile_wire import listening
from tests.support.command import ROOT
from tests.support.flows import ENDLESS, flow

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs to be root"),
]


def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, user="nobody", group="nogroup", extra_groups=[], cwd="/", capture_output=True, text=True
    )


@pytest.fixture
def home() -> Iterator[Path]:
    """A home that others may look into, as many are; pytest's own directories are closed to them as a whole."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        (Path(directory) / "open").write_text("seen")
        assert as_nobody("cat", f"{directory}/open").stdout == "seen", "else the test would prove nothing"
        yield Path(directory)


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "left open by Ray"])
def test_rays_token_is_its_owners(home: Path, is_there: bool) -> None:
    token = home / ".ray" / "auth_token"
    if is_there:
        token.parent.mkdir(mode=0o755)
        token.write_text("a" * 64)
        token.chmod(0o644)
        assert as_nobody("cat", str(token)).stdout == "a" * 64
    code = "import os; os.umask(0); from flowrl.runtime import cluster; cluster._keep_token_private()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "HOME": str(home)}, cwd=ROOT, check=True)
    assert len(token.read_text()) == 64
    tried = as_nobody("cat", str(token))
    assert (tried.returncode, tried.stdout) == (1, "")
    assert "Permission denied" in tried.stderr


def test_weights_in_shared_memory_are_their_owners(home: Path) -> None:
    sender = ShmSender("learner", bucket_bytes=1 << 20, root=home)
    sender.publish(0, [("weight", torch.zeros(8))])
    try:
        (path,) = home.glob("flowrl-weights-*/0.weights")
        assert "Permission denied" in as_nobody("cat", str(path)).stderr
        assert path.stat().st_mode & 0o077 == 0
    finally:
        sender.close()


def test_who_does_not_know_the_secret_is_not_heard() -> None:
    code = "exec 3<>/dev/tcp/127.0.0.1/$0 && head -c 64 /dev/zero >&3 && echo said && cat <&3"

    async def body() -> str:
        async with listening() as (f, address):
            tried = await asyncio.to_thread(as_nobody, "bash", "-c", code, str(address.port))
            assert f.waits() == []
            return tried.stdout

    assert asyncio.run(body()) == "said\n"


INTRUDER = """
import os, pwd, sys
from ray._raylet import GcsClient  # before the home directory that Python lives in is closed to it

address, name = sys.argv[1:]
user = pwd.getpwnam(name)
os.setgroups([])
os.setgid(user.pw_gid)
os.setuid(user.pw_uid)
try:
    print(GcsClient(address=address).internal_kv_put(b"key", b"value", True, b"space"), flush=True)
except Exception as error:
    print(type(error).__name__, str(error)[:200], flush=True)
os._exit(0)
"""


@pytest.mark.ray
@pytest.mark.long
def test_a_runs_ray_takes_no_call_without_its_token() -> None:
    import ray

    with Cluster(flow(ENDLESS, Learner), None):
        address = ray.get_runtime_context().gcs_address

        def tries(name: str, **environment: str) -> str:
            told = {**os.environ, **environment}
            return subprocess.run([sys.executable, "-c", INTRUDER, address, name], env=told, cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60.0).stdout  # fmt: skip

        assert tries("root") == "1\n", "its owner is heard, else the test would prove nothing"
        for way in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
            assert "InvalidAuthToken" in tries("nobody", HOME="/nonexistent", **way)
