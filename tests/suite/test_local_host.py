# SPDX-License-Identifier: GPL-2.0-or-later
"""This machine as a host: nothing is left of a run here, however the run ends.

What it shares with every other host is in test_hosts.py.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

from fixtures.hosts import Host, LocalHost
from fixtures.hosts.base import TOKEN, guardian
from fixtures.hosts.local import clear_up
from fixtures.waiting import until

ROOT = Path(__file__).parents[2]

#: A run that says its token and goes on for ever.
RUN = """\
import signal
from fixtures.hosts import LocalHost

host = LocalHost()
log = host.scratch / "log"
host.spawn(["sleep", "600"], log=log)
host.spawn(["sh", "-c", "trap '' HUP INT TERM; sleep 600 & sleep 600"], log=log)
host.spawn(["sh", "-c", "setsid setsid sleep 600 & wait"], log=log)
host.run(f"mkdir {host.memory}/deep; echo x > {host.memory}/deep/ram")
print(host.token, flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def run() -> Iterator[subprocess.Popen[str]]:
    """Another run, in a session of its own, as if on a terminal of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", RUN],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        yield process
        process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()


def press_ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def terminate(process: subprocess.Popen[str]) -> None:
    process.terminate()


def hang_up(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGHUP)


@pytest.mark.parametrize("end", [kill, press_ctrl_c, terminate, hang_up])
def test_nothing_outlives_a_run_that_ends_by_a_signal(
    local: LocalHost,
    run: subprocess.Popen[str],
    left_of: Callable[[Host, str], str],
    end: Callable[[subprocess.Popen[str]], None],
) -> None:
    assert run.stdout is not None
    token = run.stdout.readline().strip()
    until(
        lambda: left_of(local, token).count("/environ") >= 5, "all that it starts", 20, pause_s=0.02
    )
    assert {"/tmp", "/dev/shm"} < {
        line.rpartition("/")[0] for line in left_of(local, token).splitlines()
    }
    end(run)
    assert run.wait(20) != 0
    until(lambda: left_of(local, token) == "", "the guardian to clear up", 30, pause_s=0.02)


def test_a_run_that_ends_of_itself_leaves_nothing_either(
    local: LocalHost, left_of: Callable[[Host, str], str]
) -> None:
    script = RUN.partition("while True")[0]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    token = done.stdout.strip()
    assert len(token) == 16
    until(lambda: left_of(local, token) == "", "the guardian to clear up", 30, pause_s=0.02)


def test_a_ctrl_c_on_the_terminal_is_not_for_what_runs_on_the_host(local: LocalHost) -> None:
    process = local.spawn(["sleep", "600"], log=local.scratch / "log")
    assert os.getsid(process.pid) == process.pid
    assert os.getsid(local._guardian.pid) == local._guardian.pid
    process.kill()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_the_guardian_is_deaf_to_what_ends_a_session(
    local: LocalHost, left_of: Callable[[Host, str], str], number: signal.Signals
) -> None:
    host = LocalHost()
    status = Path(f"/proc/{host._guardian.pid}/status")
    until(
        lambda: int(status.read_text().split("SigIgn:")[1].split()[0], 16) & 1 << number - 1,
        f"the guardian to ignore {number.name}",
        10,
        pause_s=0.01,
    )
    host.spawn(["sleep", "600"], log=host.scratch / "log")
    host._guardian.send_signal(number)
    host.close()
    assert left_of(local, host.token) == ""


def test_a_guardian_ends_nothing_of_a_run_whose_token_begins_like_its_own() -> None:
    token = secrets.token_hex(8)
    ours, another = (
        subprocess.Popen(["sleep", "60"], env={**os.environ, TOKEN: value})
        for value in (token, token + "0")
    )
    try:
        subprocess.run(guardian(token), stdin=subprocess.DEVNULL, check=True)
        assert ours.wait(10) == -signal.SIGKILL
        assert another.poll() is None
    finally:
        for process in (ours, another):
            process.kill()
            process.wait()


def test_a_run_clears_up_after_one_whose_guardian_was_killed_with_it(
    local: LocalHost, run: subprocess.Popen[str], left_of: Callable[[Host, str], str]
) -> None:
    assert run.stdout is not None
    token = run.stdout.readline().strip()
    directories = [Path(f"{parent}/vfio-cpr-{token}") for parent in ("/tmp", "/dev/shm")]
    (its_guardian,) = local.run(
        f"grep -lszx {token} /proc/[0-9]*/cmdline", check=False
    ).out.splitlines()
    for directory in directories:
        os.utime(directory, (0, 0))
    clear_up()
    assert left_of(local, token).count("vfio-cpr-") == 2, "that run still lives"
    os.kill(int(its_guardian.split("/")[2]), signal.SIGKILL)
    run.kill()
    run.wait()
    clear_up()
    assert left_of(local, token) == ""


def test_descriptors_are_passed_to_those_that_are_to_have_them(local: LocalHost) -> None:
    reader, writer = os.pipe()
    try:
        log = local.scratch / "log"
        listing = ["sh", "-c", f"test -e /proc/self/fd/{writer}"]
        assert local.spawn(listing, log=log).wait(10) == 1
        assert local.spawn(listing, log=log, pass_fds=[writer]).wait(10) == 0
    finally:
        os.close(reader)
        os.close(writer)


def test_commands_do_not_read_what_is_typed_for_us(local: LocalHost) -> None:
    reader, writer = os.pipe()
    ours = os.dup(0)
    os.dup2(reader, 0)
    try:
        assert local.run("cat", deadline_s=5).out == ""
        assert local.spawn(["cat"], log=local.scratch / "typed.log").wait(5) == 0
    finally:
        os.dup2(ours, 0)
        for descriptor in (ours, reader, writer):
            os.close(descriptor)


def test_nobody_else_may_look_into_its_directories(local: LocalHost) -> None:
    for directory in (local.scratch, local.memory):
        assert Path(directory).stat().st_mode & 0o077 == 0


def test_programs_run_in_the_plain_locale(
    local: LocalHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    log = PurePosixPath(local.scratch / "log")
    local.spawn(["sh", "-c", "echo $LC_ALL"], log=log).wait(10)
    assert local.run("echo $LC_ALL").out.encode() == local.read(log) == b"C\n"


def test_what_crashes_here_leaves_no_core_file(local: LocalHost) -> None:
    process = local.spawn(["sleep", "60"], log=local.scratch / "sleep.log")
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    process.kill()
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
