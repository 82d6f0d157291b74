# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest's own driver has data pass through a device; then new QEMU takes over.

In a cpr-reboot the guest sleeps on the way; what that does by itself is seen beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fixtures.guests.base import Guest, Traffic
from fixtures.linux import LinuxBench, LinuxRig
from fixtures.linux.account import Account, Befallen, account
from fixtures.linux.nic import Networking
from tests.qemu.test_guests import Behaviours, expect_intact, grown

TRANSFER, EXEC, REBOOT = "cpr-transfer", "cpr-exec", "cpr-reboot"
GUESTS = [
    *(("igb", mode) for mode in (TRANSFER, EXEC, REBOOT)),
    *(("nvme", mode) for mode in (TRANSFER, EXEC, REBOOT)),
    *(("igbvf", mode) for mode in (TRANSFER, REBOOT)),
    *(("e1000e", mode) for mode in (TRANSFER, REBOOT)),
]
#: Those that pass a test of their driver's own.  An e1000e as QEMU emulates it fails three parts of
#: five, whatever has been, and nvme has none.
TESTED = [guest for guest in GUESTS if guest[0] in ("igb", "igbvf")]


@dataclass(frozen=True)
class Carried:
    """A guest after a CPR, with what it said on either side of it.

    :ivar usual: what befalls its device without a CPR: nothing, unless it has to sleep.
    """

    linux: LinuxRig
    traffic: Traffic
    before: Account
    after: Account
    usual: Befallen

    @property
    def befallen(self) -> Befallen:
        """What has befallen the device in the CPR."""
        return self.after.since(self.before)


@pytest.fixture(scope="module", params=GUESTS, ids="+".join)
def carried(request: pytest.FixtureRequest, linux_bench: LinuxBench) -> Carried:
    driver, mode = request.param
    if mode not in linux_bench.subject.capabilities.modes:
        pytest.skip(f"this QEMU has no {mode}")
    rig = linux_bench.rig(driver, mode, request.addfinalizer)
    traffic = rig.traffic()
    at_first = account(rig)
    if rig.sleeps:
        rig.suspend()
        rig.wake()
        traffic.moves()
    before = account(rig)
    rig.take_over()
    after = account(rig)
    if after.boot == before.boot:  # else a test will tell, and nothing passes
        traffic.moves()
    return Carried(rig, traffic, before, after, before.since(at_first))


@pytest.fixture
def linux(carried: Carried) -> LinuxRig:
    return carried.linux


@pytest.fixture
def guest(linux: LinuxRig) -> Guest:
    return linux


class TestGuest(Behaviours):
    """What must hold of any guest."""


def test_the_guest_knows_the_device_by_the_same_names(carried: Carried) -> None:
    """An interface with its addresses, as the agent tells; a disk with its serial number."""
    assert carried.after.identity == carried.before.identity


def test_nothing_has_befallen_the_device(carried: Carried) -> None:
    """No carrier is lost, no transmitter hangs, no controller is reset."""
    assert carried.befallen.mishaps == carried.usual.mishaps


def test_the_driver_reports_nothing(carried: Carried) -> None:
    """Neither a reset, nor a time-out, nor an error of the bus."""
    assert carried.befallen.reports - carried.usual.reports == set()


def test_the_interrupts_that_are_not_of_data_come(linux: LinuxRig) -> None:
    if reason := linux.workload.data_alone:
        pytest.skip(reason)
    others = set(linux.interrupts()) - set(linux.interrupts(of_data=True))
    assert others
    before = linux.interrupts()
    linux.provoke()
    assert grown(before, linux.interrupts()) >= others


@pytest.mark.parametrize("carried", TESTED, indirect=True, ids="+".join)
def test_the_device_passes_its_drivers_own_test(linux: LinuxRig) -> None:
    """Its registers, its EEPROM, its interrupts, a packet that it sends to itself, and its link; of
    a virtual function, the last."""
    assert isinstance(linux.workload, Networking)
    found = linux.workload.self_test(linux.guest)
    assert len(found) == linux.workload.self_tests
    assert {part: errors for part, errors in found.items() if errors} == {}
    expect_intact(linux.traffic())
