# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that is a place of labgrid is acquired, and released whatever happens.

The coordinator is a real one.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.labs import labgrid
from fixtures.labs.inventory import Host
from fixtures.labs.labgrid import Place, client
from fixtures.labs.lease import BusyError
from fixtures.labs.machine import LabMachine
from fixtures.waiting import until
from images.errors import EnvironmentFault

ROOT = Path(__file__).parents[2]
COORDINATOR = Path(sys.executable).with_name("labgrid-coordinator")

pytestmark = pytest.mark.xdist_group("labgrid")  # the coordinator is one for all


class Coordinator:
    """labgrid's, with one place."""

    def __init__(self, address: str) -> None:
        self.address = address

    def client(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*client("rack3", self.address), *words], capture_output=True, text=True, timeout=60
        )

    @property
    def holder(self) -> str:
        """Who has the place, as ``labgrid-client show`` has it."""
        said = self.client("show").stdout
        (line,) = [line for line in said.splitlines() if line.strip().startswith("acquired:")]
        return line.partition(":")[2].strip()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    if not COORDINATOR.exists():
        pytest.skip("labgrid is not installed (ci/requirements-dev.txt has it)")
    place = tmp_path_factory.mktemp("labgrid")  # where it keeps its places
    found = Coordinator(f"127.0.0.1:{_free_port()}")
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            [COORDINATOR, "-l", found.address], cwd=place, stdout=log, stderr=log
        )
    try:
        until(
            lambda: found.client("create").returncode == 0, "labgrid's coordinator to answer", 60.0
        )
        yield found
    finally:
        process.terminate()
        process.wait(30)


def test_a_place_is_acquired_until_it_is_released(coordinator: Coordinator) -> None:
    place = Place("rack3", "rack3", coordinator.address)
    assert coordinator.holder.startswith(socket.gethostname())
    place.release()
    assert coordinator.holder == "None"
    place.release()


def test_what_somebody_has_is_busy(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setenv("LG_USERNAME", "somebody")
        assert coordinator.client("acquire").returncode == 0
    with pytest.raises(BusyError, match=r"rack3: place rack3 .*already acquired by .*somebody"):
        Place("rack3", "rack3", coordinator.address)
    assert coordinator.holder.endswith("/somebody"), "it is still theirs"
    assert coordinator.client("release", "--kick").returncode == 0


def test_it_is_released_when_its_holder_is_killed(coordinator: Coordinator) -> None:
    script = (
        "import time; from fixtures.labs.labgrid import Place; "
        f"place = Place('rack3', 'rack3', {coordinator.address!r}); print('held', flush=True); "
        "time.sleep(60)"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environ
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        assert coordinator.holder != "None"
        holder.send_signal(signal.SIGKILL)
    until(lambda: coordinator.holder == "None", "the place to be released", 30.0)


def test_it_is_released_where_the_host_cannot_be_reached(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    for name in ("key", "known_hosts"):
        (tmp_path / name).touch()
    host = Host(
        name="rack3",
        address="127.0.0.1",
        port=_free_port(),
        key=tmp_path / "key",
        known_hosts=tmp_path / "known_hosts",
        labgrid="rack3",
        coordinator=coordinator.address,
    )
    with pytest.raises(EnvironmentFault, match="rack3: key"):
        LabMachine(host, [])
    assert coordinator.holder == "None"


def test_who_has_released_it_meanwhile_is_told_of(coordinator: Coordinator) -> None:
    place = Place("rack3", "rack3", coordinator.address)
    assert coordinator.client("release").returncode == 0
    with pytest.raises(EnvironmentFault, match=r"could not be released: .*is not acquired"):
        place.release()


@pytest.mark.usefixtures("coordinator")
def test_a_coordinator_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labgrid, "CLIENT_S", 5)
    with pytest.raises(EnvironmentFault, match="rack3: place rack3 of labgrid could not be acq"):
        Place("rack3", "rack3", f"127.0.0.1:{_free_port()}")


def test_a_place_that_is_not_there_is_told(coordinator: Coordinator) -> None:
    with pytest.raises(EnvironmentFault, match=r"could not be acquired: .*nowhere"):
        Place("rack3", "nowhere", coordinator.address)


def test_without_labgrid_it_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labgrid, "CLIENT", "no-labgrid-client")
    with pytest.raises(EnvironmentFault, match="is not there: pip install labgrid"):
        Place("rack3", "rack3")
