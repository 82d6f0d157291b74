# SPDX-License-Identifier: GPL-2.0-or-later
"""The monitor: a real QEMU at the other end, and a fake one where it must misbehave."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from fixtures.hosts import LocalHost, Process
from fixtures.machines import CommandRefusedError, Monitor
from fixtures.machines.monitor import MonitorLostError
from fixtures.waiting import DeadlineError, until
from images.sysroot import Sysroot

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'


@dataclass
class Session:
    """A QEMU without a machine, and our monitor of it."""

    process: Process
    monitor: Monitor


@pytest.fixture
def session(local: LocalHost, packaged: Sysroot) -> Iterator[Session]:
    near, far = socket.socketpair()
    with far:
        process = local.spawn(
            packaged.qemu(
                *("-machine", "none", "-nodefaults", "-display", "none"),
                *("-chardev", f"socket,id=qmp,fd={far.fileno()}"),
                *("-mon", "chardev=qmp,mode=control"),
            ),
            log=local.scratch / "monitor.log",
            pass_fds=[far.fileno()],
        )
    monitor = Monitor("a QEMU", near)
    yield Session(process, monitor)
    monitor.close()
    process.kill()


def show(number: int) -> tuple[str, dict[str, object]]:
    """A command that answers with a number."""
    return "human-monitor-command", {"command-line": f"print /d {number}"}


def test_a_command_returns_what_qemu_returned(session: Session) -> None:
    assert session.monitor.execute("query-status")["status"] == "running"
    assert session.monitor.execute(*show(42)).strip() == "42"
    assert len(session.monitor.execute("query-qmp-schema")) > 1000


def test_a_refused_command_says_who_refused_what_and_why(session: Session) -> None:
    with pytest.raises(CommandRefusedError) as caught:
        session.monitor.execute("device_del", {"id": "nothing"})
    assert caught.value.reason == "Device 'nothing' not found"
    assert str(caught.value) == "a QEMU refused device_del: Device 'nothing' not found"
    assert session.monitor.execute("query-status")["status"] == "running"


def test_answers_find_the_command_they_belong_to(session: Session) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda n: session.monitor.execute(*show(n)), range(100))
    assert [int(answer) for answer in answers] == list(range(100))


# Events


def test_events_are_kept_from_the_beginning_and_in_order(session: Session) -> None:
    for command in ("stop", "cont", "stop"):
        session.monitor.execute(command)
    until(lambda: len(session.monitor.events) >= 3, "the events", 10, pause_s=0.01)
    events = session.monitor.events
    assert [event.name for event in events] == ["STOP", "RESUME", "STOP"]
    assert [event.at for event in events] == sorted(event.at for event in events)
    assert session.monitor.seen("STOP") == events[2]
    assert session.monitor.seen("RESUME") == events[1]
    assert session.monitor.seen("RESET") is None


def test_an_event_that_came_before_anybody_waited_is_not_missed(session: Session) -> None:
    session.monitor.execute("stop")
    session.monitor.execute("query-status")
    assert session.monitor.wait_event("STOP", 0).name == "STOP"


def test_an_event_brings_its_data(session: Session) -> None:
    session.monitor.execute("quit")
    event = session.monitor.wait_event("SHUTDOWN", 10)
    assert event.data == {"guest": False, "reason": "host-qmp-quit"}


def test_waiting_for_an_event_ends_at_its_deadline_or_for_a_reason(session: Session) -> None:
    with pytest.raises(DeadlineError, match=r"waited 0\.1 s for the event RESET of a QEMU"):
        session.monitor.wait_event("RESET", 0.1)
    with pytest.raises(DeadlineError, match=r"RESET .* in vain: it has died"):
        session.monitor.wait_event("RESET", 20, but=lambda: "it has died")


def test_the_transcript_has_all_that_was_said_in_order(session: Session) -> None:
    session.monitor.execute("stop")
    with pytest.raises(CommandRefusedError):
        session.monitor.execute("no-such-command")
    lines = [line.split(" ", 2) for line in session.monitor.transcript().splitlines()]
    said = [(direction, json.loads(message)) for _, direction, message in lines]
    assert "QMP" in said[0][1]
    commands = [message["execute"] for direction, message in said if direction == "->"]
    assert commands == ["qmp_capabilities", "stop", "no-such-command"]
    assert [message["event"] for _, message in said if "event" in message] == ["STOP"]
    assert sum("error" in message for direction, message in said if direction == "<-") == 1
    times = [float(at) for at, _, _ in lines]
    assert times == sorted(times)


# A QEMU that goes away


def test_a_qemu_that_is_killed_in_the_middle_is_no_wait_for_a_deadline(session: Session) -> None:
    session.process.signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(session.monitor.execute, "query-status", deadline_s=600)
        until(lambda: "query-status" in session.monitor.transcript(), "the command", 10)
        session.process.kill()
        with pytest.raises(MonitorLostError, match="a QEMU: query-status: "):
            answer.result(60)


def test_after_its_death_every_command_says_that_it_is_lost(session: Session) -> None:
    session.process.kill()
    for _ in range(2):
        with pytest.raises(MonitorLostError, match="a QEMU: query-status: "):
            session.monitor.execute("query-status")
    session.monitor.close()
    session.monitor.close()


def test_a_qemu_that_hangs_is_lost_and_its_late_answer_disturbs_nobody(session: Session) -> None:
    session.process.signal(signal.SIGSTOP)
    try:
        with pytest.raises(MonitorLostError, match=r"waited 0\.2 s for a QEMU to answer"):
            session.monitor.execute(*show(1), deadline_s=0.2)
    finally:
        session.process.signal(signal.SIGCONT)
    assert [int(session.monitor.execute(*show(n))) for n in (2, 3)] == [2, 3]


# A fake QEMU


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end of a connection, and the fake's."""
    ours, fake = socket.socketpair()
    with ours, fake:
        fake.settimeout(20)
        yield ours, fake


