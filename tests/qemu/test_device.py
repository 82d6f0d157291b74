# SPDX-License-Identifier: GPL-2.0-or-later
"""The device does DMA, and sees what is done to it; then new QEMU takes over."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.endpoints.vfio_user import VfioUserEndpoint
from fixtures.endpoints.vfio_user.dma import Pattern, PatternWriter
from fixtures.endpoints.vfio_user.witness import (
    ConfigWritten,
    DmaUnmapped,
    Event,
    IrqsSet,
    WasReset,
)
from fixtures.guests.probe import Op, Verb
from fixtures.machines.machine import Machine
from fixtures.matrix import Point
from fixtures.rig import TakenOver
from fixtures.waiting import until

POINTS = Coverage(
    endpoint=("vfio-user",),
    irq=("msix:8", "msi:8", "intx"),
    **SOUND,
    reset=("bus", "flr"),
    apic=("xapic",),
    irqchip=("full",),
)

#: Where DMA is known to reach the guest that it is meant for.  Once a guest has used the function,
#: the emulated VT-d does not tell it what iommufd maps for the next: its DMA goes on to the memory
#: of the guest before (seen with QEMU 11.1.3 and Linux 7.3 in the lab host).
TOLD: dict[str, Collection[str]] = {"container": ("type1",)}
#: Where in the guest's memory the device writes: clear of the probe's own.
RING, SLOTS = 0x60000, 512
RATE_HZ = 2000.0


@dataclass(frozen=True)
class Written:
    """A takeover under DMA.

    :ivar before: how many numbers the device had written before it.
    :ivar after: how many when new QEMU ran.
    :ivar told: what the device was told in between.
    :ivar pinned_before: how much memory was accounted to old QEMU as pinned, in KiB.
    :ivar pinned_after: how much to new QEMU, once old QEMU has gone.
    """

    taken_over: TakenOver
    endpoint: VfioUserEndpoint
    writer: PatternWriter
    before: int
    after: int
    told: list[Event]
    pinned_before: int
    pinned_after: int


@pytest.fixture(scope="module")
def written(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Iterator[Written]:
    rig = bench.rig(point, request.addfinalizer)
    rig.enable()
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.check()
    endpoint = rig.endpoint
    if not isinstance(endpoint, VfioUserEndpoint):
        pytest.skip("the device is not ours: it does no DMA for us, and says nothing of its resets")
    writer = endpoint.write_pattern(RING, SLOTS, RATE_HZ)
    try:
        until(lambda: writer.count > SLOTS, "the device to fill its ring", 10, pause_s=0.01)
        mark, before, pinned = endpoint.witness.mark(), writer.count, pinned_by(rig.machine)
        taken_over = rig.take_over()
        told = endpoint.witness.since(mark, Event)
        after = writer.count
        yield Written(
            taken_over, endpoint, writer, before, after, told, pinned, pinned_by(rig.machine)
        )
    finally:
        writer.stop()


def pinned_by(machine: Machine) -> int:
    """By the kernel's word: VmLck of proc(5)."""
    status = machine.host.run(f"cat /proc/{machine.process.pid}/status").out
    (size,) = re.findall(r"^VmLck:\s+(\d+) kB$", status, re.M)
    return int(size)


@pytest.fixture
def taken_over(written: Written) -> TakenOver:
    return written.taken_over


def of(kind: type[Event], written: Written) -> list[Event]:
    return [event for event in written.told if isinstance(event, kind)]


def test_the_device_is_not_reset(written: Written) -> None:
    assert of(WasReset, written) == []


def test_its_configuration_space_is_not_written(written: Written) -> None:
    assert of(ConfigWritten, written) == []


def test_its_interrupts_are_not_set_up_anew(written: Written) -> None:
    assert of(IrqsSet, written) == []


def test_no_memory_is_unmapped(written: Written) -> None:
    assert of(DmaUnmapped, written) == []


@pytest.mark.limits(container=("type1",))
def test_pinned_memory_is_accounted_to_new_qemu(written: Written) -> None:
    """Where there is a limit for it, that is: iommufd leaves out who has CAP_IPC_LOCK, type1 does
    not (Linux, drivers/vfio/vfio_iommu_type1.c, vfio_change_dma_owner)."""
    assert written.pinned_after == written.pinned_before > 0


def test_dma_goes_on_during_the_takeover_and_after_it(written: Written) -> None:
    assert written.after > written.before
    count = written.writer.count
    until(lambda: written.writer.count > count, "the device to write on", 10, pause_s=0.01)
    assert written.writer.stalls == 0


@pytest.mark.limits(**TOLD)
def test_the_guest_finds_what_the_device_wrote(written: Written) -> None:
    rig = written.taken_over.rig
    pattern: Pattern = written.writer.stop()
    assert rig.guest.memory(RING, SLOTS * 8) == pattern.ring(bytes(SLOTS * 8))


@pytest.mark.limits(**TOLD)
def test_the_device_reads_what_the_guest_wrote(written: Written) -> None:
    rig = written.taken_over.rig
    place = RING + SLOTS * 8
    rig.guest.batch([Op(Verb.WRITE, place, 0x600D_DA7A)])
    assert written.endpoint.dma_read(place, 4) == (0x600D_DA7A).to_bytes(4, "little")


def test_every_vector_fires_exactly_once_and_in_order(written: Written) -> None:
    rig = written.taken_over.rig
    rig.fire(*rig.vectors)
    rig.check()
