# SPDX-License-Identifier: GPL-2.0-or-later
"""A device is plugged into a Linux guest that runs, carried over, unplugged, and plugged in again.

The fixtures are what happens, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from fixtures.guests.base import Traffic
from fixtures.linux import LinuxBench, LinuxRig
from fixtures.rig import held
from tests.qemu.test_guests import expect_intact


@pytest.fixture(scope="module", params=["igb"])
def empty(request: pytest.FixtureRequest, linux_bench: LinuxBench) -> LinuxRig:
    return linux_bench.rig(request.param, "cpr-transfer", request.addfinalizer, plugged=False)


@pytest.fixture(scope="module")
def open_at_first(empty: LinuxRig) -> Mapping[str, int]:
    return held(empty.machine).counts


@pytest.fixture(scope="module")
def plugged(empty: LinuxRig, open_at_first: Mapping[str, int]) -> LinuxRig:
    del open_at_first  # has been looked at
    empty.plug()
    return empty


@pytest.fixture(scope="module")
def carried(plugged: LinuxRig) -> LinuxRig:
    traffic = plugged.traffic()
    plugged.take_over()
    expect_carried(traffic)
    return plugged


@pytest.fixture(scope="module")
def unplugged(carried: LinuxRig) -> LinuxRig:
    carried.unplug()
    return carried


@pytest.fixture(scope="module")
def left_open(unplugged: LinuxRig) -> Mapping[str, int]:
    return held(unplugged.machine).counts


@pytest.fixture(scope="module")
def carried_without(unplugged: LinuxRig, left_open: Mapping[str, int]) -> LinuxRig:
    del left_open  # has been looked at
    unplugged.take_over()
    return unplugged


@pytest.fixture(scope="module")
def plugged_again(carried_without: LinuxRig) -> LinuxRig:
    carried_without.plug()
    return carried_without


def expect_carried(traffic: Traffic) -> None:
    """Data pass after what has just been, and those that did through it are intact."""
    traffic.moves()
    expect_intact(traffic)


def test_what_was_hot_plugged_is_carried_over(carried: LinuxRig) -> None:
    expect_carried(carried.traffic())


def test_what_was_carried_over_can_be_unplugged(unplugged: LinuxRig) -> None:
    assert unplugged.machine.monitor.seen("DEVICE_DELETED")


def test_nothing_of_it_is_left_open(
    open_at_first: Mapping[str, int], left_open: Mapping[str, int]
) -> None:
    more = {kind: left_open[kind] - open_at_first.get(kind, 0) for kind in left_open}
    more.pop("anon_inode:kvm-vfio", None)  # one, for all that come and go (hw/vfio/helpers.c)
    assert {kind: number for kind, number in more.items() if number} == {}


def test_a_guest_whose_device_is_gone_is_carried_over(carried_without: LinuxRig) -> None:
    assert not [kind for kind in held(carried_without.machine).counts if "/dev/vfio" in kind]


def test_it_can_be_plugged_in_again(plugged_again: LinuxRig) -> None:
    expect_carried(plugged_again.traffic())


def test_new_qemu_can_be_given_the_device_by_its_monitor(plugged_again: LinuxRig) -> None:
    traffic = plugged_again.traffic()
    plugged_again.take_over_and_plug()
    expect_carried(traffic)


def test_the_next_new_qemu_has_it_on_its_command_line(plugged_again: LinuxRig) -> None:
    traffic = plugged_again.traffic()
    plugged_again.take_over()
    expect_carried(traffic)
