# SPDX-License-Identifier: GPL-2.0-or-later
"""A run of ci/verify that is killed or interrupted leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fixtures.hosts.base import TOKEN
from fixtures.waiting import DeadlineError, until
from images.cache import Cache

ROOT = Path(__file__).parents[2]
CHEAP = "test_takeover and msix:8 and config_space and not exec"

pytestmark = pytest.mark.xdist_group("killed")  # one at a time: each boots a lab host


class Run:
    """``python -m fixtures.verify`` in a session of its own, and all that it starts.

    Whatever descends from it, however it has detached itself, carries a mark of ours in its
    environment.
    """

    def __init__(self, cache: Cache, place: Path, *arguments: str) -> None:
        self._mark = f"VFIO_CPR_TEST={secrets.token_hex(8)}"
        self._tokens: set[bytes] = set()
        self.log = place / "output"
        self.verdict = place / "verdict.json"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "fixtures.verify", "-q", "-k", CHEAP),
                    *("--cache", str(cache.root), "--evidence", str(place / "evidence")),
                    *("--verdict-json", str(self.verdict), *arguments),
                ],
                cwd=ROOT,
                env={**os.environ, **dict([self._mark.split("=")])},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def members(self) -> list[int]:
        """The pids of the processes there are now."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = entry.read_bytes()
            except OSError:
                continue  # it has just ended
            if self._mark.encode() in environment:
                found.append(int(entry.parent.name))
                self._tokens.update(re.findall(rf"{TOKEN}=(\w+)".encode(), environment))
        return found

    def lab_hosts(self) -> list[int]:
        """The QEMUs among them that are lab hosts."""
        return [pid for pid in self.members() if b"vmlinuz" in _command(pid)]

    def directories(self) -> list[Path]:
        """What there is now of the directories of hosts whose processes have been seen."""
        paths = [
            Path(parent) / f"vfio-cpr-{token.decode()}"
            for token in self._tokens
            for parent in ("/tmp", "/dev/shm")
        ]
        return [path for path in paths if path.exists()]

    def await_lab_host(self) -> int:
        """The pid of its first lab host, once that runs."""

        def ended() -> str | None:
            if self.process.poll() is None:
                return None
            return f"the run has ended: {self.log.read_text(errors='replace')}"

        return until(self.lab_hosts, "a lab host", 120, pause_s=0.05, but=ended)[0]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def start(cache: Cache, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs = []

    def begin(*arguments: str) -> Run:
        runs.append(Run(cache, tmp_path, *arguments))
        return runs[-1]

    yield begin
    for run in runs:
        # After a failure.  Its guardians, which are in sessions of their own, clear up.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()
        with contextlib.suppress(DeadlineError):
            until(lambda r=run: not r.members(), "its guardians", 20, pause_s=0.05)
        for pid in run.members():
            os.kill(pid, signal.SIGKILL)


def kill(run: Run) -> None:
    run.process.kill()


def interrupt(run: Run) -> None:
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(("end", "status"), [(kill, -signal.SIGKILL), (interrupt, 130)])
def test_nothing_outlives_a_run_that_is_ended_while_its_lab_host_boots(
    start: Callable[..., Run], workers: str, end: Callable[[Run], None], status: int
) -> None:
    run = start("-n", workers)
    run.await_lab_host()
    assert run.directories()
    end(run)
    assert run.process.wait(60) == status
    until(lambda: not run.members(), "its processes to end", 60, pause_s=0.05)
    assert run.directories() == []
    if status == 130:
        assert "Traceback" not in run.log.read_text()


def test_a_killed_worker_is_replaced_and_does_not_pass_for_a_failure_of_qemu(
    start: Callable[..., Run],
) -> None:
    run = start("-n", "2")
    lab = run.await_lab_host()
    directories = run.directories()
    os.kill(_parent(lab), signal.SIGKILL)
    until(lambda: lab not in run.members(), "its lab host to end", 60, pause_s=0.05)
    until(
        lambda: not any(path.exists() for path in directories),
        "its directories to go",
        60,
        pause_s=0.05,
    )
    assert run.process.wait(300) == 3, run.log.read_text()
    cases = json.loads(run.verdict.read_text())["cases"]
    assert [case["result"] for case in cases] == ["error"]
    until(lambda: not run.members(), "the last of its processes to end", 60, pause_s=0.05)
    assert run.directories() == []


def test_the_next_run_is_none_the_worse_for_it(start: Callable[..., Run]) -> None:
    run = start("-n", "1")
    run.await_lab_host()
    assert run.process.wait(300) == 0, run.log.read_text()
    assert "GOOD: 1 ok" in run.log.read_text()
    until(lambda: not run.members(), "the last of its processes to end", 60, pause_s=0.05)
    assert run.directories() == []
