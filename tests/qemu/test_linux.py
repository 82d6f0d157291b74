# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest fetches data by a network controller of its own; then new QEMU takes over."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from fixtures.linux import LinuxBench, LinuxRig, Stream


@dataclass(frozen=True)
class Account:
    """The guest's account of itself.

    :ivar boot: what its kernel has else in each of its lives.
    :ivar uptime_s: since it was booted.
    :ivar carrier_changes: how often the controller has found or lost its carrier.
    :ivar interrupts: how often each of the controller's has been served, by each CPU.
    :ivar log: its kernel's.
    """

    boot: str
    uptime_s: float
    carrier_changes: int
    interrupts: dict[str, list[int]]
    log: str


def account(rig: LinuxRig) -> Account:
    guest = rig.guest
    return Account(
        guest.read("/proc/sys/kernel/random/boot_id"),
        float(guest.read("/proc/uptime").split()[0]),
        int(guest.read("/sys/class/net/eth0/carrier_changes")),
        guest.interrupts("eth0"),
        guest.run(["dmesg"]),
    )


@dataclass(frozen=True)
class Carried:
    """A guest after a CPR, with what it said on either side of it."""

    linux: LinuxRig
    stream: Stream
    before: Account
    after: Account


@pytest.fixture(
    scope="module",
    params=[("igb", "cpr-transfer"), ("igb", "cpr-exec"), ("e1000e", "cpr-transfer")],
    ids="+".join,
)
def carried(request: pytest.FixtureRequest, linux_bench: LinuxBench) -> Carried:
    model, mode = request.param
    if mode not in linux_bench.subject.capabilities.modes:
        pytest.skip(f"this QEMU has no {mode}")
    rig = linux_bench.rig(model, mode, request.addfinalizer)
    stream = rig.stream()
    before = account(rig)
    rig.take_over()
    after = account(rig)
    stream.moves()
    return Carried(rig, stream, before, after)


@pytest.fixture
def linux(carried: Carried) -> LinuxRig:
    return carried.linux


def test_the_agent_answers_in_new_qemu_and_its_guest_was_not_booted(carried: Carried) -> None:
    assert carried.after.boot == carried.before.boot
    assert carried.after.uptime_s > carried.before.uptime_s


def test_the_carrier_is_not_lost(carried: Carried) -> None:
    assert carried.after.carrier_changes == carried.before.carrier_changes


def test_the_driver_reports_nothing(carried: Carried) -> None:
    """Neither a reset, nor a transmitter that hangs, nor an error of the bus."""
    new = carried.after.log.removeprefix(carried.before.log)
    assert re.findall(r".*(?:igb|e1000e|eth0|NETDEV|pci|AER|irq).*", new) == []


def test_each_interrupt_that_came_before_comes_after(carried: Carried) -> None:
    came = {name for name, counts in carried.before.interrupts.items() if sum(counts) > 1}
    assert came
    assert grown(carried.after.interrupts, carried.linux.guest.interrupts("eth0")) >= came


def test_interrupts_come_to_the_cpu_that_they_are_sent_to_after_cpr(carried: Carried) -> None:
    guest, stream = carried.linux.guest, carried.stream
    traffic = set(guest.interrupts("eth0-"))
    assert traffic
    for cpu in (1, 0):
        guest.send_interrupts("eth0-", cpu)
        carried.linux.await_interrupts(traffic, cpu)
        there = guest.interrupts("eth0-")
        stream.moves()
        carried.linux.await_interrupts(traffic, cpu)
        now = guest.interrupts("eth0-")
        elsewhere = {name: now[name][1 - cpu] - there[name][1 - cpu] for name in traffic}
        assert elsewhere == dict.fromkeys(traffic, 0)


def test_all_data_is_intact(carried: Carried) -> None:
    sent, received = carried.stream.end()
    assert received
    assert set(received) == {sent}


def grown(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> set[str]:
    """The names of those that have been served in between."""
    return {name for name, counts in after.items() if sum(counts) > sum(before[name])}


def test_the_interrupt_of_the_link_comes(linux: LinuxRig) -> None:
    """The carrier is taken away, and given back, where the hardware is."""
    linux.unplug_cable()
    linux.plug_cable()


def test_the_driver_can_be_unbound_and_bound(linux: LinuxRig) -> None:
    linux.guest.run(
        """
        cd $(readlink -f /sys/class/net/eth0/device)
        at=$(basename $PWD); cd driver; echo $at > unbind; echo $at > bind
        """
    )
    linux.bring_up()
    stream = linux.stream()
    sent, received = stream.end()
    assert set(received) == {sent}


def test_a_second_cpr_carries_it_on(linux: LinuxRig) -> None:
    stream = linux.stream()
    linux.take_over()
    stream.moves()
    sent, received = stream.end()
    assert set(received) == {sent}
