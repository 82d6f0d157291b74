# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that new QEMU could not have is refused, and the guest does not notice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.cpr import CprError, Transfer
from fixtures.matrix import Point
from fixtures.rig import Rig

POINTS = Coverage(
    also=("msix:8",),
    mode=("cpr-transfer",),
    irq=("msix:8",),
    **SOUND,
    container=("type1",),
    iommu=("intel-iommu",),
    endpoint=("ivshmem",),
    irqchip=("full",),
    apic=("xapic",),
)


@pytest.fixture
def off(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Rig:
    return bench.rig_without_power(point, request.addfinalizer)


def refused(rig: Rig) -> str:
    cpr = Transfer(rig.machine)
    rig.machines.append(cpr.new)
    with pytest.raises(CprError) as caught:
        cpr.run()
    assert not rig.machine.monitor.seen("STOP")
    assert rig.machine.status() == "running"
    return str(caught.value)


def test_memory_of_the_guest(off: Rig) -> None:
    off.machine.spec = replace(off.machine.spec, share=False)
    off.machine.start()
    assert "ram0" in refused(off)


def test_other_memory_of_the_machine(off: Rig) -> None:
    off.machine.spec = replace(off.machine.spec, aux_share=False)
    off.power_on()
    off.use_all()
    assert "aux-ram-share" in refused(off)
    off.fire(*off.vectors)
    off.check()
