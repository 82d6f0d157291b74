# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest that is awake is refused a cpr-reboot; then it sleeps and wakes up, and new QEMU
takes over.

The fixtures are what happens, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fixtures.cpr import CprError, Reboot
from fixtures.guests.base import Traffic
from fixtures.linux import LinuxBench, LinuxRig
from fixtures.linux.account import Account, account
from tests.qemu.test_guests import expect_intact, grown


@dataclass(frozen=True)
class Awake:
    """A guest whose driver uses the device, with what it said on either side of what has happened.

    :ivar refused: what was said to a cpr-reboot.
    """

    linux: LinuxRig
    traffic: Traffic
    before: Account
    after: Account
    refused: str = ""


@pytest.fixture(scope="module", params=[("igb", "cpr-transfer"), ("igb", "cpr-exec")], ids="+".join)
def refused(request: pytest.FixtureRequest, linux_bench: LinuxBench) -> Awake:
    driver, mode = request.param
    if missing := {mode, Reboot.mode} - set(linux_bench.subject.capabilities.modes):
        pytest.skip(f"this QEMU has no {missing.pop()}")
    rig = linux_bench.rig(driver, mode, request.addfinalizer)
    traffic = rig.traffic()
    before = account(rig)
    with pytest.raises(CprError) as caught:
        Reboot(rig.machine).save()
    return Awake(rig, traffic, before, account(rig), str(caught.value))


@pytest.fixture(scope="module")
def slept(refused: Awake) -> Awake:
    linux = refused.linux
    before = account(linux)
    linux.suspend()
    linux.wake()
    return Awake(linux, refused.traffic, before, account(linux))


@pytest.fixture(scope="module")
def carried(slept: Awake) -> Awake:
    linux = slept.linux
    traffic = linux.traffic()
    before = account(linux)
    linux.take_over()
    return Awake(linux, traffic, before, account(linux))


def test_it_is_refused_with_a_reason_while_the_guest_is_awake(refused: Awake) -> None:
    assert "VFIO device only supports cpr-reboot for runstate suspended" in refused.refused


def test_the_guest_and_its_driver_notice_nothing_of_the_attempt(refused: Awake) -> None:
    before, after = refused.before, refused.after
    assert after.boot == before.boot
    assert (after.identity, after.mishaps) == (before.identity, before.mishaps)
    assert after.since(before).reports == set()


def test_every_interrupt_comes_after_the_attempt(refused: Awake) -> None:
    expect_every_interrupt(refused)


def test_the_guest_was_not_booted_when_it_woke_up(slept: Awake) -> None:
    before, after = slept.before, slept.after
    assert after.boot == before.boot
    assert after.log.count("PM: suspend exit") == before.log.count("PM: suspend exit") + 1
    assert after.identity == before.identity


def test_every_interrupt_comes_after_the_sleep(slept: Awake) -> None:
    expect_every_interrupt(slept)


def test_data_that_were_on_their_way_when_it_fell_asleep_are_intact(slept: Awake) -> None:
    expect_intact(slept.traffic)


def test_new_qemu_takes_over_from_a_guest_that_slept(carried: Awake) -> None:
    before, after = carried.before, carried.after
    assert after.boot == before.boot
    assert (after.identity, after.mishaps) == (before.identity, before.mishaps)


def test_every_interrupt_comes_after_the_cpr(carried: Awake) -> None:
    expect_every_interrupt(carried)


def test_all_data_is_intact(carried: Awake) -> None:
    expect_intact(carried.traffic)


def expect_every_interrupt(awake: Awake) -> None:
    """Those of data, and then the others."""
    linux = awake.linux
    awake.traffic.moves()
    assert set(awake.after.interrupts) == set(awake.before.interrupts)
    if reason := linux.workload.data_alone:
        of_data = set(linux.interrupts(of_data=True))
        assert grown(awake.after.interrupts, linux.interrupts()) >= of_data
        pytest.skip(f"those of data have come; as for the others, {reason}")
    linux.provoke()
    assert grown(awake.after.interrupts, linux.interrupts()) == set(awake.before.interrupts)
