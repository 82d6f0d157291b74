# SPDX-License-Identifier: GPL-2.0-or-later
"""There is no room for the file with the guest's state; the guest stays in old QEMU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest

from fixtures.bench import LabBench, Survivor
from fixtures.coverage import SOUND, Coverage
from fixtures.cpr import MODES, CprError
from fixtures.matrix import Point
from fixtures.waiting import until

POINTS = Coverage(
    also=("msix:8,cpr-exec", "msix:8,cpr-reboot"),
    mode=("cpr-exec", "cpr-reboot"),
    irq=("msix:8",),
    **SOUND,
    container=("type1",),
    iommu=("intel-iommu",),
    endpoint=("ivshmem",),
    irqchip=("full",),
    apic=("xapic",),
)

#: Of the disk, and how much of it is left, in KiB.  The state takes more.
SIZE, LEFT = 64, 4


@pytest.fixture
def disk(bench: LabBench, point: Point) -> Iterator[PurePosixPath]:
    """A directory on a disk that is as good as full."""
    lab = bench.lab_with(point.iommu)
    place = lab.scratch / "disk"
    lab.run(f"mkdir {place} && mount -t tmpfs -o size={SIZE}k none {place}")
    lab.run(f"dd if=/dev/zero of={place}/filler bs=1k count={SIZE - LEFT}")
    yield place
    lab.run(f"umount -l {place} && rmdir {place}")


def test_the_failure_is_told_and_the_guest_goes_on_with_every_vector(
    survivor: Survivor, point: Point, disk: PurePosixPath
) -> None:
    with survivor.rig() as rig:
        rig.begin()
        sleeps = point.mode == "cpr-reboot"
        if sleeps:
            rig.suspend()
        old = rig.machine
        new = old.successor()
        new.main_path = disk / "state"
        rig.machines.append(new)
        with pytest.raises(CprError, match="No space left on device"):
            MODES[point.mode](old, new).run()
        goes_on_as = "suspended" if sleeps else "running"
        old.alive(
            lambda: until(lambda: old.status() == goes_on_as, "old QEMU to go on", 10, pause_s=0.01)
        )
        if sleeps:
            rig.wake()
            rig.use_all()
        rig.fire(*rig.vectors)
        rig.check()
        rig.machines.remove(new)
