# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest's own driver has data pass through a device; then new QEMU takes over."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from fixtures.linux import LinuxBench, LinuxRig, Traffic


@dataclass(frozen=True)
class Account:
    """The guest's account of itself.

    :ivar boot: what its kernel has else in each of its lives.
    :ivar uptime_s: since it was booted.
    :ivar mishaps: see `Workload.mishaps`.
    :ivar interrupts: how often each of the device's has been served, by each CPU.
    :ivar log: its kernel's.
    """

    boot: str
    uptime_s: float
    mishaps: dict[str, str]
    interrupts: dict[str, list[int]]
    log: str


def account(rig: LinuxRig) -> Account:
    guest = rig.guest
    return Account(
        guest.read("/proc/sys/kernel/random/boot_id"),
        float(guest.read("/proc/uptime").split()[0]),
        rig.workload.mishaps(guest),
        rig.interrupts(),
        guest.run(["dmesg"]),
    )


@dataclass(frozen=True)
class Carried:
    """A guest after a CPR, with what it said on either side of it."""

    linux: LinuxRig
    traffic: Traffic
    before: Account
    after: Account


@pytest.fixture(
    scope="module",
    params=[
        ("igb", "cpr-transfer"),
        ("igb", "cpr-exec"),
        ("igbvf", "cpr-transfer"),
        ("nvme", "cpr-transfer"),
        ("nvme", "cpr-exec"),
        ("e1000e", "cpr-transfer"),
    ],
    ids="+".join,
)
def carried(request: pytest.FixtureRequest, linux_bench: LinuxBench) -> Carried:
    driver, mode = request.param
    if mode not in linux_bench.subject.capabilities.modes:
        pytest.skip(f"this QEMU has no {mode}")
    rig = linux_bench.rig(driver, mode, request.addfinalizer)
    traffic = rig.traffic()
    before = account(rig)
    rig.take_over()
    after = account(rig)
    traffic.moves()
    return Carried(rig, traffic, before, after)


@pytest.fixture
def linux(carried: Carried) -> LinuxRig:
    return carried.linux


def test_the_agent_answers_in_new_qemu_and_its_guest_was_not_booted(carried: Carried) -> None:
    assert carried.after.boot == carried.before.boot
    assert carried.after.uptime_s > carried.before.uptime_s


def test_nothing_has_befallen_the_device(carried: Carried) -> None:
    """No carrier is lost, no transmitter hangs, no controller is reset."""
    assert carried.after.mishaps == carried.before.mishaps


def test_the_driver_reports_nothing(carried: Carried) -> None:
    """Neither a reset, nor a time-out, nor an error of the bus."""
    new = carried.after.log.removeprefix(carried.before.log)
    assert re.findall(rf".*(?:{carried.linux.workload.complaints}).*", new) == []


def test_each_interrupt_of_data_that_came_before_comes_after(carried: Carried) -> None:
    came = set(carried.before.interrupts) & set(carried.linux.interrupts(of_data=True))
    assert came
    assert all(sum(carried.before.interrupts[name]) for name in came)
    assert grown(carried.after.interrupts, carried.linux.interrupts()) >= came


def test_interrupts_come_to_the_cpu_that_they_are_sent_to_after_cpr(carried: Carried) -> None:
    linux = carried.linux
    for cpu in (1, 0):
        names = linux.workload.send_to(linux.guest, cpu)
        linux.await_interrupts(names, cpu)
        there = linux.interrupts()
        carried.traffic.moves()
        linux.await_interrupts(names, cpu)
        now = linux.interrupts()
        elsewhere = {name: now[name][1 - cpu] - there[name][1 - cpu] for name in names}
        assert elsewhere == dict.fromkeys(names, 0)


def test_all_data_is_intact(carried: Carried) -> None:
    expect_intact(carried.traffic)


def expect_intact(traffic: Traffic) -> None:
    portions = traffic.end()
    assert portions
    assert [came for _, came in portions] == [sent for sent, _ in portions]


def grown(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> set[str]:
    """The names of those that have been served in between."""
    return {name for name, counts in after.items() if sum(counts) > sum(before[name])}


def test_the_interrupts_that_are_not_of_data_come(linux: LinuxRig) -> None:
    if reason := linux.workload.data_alone:
        pytest.skip(reason)
    others = set(linux.interrupts()) - set(linux.interrupts(of_data=True))
    assert others
    before = linux.interrupts()
    linux.provoke()
    assert grown(before, linux.interrupts()) >= others


def test_the_driver_can_be_unbound_and_bound(linux: LinuxRig) -> None:
    linux.rebind()
    expect_intact(linux.traffic())


def test_a_second_cpr_carries_it_on(linux: LinuxRig) -> None:
    traffic = linux.traffic()
    linux.take_over()
    traffic.moves()
    expect_intact(traffic)


def test_after_a_reset_it_boots_and_a_third_cpr_carries_it_on(
    carried: Carried, linux: LinuxRig
) -> None:
    linux.reset()
    assert account(linux).boot != carried.before.boot
    traffic = linux.traffic()
    linux.take_over()
    traffic.moves()
    expect_intact(traffic)
