# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's driver uses the device; new QEMU takes over, and then this or that befalls the guest.

What must hold of any guest is written here, and tried on the probe; in test_linux.py, on Linux.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.driven import DrivenProbe
from fixtures.guests.base import Account, Guest, Traffic
from fixtures.matrix import Point

POINTS = Coverage(
    also=("msix:8+smp", "msi:8+smp+cpr-exec"),
    irq=("msix:8", "msi:8", "intx"),
    **SOUND,
    container=("type1",),
    iommu=("intel-iommu",),
    apic=("smp",),
    irqchip=("full",),
    bars=("mmap",),
    reset=("flr", "bus"),
)


class Carried(Protocol):
    """A guest after a CPR in which data passed, with what it said on either side of it."""

    @property
    def traffic(self) -> Traffic: ...

    @property
    def before(self) -> Account: ...

    @property
    def after(self) -> Account: ...


class Behaviours:
    """Of any guest: its module has the fixtures ``carried`` and ``guest``."""

    def test_it_was_not_booted_and_its_clock_went_on(self, carried: Carried) -> None:
        assert carried.after.boot == carried.before.boot
        assert carried.after.uptime_s > carried.before.uptime_s

    def test_each_interrupt_of_data_that_came_before_comes_after(
        self, carried: Carried, guest: Guest
    ) -> None:
        came = set(carried.before.interrupts) & set(guest.interrupts(of_data=True))
        assert came
        assert all(sum(carried.before.interrupts[name]) for name in came)
        assert grown(carried.after.interrupts, guest.interrupts()) >= came

    def test_interrupts_come_to_the_cpu_that_they_are_sent_to_after_cpr(
        self, carried: Carried, guest: Guest
    ) -> None:
        for cpu in (1, 0):
            names = guest.send_to(cpu)
            guest.await_interrupts(names, cpu)
            there = guest.interrupts()
            carried.traffic.moves()
            guest.await_interrupts(names, cpu)
            now = guest.interrupts()
            elsewhere = {name: now[name][1 - cpu] - there[name][1 - cpu] for name in names}
            assert elsewhere == dict.fromkeys(names, 0)

    def test_all_data_is_intact(self, carried: Carried) -> None:
        expect_intact(carried.traffic)

    def test_the_driver_can_be_unbound_and_bound(self, guest: Guest) -> None:
        guest.rebind()
        expect_intact(guest.traffic())

    def test_a_second_cpr_carries_it_on(self, guest: Guest) -> None:
        expect_carried(guest)

    def test_after_a_reset_it_boots_and_a_third_cpr_carries_it_on(
        self, carried: Carried, guest: Guest
    ) -> None:
        guest.reset()
        assert guest.boot() != carried.before.boot
        expect_carried(guest)


def expect_carried(guest: Guest) -> None:
    """A CPR through which data pass."""
    traffic = guest.traffic()
    guest.take_over()
    traffic.moves()
    expect_intact(traffic)


def expect_intact(traffic: Traffic) -> None:
    """End it; each portion has come as it was sent."""
    portions = traffic.end()
    assert portions
    assert [portion for portion in portions if len(set(portion)) > 1] == []


def grown(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> set[str]:
    """The names of those that have been taken in between."""
    return {name for name, counts in after.items() if sum(counts) > sum(before[name])}


class CarriedProbe:
    """See `Carried`."""

    def __init__(self, guest: DrivenProbe) -> None:
        self.guest = guest
        self.traffic = guest.traffic()
        self.before = guest.account()
        guest.take_over()
        self.after = guest.account()
        self.traffic.moves()


@pytest.fixture(scope="module")
def carried(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> CarriedProbe:
    return CarriedProbe(DrivenProbe(bench.rig(point, request.addfinalizer)))


@pytest.fixture
def guest(carried: CarriedProbe) -> Guest:
    return carried.guest


class TestProbe(Behaviours):
    """The probe, each interrupt of which is a portion of data."""
