# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest falls asleep and is left in files; its host is booted anew, and there it wakes up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.cpr import Reboot
from fixtures.guests.probe import Snapshot
from fixtures.hosts.base import Host
from fixtures.hosts.nested import LabHost
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same
from fixtures.rig import Rig

POINTS = Coverage(
    mode=("cpr-reboot",),
    container=("type1",),
    irq=("msix:8",),
    **SOUND,
    iommu=("intel-iommu",),
    reset=("bus",),
    irqchip=("full",),
    apic=("xapic",),
    bars=("mmap",),
    endpoint=("ivshmem",),
)


def boot_of(host: Host) -> bytes:
    """What a kernel has else in each of its lives."""
    return host.read(PurePosixPath("/proc/sys/kernel/random/boot_id"))


@dataclass(frozen=True)
class Moved:
    """The guest asleep on the host as it was, and as it is since.

    :ivar boots: the host's two lives.
    """

    rig: Rig
    boots: tuple[bytes, bytes]
    ram_before: bytes
    ram_after: bytes
    before: Snapshot
    status: str


@pytest.fixture(scope="module")
def moved(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Moved:
    if not isinstance(bench.lab_with(point.iommu), LabHost):
        pytest.skip("the host is not ours to boot anew")
    old = bench.rig(point, request.addfinalizer)
    old.use_all()
    old.suspend()
    cpr = Reboot(old.machine)
    cpr.save()
    host, size = old.machine.host, old.machine.spec.ram_mb << 20
    before, boot, ram = old.guest.look(), boot_of(host), old.guest.memory(0, size)
    state = host.read(cpr.state)

    bench.close()
    rig = bench.rig_without_power(point, request.addfinalizer)
    cpr.new = rig.machine
    cpr.state = rig.machine.main_path
    rig.machine.host.put(rig.machine.spec.ram, ram)
    rig.machine.host.put(cpr.state, state)
    cpr.load()
    boots = boot, boot_of(rig.machine.host)
    return Moved(rig, boots, ram, rig.guest.memory(0, size), before, rig.machine.status())


@pytest.fixture(scope="module")
def rig(moved: Moved) -> Rig:
    """The rig once the guest is awake, and its driver uses the function again."""
    moved.rig.wake()
    moved.rig.use_all()
    return moved.rig


def test_the_host_has_been_booted_anew(moved: Moved) -> None:
    assert moved.boots[0] != moved.boots[1]


def test_the_guest_sleeps_in_new_qemu(moved: Moved) -> None:
    assert moved.status == "suspended"


def test_guest_ram_is_the_same_to_the_byte(moved: Moved) -> None:
    expect_same("guest RAM", moved.ram_before, moved.ram_after, 16)


def test_the_guest_goes_on_where_it_fell_asleep(moved: Moved, rig: Rig) -> None:
    now = rig.guest.look()
    assert now.loops > moved.before.loops > 0
    assert now.log_count == moved.before.log_count + len(rig.vectors)


def test_each_vector_is_delivered_exactly_once_and_in_order(rig: Rig) -> None:
    rig.fire(*rig.vectors)
    rig.check()


def test_masking_holds_a_vector_back_and_unmasking_delivers_it(rig: Rig) -> None:
    rig.mask(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.check()
    rig.unmask(*rig.vectors)
    rig.await_delivery(*rig.vectors)
    rig.check(in_order=False)