GREETINGS = {
    "no JSON": b"qemu-system-x86_64: no such option\n",
    "no object": b"[1, 2]\n",
    "no greeting": b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 0}}\n',
    "no text": b"\xff\xfe\n",
    "half of one": GREETING[:20],
    "nothing": b"",
}


@pytest.mark.parametrize("greeting", GREETINGS.values(), ids=GREETINGS)
def test_a_bad_greeting_is_no_session(
    ends: tuple[socket.socket, socket.socket], greeting: bytes
) -> None:
    ours, fake = ends
    fake.sendall(greeting)
    fake.shutdown(socket.SHUT_WR)
    with pytest.raises(MonitorLostError, match="a fake: no QMP session: "):
        Monitor("a fake", ours, deadline_s=20)


def test_a_reason_for_the_end_may_come_a_little_after_it(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """A QEMU that dies closes its monitor first and is gone a moment later."""
    ours, fake = ends
    fake.close()
    later = time.monotonic() + 0.3
    with pytest.raises((MonitorLostError, DeadlineError), match=r"a fake.*: it has died"):
        Monitor("a fake", ours, but=lambda: "it has died" if time.monotonic() > later else None)


def test_no_greeting_ends_at_the_deadline(ends: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(DeadlineError, match=r"waited 0\.1 s for the QMP greeting of a fake"):
        Monitor("a fake", ends[0], deadline_s=0.1)


def test_a_reason_why_no_greeting_can_come_ends_the_waiting(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    with pytest.raises(DeadlineError, match=r"greeting of a fake is in vain: it has died"):
        Monitor("a fake", ends[0], deadline_s=600, but=lambda: "it has died")


@pytest.fixture
def fake_session(
    ends: tuple[socket.socket, socket.socket],
) -> Iterator[tuple[Monitor, Callable[[bytes], None]]]:
    """A session with a fake QEMU, and how to let the fake say something."""
    ours, fake = ends
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(Monitor, "a fake", ours)
        fake.sendall(GREETING)
        assert b"qmp_capabilities" in fake.recv(4096)
        fake.sendall(b'{"return": {}}\n')
        monitor = connecting.result(20)
    yield monitor, fake.sendall
    monitor.close()


@pytest.mark.parametrize("rubbish", [b"rubbish\n", b"[]\n", b"\xff\n"])
def test_rubbish_in_a_session_ends_it(
    fake_session: tuple[Monitor, Callable[[bytes], None]], rubbish: bytes
) -> None:
    monitor, say = fake_session
    say(rubbish)
    with pytest.raises(MonitorLostError, match=r"a fake: query-status: (?!waited)"):
        monitor.execute("query-status", deadline_s=20)
