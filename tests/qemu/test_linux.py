# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest's own driver has data pass through a device; then new QEMU takes over."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from fixtures.guests.base import Guest, Traffic
from fixtures.linux import LinuxBench, LinuxRig
from fixtures.linux.account import Account, account
from tests.qemu.test_guests import Behaviours, grown


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
    assert carried.after.mishaps == carried.before.mishaps


def test_the_driver_reports_nothing(carried: Carried) -> None:
    """Neither a reset, nor a time-out, nor an error of the bus."""
    new = carried.after.log.removeprefix(carried.before.log)
    assert re.findall(rf".*(?:{carried.linux.workload.complaints}).*", new) == []


def test_the_interrupts_that_are_not_of_data_come(linux: LinuxRig) -> None:
    if reason := linux.workload.data_alone:
        pytest.skip(reason)
    others = set(linux.interrupts()) - set(linux.interrupts(of_data=True))
    assert others
    before = linux.interrupts()
    linux.provoke()
    assert grown(before, linux.interrupts()) >= others
