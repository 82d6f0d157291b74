# SPDX-License-Identifier: GPL-2.0-or-later
"""A run of ci/verify that is killed or interrupted leaves nothing behind.

It is killed at chosen moments, and 50 times at random ones: pytest, a worker, a lab host, sshd.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fixtures.hosts.base import TOKEN
from fixtures.waiting import DeadlineError, until
from images.cache import Cache

ROOT = Path(__file__).parents[2]
CHEAP = ("-k", "test_takeover and msix:8 and config_space and not exec")

#: Flags of a process in its stat (Linux, include/linux/sched.h).
PF_EXITING, PF_KTHREAD = 0x4, 0x200000

#: One at a time: each boots a lab host.
IN_TURN = pytest.mark.xdist_group("killed")
#: Beside these.
BESIDE = pytest.mark.xdist_group("killed beside")


class Run:
    """``python -m fixtures.verify`` in a session of its own, and all that it starts.

    Whatever descends from it, however it has detached itself, carries a mark of ours in its
    environment.

    :param module: what to start instead of it.
    """

    def __init__(
        self, cache: Cache, place: Path, *arguments: str, module: str = "fixtures.verify"
    ) -> None:
        self._mark = f"VFIO_CPR_TEST={secrets.token_hex(8)}"
        self._tokens: set[bytes] = set()
        self.log = place / "output"
        self.verdict = place / "verdict.json"
        self.verdict.unlink(missing_ok=True)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", module, "-q"),
                    *("--cache", str(cache.root), "--evidence", str(place / "evidence")),
                    *("--verdict-json", str(self.verdict), *arguments),
                ],
                cwd=ROOT if module == "fixtures.verify" else place,
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
                    "PYTHONPATH": str(ROOT),
                    **dict([self._mark.split("=")]),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """That of the process that controls the run."""
        return self.process.pid

    def members(self) -> list[int]:
        """The pids of the processes there are now."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            environment = _environment(entry)
            if self._mark.encode() in environment:
                found.append(int(entry.name))
                # A guardian has it on its command line, before there are any directories.
                told = environment + _command(found[-1])
                tokens = re.findall(rf"(?:{TOKEN}=|vfio-cpr-)(\w{{16}})".encode(), told)
                self._tokens.update(tokens)
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

    def cases(self) -> list[dict[str, Any]]:
        """What its verdict says of each."""
        return json.loads(self.verdict.read_text())["cases"]  # type: ignore[no-any-return]

    def workers(self) -> list[int]:
        """Those of xdist."""
        return [pid for pid in self.members() if _parent(pid) == self.pid and _is_worker(pid)]

    def await_lab_host(self, but: Set[int] = frozenset()) -> int:
        """The pid of a lab host of its, once that runs.

        :param but: those that are not meant.
        """

        def ended() -> str | None:
            if self.process.poll() is None:
                return None
            return f"the run has ended: {self.log.read_text(errors='replace')}"

        return until(
            lambda: set(self.lab_hosts()) - but, "a lab host", 120, pause_s=0.05, but=ended
        ).pop()


def _environment(process: Path) -> bytes:
    """That of a process that lives.  One that is just being executed has none for a moment."""
    with contextlib.suppress(OSError):  # it has just ended
        for _ in range(1000):
            if environment := (process / "environ").read_bytes():
                return environment
            state, *fields = (process / "stat").read_text().rpartition(")")[2].split()
            if state in "ZX" or int(fields[5]) & (PF_EXITING | PF_KTHREAD):
                break
    return b""


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _is_worker(pid: int) -> bool:
    return b"exec(eval(sys.stdin.readline()))" in _command(pid)  # execnet's first words


