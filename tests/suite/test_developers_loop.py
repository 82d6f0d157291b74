# SPDX-License-Identifier: GPL-2.0-or-later
"""ci/verify --last-failed, --debug and --keep-evidence: what a developer does after a failure."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest

from fixtures.bench import Bench, LabBench
from fixtures.debug import directions
from fixtures.developer import Recorder
from fixtures.lastrun import LastRun
from fixtures.machines import Machine
from fixtures.machines.monitor import Monitor
from fixtures.matrix import Point
from fixtures.verify import main
from fixtures.waiting import until
from images.cache import Cache
from images.errors import EnvironmentFault
from images.sysroot import Sysroot
from tests.suite.conftest import ON_LAB, OldQemu

ROOT = Path(__file__).parents[2]
#: A plugin that breaks a test of ours, where it is not QEMU that is at fault.
BREAKER = """\
import os, pytest

@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    result = yield
    assert os.environ["BREAK"] not in pyfuncitem.nodeid, "broken on purpose"
    return result
"""
FRAGILE = "test_function_mask_holds_all_vectors_back"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "breaker.py").write_text(BREAKER)


def command(cache: Cache, *arguments: str) -> list[str]:
    """ci/verify, of some tests that need no lab host."""
    return [
        *(sys.executable, "-m", "fixtures.verify", "-q", "--cache", str(cache.root)),
        *("-p", "breaker", *arguments),
    ]


def environment(broken: str) -> Mapping[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{Path.cwd()}", "BREAK": broken, "TERM": "dumb"}


def verify(cache: Cache, *arguments: str, broken: str = "none") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(cache, *arguments),
        env=environment(broken),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # without a terminal
        capture_output=True,
        text=True,
        timeout=240,
    )


DIRECT = ("--profile", "smoke", "-k", "test_direct.py and 8-vectors and (function or disabling)")


def test_what_failed_is_run_again_and_nothing_else(cache: Cache) -> None:
    first = verify(cache, *DIRECT, "-n", "2", broken=FRAGILE)
    assert (first.returncode, "1 FAIL, 1 ok" in first.stdout) == (1, True), first.stdout
    again = verify(cache, "--last-failed", "-n", "2", broken=FRAGILE)
    assert (again.returncode, "FAILED: 1 FAIL in" in again.stdout) == (1, True), again.stdout
    assert "of the last run, what failed: 1 cases" in again.stderr
    mended = verify(cache, "--last-failed", "-n", "0")
    assert (mended.returncode, "GOOD: 1 ok in" in mended.stdout) == (0, True), mended.stdout
    assert "in all: 0 CPRs, 8 interrupts raised, 8 delivered" in mended.stdout
    nothing = verify(cache, "--last-failed")
    assert (nothing.returncode, nothing.stdout) == (3, "")
    assert nothing.stderr == "ci/verify: nothing failed in the last run; nothing was verified\n"


def test_without_an_earlier_run_nothing_is_verified(
    cache: Cache, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--last-failed", "--cache", str(cache.root)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ci/verify: no earlier run is known of evidence in {tmp_path}/evidence")


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., LastRun]:
    """What is kept of a run with these reports."""

    def record(*reports: SimpleNamespace) -> LastRun:
        options = {
            "profile": "quick",
            "point": ["msi:8"],
            "changed": ["hw/vfio/cpr.c"],
            "cache": tmp_path / "cache",
            "evidence": tmp_path / "evidence",
        }
        recorder = Recorder(SimpleNamespace(getoption=options.get))  # type: ignore[arg-type]
        for each in reports:
            recorder.pytest_runtest_logreport(each)  # type: ignore[arg-type]
        recorder.pytest_sessionfinish()
        return LastRun.of(tmp_path / "cache", tmp_path / "evidence")

    return record


def report(name: str, *, failed: bool = True, when: str = "call", **notes: object) -> object:
    return SimpleNamespace(nodeid=name, failed=failed, when=when, **notes)


def test_a_run_is_kept_with_what_chose_its_points(recorded: Callable[..., LastRun]) -> None:
    run = recorded(
        report("a.py::test_a[msi:8]@group", vfio_cpr={}),
        report("a.py::test_b", failed=False, vfio_cpr={}),
        report("a.py::test_c", when="???"),
        report("suite.py::test_of_ours"),
    )
    assert run == LastRun(
        ["a.py::test_a[msi:8]", "a.py::test_c"], "quick", ["msi:8"], ["hw/vfio/cpr.c"]
    )


def test_a_run_without_verdicts_is_none(recorded: Callable[..., LastRun]) -> None:
    kept = recorded(report("a.py::test_a", vfio_cpr={}))
    assert recorded(report("suite.py::test_of_ours")) == kept


def test_runs_with_other_evidence_are_others(
    recorded: Callable[..., LastRun], tmp_path: Path
) -> None:
    recorded(report("a.py::test_a", vfio_cpr={}))
    with pytest.raises(EnvironmentFault, match="no earlier run"):
        LastRun.of(tmp_path / "cache", tmp_path / "elsewhere")


def test_runs_of_long_ago_are_forgotten(recorded: Callable[..., LastRun], tmp_path: Path) -> None:
    run = LastRun(["a.py::test_a"], "main", [])
    run.keep(tmp_path / "cache", tmp_path / "elsewhere")
    (old,) = (tmp_path / "cache/last-run").iterdir()
    os.utime(old, (0, 0))
    recorded(report("a.py::test_a", vfio_cpr={}))
    assert not old.exists()


def test_what_passes_may_leave_evidence(cache: Cache, tmp_path: Path) -> None:
    done = verify(cache, *DIRECT, "--keep-evidence", "-n", "0")
    assert done.returncode == 0
    kept = [place.name for place in (tmp_path / "evidence").iterdir() if place.is_dir()]
    assert len(kept) == 2
    assert (tmp_path / "evidence/report.html").is_file()
    assert f"test_direct.py-{FRAGILE}-8-vectors" in kept
    for place in (tmp_path / "evidence").glob("test_*"):
        assert {"commands.sh", "qemu-0.qmp", "vectors.txt"} <= {f.name for f in place.iterdir()}


# --debug.


def test_without_a_terminal_there_is_no_debugging(cache: Cache) -> None:
    done = verify(cache, "--debug")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ci/verify: --debug waits for you at a terminal, and there is none\n"


def test_hosts_of_an_inventory_are_not_left_up(cache: Cache) -> None:
    done = verify(cache, "--debug", "--inventory", "lab.toml")
    assert done.returncode == 2
    assert done.stderr == (
        "ci/verify: --debug leaves a lab host of our own up, and none of an --inventory\n"
    )


@pytest.mark.parametrize("key", [b"\n", b"\x03"], ids=["Enter", "Ctrl-C"])
def test_the_first_failure_waits_for_a_key(cache: Cache, key: bytes) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(cache, *DIRECT, "--debug"),
        env=environment("8-vectors"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        # It becomes the one that Ctrl-C comes from.
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
    )
    os.close(theirs)
    said = bytearray()

    def says(text: bytes) -> bool:
        os.set_blocking(ours, False)
        with contextlib.suppress(OSError):  # nothing now, or nobody any more
            said.extend(os.read(ours, 1 << 16))
        return text in said

    try:
        until(lambda: says(b"ends all of it: "), "the prompt", 120, pause_s=0.05)
        (monitor,) = re.findall(r"monitor   \S+ (\S+)", said.decode())
        stream = _connected(PurePosixPath(monitor))
        assert stream.execute("query-status")["status"] == "running"
        stream.close()
        os.write(ours, key)
        until(lambda: says(b"FAILED: 1 FAIL in"), "the verdict", 60, pause_s=0.05)
        until(lambda: says(b"") or process.poll() is not None, "the end", 30, pause_s=0.05)
        assert process.wait(30) == 1
        assert not Path(monitor).exists()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _connected(path: PurePosixPath) -> Monitor:
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(str(path))
    return Monitor("a monitor", stream)


class ABench(Bench):
    """One with these machines."""

    def __init__(self, tree: Sysroot, machines: Sequence[Machine]) -> None:
        super().__init__(SimpleNamespace(local=lambda _: tree))  # type: ignore[arg-type]
        self.rigs = [SimpleNamespace(machines=machines)]  # type: ignore[list-item]

    def give_up(self, reason: str) -> None:
        raise AssertionError(reason)

    def close(self) -> None:
        pass


def told(bench: Bench) -> dict[str, str]:
    """The directions by their names."""
    lines = [line.strip().split(maxsplit=1) for line in directions(bench)]
    return {words[0]: words[1] for words in lines if len(words) == 2}


def backtraced(line: str) -> str:
    """What gdb says of where a process is."""
    argv = shlex.split(line)
    done = subprocess.run(
        [argv[0], "-nx", "-batch", *argv[1:], "-ex", "info symbol main", "-ex", "bt 1"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "DEBUGINFOD_URLS": ""},
    )
    return done.stdout + done.stderr


NEEDS_GDB = pytest.mark.skipif(
    shutil.which("gdb") is None or os.geteuid() != 0, reason="there is no gdb that may attach"
)


@NEEDS_GDB
def test_gdb_attaches_to_a_qemu_of_this_machine(old: OldQemu, packaged: Sysroot) -> None:
    machine, _ = old
    assert re.search(r"^#0 ", backtraced(told(ABench(packaged, [machine]))["gdb"]), re.M)


def test_a_qemu_that_has_ended_is_told(old: OldQemu, packaged: Sysroot) -> None:
    machine, _ = old
    machine.process.kill()
    lines = "\n".join(directions(ABench(packaged, [machine])))
    assert "which has ended with -9" in lines
    assert "monitor" not in lines


@ON_LAB
@pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no ssh here")
def test_a_lab_host_is_reached_by_ssh_and_its_qemu_by_qmp_and_gdb(
    lab_bench: LabBench, request: pytest.FixtureRequest
) -> None:
    rig = lab_bench.rig(Point(), request.addfinalizer)
    ways = told(lab_bench)
    done = subprocess.run(
        [*shlex.split(ways["shell"]), "cat /proc/sys/kernel/hostname"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("lab\n", "")
    monitor = _connected(PurePosixPath(ways["monitor"].split()[1]))
    assert monitor.execute("query-status")["status"] == "running"
    monitor.close()
    if shutil.which("gdb"):
        assert re.search(r"^#0 ", backtraced(ways["gdb"]), re.M)
    assert rig.machine.process.poll() is None
