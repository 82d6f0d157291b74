# SPDX-License-Identifier: GPL-2.0-or-later
"""Monitors watch a CPR: each event comes once, in order, and from whom it should come."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.cpr import Cpr
from fixtures.machines import Event, Monitor
from fixtures.matrix import Point
from fixtures.rig import Rig
from fixtures.waiting import until

POINTS = Coverage(
    also=("msix:8", "msix:8+cpr-exec"),
    irq=("msix:8",),
    **SOUND,
    container=("type1",),
    iommu=("intel-iommu",),
    reset=("bus",),
    irqchip=("full",),
    apic=("xapic",),
    bars=("mmap",),
    endpoint=("ivshmem",),
)
#: Monitors that QEMU has beside its first.
SECOND, HUMAN = "second.qmp", "human"


@dataclass(frozen=True)
class Watched:
    """A rig after a CPR.

    :ivar waiting: new QEMU's run state before it was told to load.
    :ivar second: a session with a monitor of old QEMU that it has beside its first.
    """

    rig: Rig
    cpr: Cpr
    waiting: str
    second: Monitor

    @property
    def old(self) -> Sequence[Event]:
        """What old QEMU told."""
        return _of_the_guest(self.cpr.old.monitor)

    @property
    def new(self) -> Sequence[Event]:
        """What new QEMU told."""
        return _of_the_guest(self.cpr.new.monitor)


def _of_the_guest(monitor: Monitor) -> Sequence[Event]:
    return [each for each in monitor.events if each.name in ("STOP", "RESUME", "MIGRATION")]


def said(events: Sequence[Event], but: str = "") -> str:
    """Their names; of a migration, the state that it has come to."""
    names = [str(event.data.get("status", event.name)) for event in events]
    return " ".join(name for name in names if name != but)


@pytest.fixture(scope="module")
def watched(bench: LabBench, point: Point) -> Iterator[Watched]:
    with ExitStack() as stack:
        rig = bench.rig_without_power(point, stack.callback)
        host, spec = rig.machine.host, rig.machine.spec
        # Two QEMUs beside each other cannot listen at one place.
        if point.mode == "cpr-exec":
            listen = f"unix:{host.scratch}/{{}},server=on,wait=off"
            options = ("-qmp", listen.format(SECOND), "-monitor", listen.format(HUMAN))
            rig.machine.spec = replace(spec, options=options)
        rig.power_on()
        rig.use_all()
        second = rig.machine.monitor
        if point.mode == "cpr-exec":
            second = Monitor("the second monitor", host.connect(host.scratch / SECOND))
            stack.callback(second.close)
        waiting = ""

        def between() -> None:
            nonlocal waiting
            waiting = rig.machine.status()
            capability = {"capability": "events", "state": True}
            rig.machine.monitor.execute("migrate-set-capabilities", {"capabilities": [capability]})

        cpr = rig.hand_over(between)
        # It says so a moment after the guest runs.
        rig.machine.alive(
            lambda: until(
                lambda: said(_of_the_guest(rig.machine.monitor)).endswith("completed"),
                "new QEMU to say that it has loaded the guest",
                10,
                pause_s=0.01,
            )
        )
        cpr.leave()
        yield Watched(rig, cpr, waiting, second)


def test_old_qemu_tells_of_each_state_once_and_in_order(watched: Watched) -> None:
    assert said(watched.old, but="STOP") == "setup active device completed"


def test_old_qemu_stops_the_guest_once_before_it_writes_the_state(watched: Watched) -> None:
    assert said(watched.old) in (
        "setup STOP active device completed",
        "setup active STOP device completed",
    )


def test_new_qemu_waits_for_the_state_and_resumes_the_guest_once_when_loaded(
    watched: Watched,
) -> None:
    assert watched.waiting == "inmigrate"
    assert said(watched.new, but="setup") == "active RESUME completed"


def test_the_guest_runs_in_one_qemu_at_a_time(watched: Watched) -> None:
    """By the time that either QEMU puts on its events, which is their host's."""
    at = {said([event]): event.at for event in watched.old}
    resumed = watched.cpr.new.monitor.seen("RESUME")
    assert resumed
    assert at["STOP"] < at["completed"] < resumed.at


@pytest.mark.limits(mode=("cpr-exec",))
def test_each_monitor_of_the_command_line_is_there_again(watched: Watched) -> None:
    """At the same place; whoever had a session with old QEMU has lost it."""
    host = watched.rig.machine.host
    assert watched.second.is_lost
    again = Monitor("the second monitor", host.connect(host.scratch / SECOND))
    try:
        assert again.execute("query-status")["status"] == "running"
    finally:
        again.close()
    with host.connect(host.scratch / HUMAN) as stream:
        assert greeting(stream).endswith("(qemu) ")


def greeting(stream: socket.socket) -> str:
    """What a monitor for people says up to its prompt, or as long as it says anything."""
    stream.settimeout(10)
    said = b""
    while not said.endswith(b"(qemu) ") and (more := stream.recv(4096)):
        said += more
    return said.decode(errors="replace")