@pytest.fixture
def start(cache: Cache, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs = []

    def begin(*arguments: str, module: str = "fixtures.verify") -> Run:
        runs.append(Run(cache, tmp_path, *arguments, module=module))
        return runs[-1]

    yield begin
    for run in runs:
        # After a failure.  Its guardians, which are in sessions of their own, clear up.
        if run.process.poll() is None:
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


@IN_TURN
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(("end", "status"), [(kill, -signal.SIGKILL), (interrupt, 130)])
def test_nothing_outlives_a_run_that_is_ended_while_its_lab_host_boots(
    start: Callable[..., Run], workers: str, end: Callable[[Run], None], status: int
) -> None:
    run = start("-n", workers, *CHEAP)
    run.await_lab_host()
    assert run.directories()
    end(run)
    assert run.process.wait(60) == status
    until(lambda: not run.members(), "its processes to end", 60, pause_s=0.05)
    assert run.directories() == []
    if status == 130:
        assert "Traceback" not in run.log.read_text()


@IN_TURN
def test_a_killed_worker_is_replaced_and_does_not_pass_for_a_failure_of_qemu(
    start: Callable[..., Run],
) -> None:
    run = start("-n", "2", *CHEAP)
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


@IN_TURN
def test_the_next_run_is_none_the_worse_for_it(start: Callable[..., Run]) -> None:
    run = start("-n", "1", *CHEAP)
    run.await_lab_host()
    assert run.process.wait(300) == 0, run.log.read_text()
    assert "GOOD: 1 ok" in run.log.read_text()
    until(lambda: not run.members(), "the last of its processes to end", 60, pause_s=0.05)
    assert run.directories() == []


# At random moments, 50 times in all.

#: How often each is killed.
TIMES = {"pytest": 16, "worker": 12, "lab host": 11, "sshd": 11}
assert sum(TIMES.values()) == 50
#: Workers of one run that are killed; xdist gives up after four for each that it began with.
MOST_WORKERS = 6
#: Where killing it loses no lab host: guests on this machine, with a device of ours.
WITHOUT_LAB = ("--profile", "smoke", "-k", "test_direct.py and 8-vectors and not pending")
#: Tests in a lab host, and every third has a guest there.  Something is done to their host, and
#: they go on until it is gone, or there is a file "enough".
LOSERS = """\
import time
from pathlib import Path
import pytest
from fixtures.coverage import Coverage

POINTS = Coverage("msix:8")
DONE = {done}

@pytest.mark.parametrize("number", range(len(DONE)))
def test_every_vector_is_delivered(request, bench, point, number):
    lab = bench.lab_with(point.iommu)
    rig = bench.rig(point, request.addfinalizer) if number % 3 == 0 else None
    if rig:
        rig.use_all()
    if not DONE[number]:
        return
    lab.run("(" + DONE[number] + ") > /dev/null 2>&1 &")
    end = time.monotonic() + 30
    while time.monotonic() < end and not Path("enough").exists():
        if rig:
            rig.fire(*rig.vectors)
            rig.check()
        lab.run("true")
"""
KILL_SSHD = "kill -9 $(grep -l sshd /proc/[0-9]*/comm | cut -d/ -f3)"


@pytest.fixture
def random(request: pytest.FixtureRequest) -> Random:
    """Of a seed that is in the report."""
    seed = secrets.randbits(32)
    request.node.add_report_section("call", "moments", f"Random({seed})")
    return Random(seed)


def rest(run: Run, seconds: float) -> None:
    """Until a moment that is no effect of anything, or the end of the run."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.process.wait(seconds)


def expect_nothing_left(run: Run) -> None:
    with contextlib.suppress(DeadlineError):
        until(lambda: not run.members(), "the last of its processes to end", 60, pause_s=0.02)
    assert [(pid, _command(pid)) for pid in run.members()] == []
    assert run.directories() == []
    assert "vfio-cpr" not in Path("/proc/self/mounts").read_text()


@BESIDE
def test_pytest_is_killed_at_random(start: Callable[..., Run], random: Random) -> None:
    began = time.monotonic()
    run = start(*WITHOUT_LAB, "-n", "0")
    assert run.process.wait(120) == 0, run.log.read_text()
    whole_s = time.monotonic() - began
    for number in range(TIMES["pytest"]):
        run = start(*WITHOUT_LAB, "-n", "2" if number % 4 == 0 else "0")
        rest(run, random.uniform(0, whole_s))
        run.members()  # whose directories are looked for
        run.process.kill()
        assert run.process.wait(10) in (-signal.SIGKILL, 0)
        expect_nothing_left(run)
    run = start(*WITHOUT_LAB, "-n", "0")
    assert run.process.wait(120) == 0, run.log.read_text()
    expect_nothing_left(run)


@BESIDE
def test_workers_are_killed_at_random(start: Callable[..., Run], random: Random) -> None:
    run = start(*WITHOUT_LAB, "-n", "2")
    assert run.process.wait(120) == 0, run.log.read_text()
    whole = {(case["behaviour"], case["point"]) for case in run.cases()}
    killed = 0
    while killed < TIMES["worker"]:
        run = start(*WITHOUT_LAB, "-n", "2")
        until(lambda r=run: r.workers() or r.process.poll(), "a worker", 60, pause_s=0.02)
        for _ in range(min(MOST_WORKERS, TIMES["worker"] - killed)):
            if workers := run.workers():
                os.kill(random.choice(workers), signal.SIGKILL)
                killed += 1
                rest(run, random.uniform(0, 2))
        status = run.process.wait(120)
        said = run.log.read_text()
        expect_nothing_left(run)
        if "INTERNALERROR" in said:  # xdist needs each to come up for the first time
            assert status == 3, said
            assert "EOFError" in said
            continue
        errors = [case for case in run.cases() if case["result"] == "error"]
        assert status == (3 if errors else 0), said
        assert all("crashed while running" in case["text"] for case in errors), said
        # Nothing is left out without a word.
        assert {(case["behaviour"], case["point"]) for case in run.cases()} == whole, said


def project(place: Path, done: Sequence[str]) -> list[str]:
    """`LOSERS`; returns pytest's arguments.

    :param done: to their host in each of them, by a shell there.
    """
    tests = place / "tests/qemu"
    tests.mkdir(parents=True)
    (tests / "known_issues.toml").touch()
    (tests / "test_losers.py").write_text(LOSERS.format(done=done))
    configuration = str(ROOT / "pyproject.toml")
    return ["-p", "conftest", "-c", configuration, "--rootdir", str(place), str(tests)]


@IN_TURN
def test_a_lab_host_that_is_booted_or_panics_under_a_test_is_told_and_the_next_one_has_another(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start(
        *project(tmp_path, ["reboot -f", "echo c > /proc/sysrq-trigger", ""]), module="pytest"
    )
    assert run.process.wait(300) == 3, run.log.read_text()
    assert [case["result"] for case in run.cases()] == ["error", "error", "ok"]
    for case in run.cases()[:2]:
        assert "lab host (intel-iommu): " in case["text"]
        assert "the QEMU that it runs on ended with 0" in case["text"]
        assert Path(case["notes"]["evidence"]).is_dir()
    assert "COULD NOT VERIFY: 2 error, 1 ok" in run.log.read_text()
    expect_nothing_left(run)


@IN_TURN
def test_sshd_is_killed_at_random(
    start: Callable[..., Run], random: Random, tmp_path: Path
) -> None:
    done = [f"sleep {random.uniform(0, 1)}; {KILL_SSHD}" for _ in range(TIMES["sshd"])]
    run = start(*project(tmp_path, done), module="pytest")
    assert run.process.wait(400) == 3, run.log.read_text()
    assert [case["result"] for case in run.cases()] == ["error"] * len(done)
    assert all("lab host (intel-iommu): " in case["text"] for case in run.cases())
    expect_nothing_left(run)


@IN_TURN
def test_lab_hosts_are_killed_at_random(
    start: Callable[..., Run], random: Random, tmp_path: Path
) -> None:
    times = TIMES["lab host"]
    run = start(*project(tmp_path, ["true"] * (times + 1)), module="pytest")
    seen: set[int] = set()
    killed = 0
    while killed < times:
        lab = run.await_lab_host(but=seen)
        seen.add(lab)
        rest(run, random.uniform(0, 4))
        with contextlib.suppress(ProcessLookupError):  # it has gone by itself, which does not count
            os.kill(lab, signal.SIGKILL)
            killed += 1
    (tmp_path / "enough").touch()
    assert run.process.wait(120) == 3, run.log.read_text()
    verdict = json.loads(run.verdict.read_text())
    results = [case["result"] for case in verdict["cases"]]
    assert results[-1] == "ok"
    lost = [case["text"] for case in verdict["cases"] if case["result"] == "error"]
    assert all("lab host" in text and "ended with -9" in text for text in lost), lost
    booted_once_more = [each for each in verdict["incidents"] if "once more" in each]
    assert len(lost) + len(booted_once_more) >= times - 1
    expect_nothing_left(run)
