# SPDX-License-Identifier: GPL-2.0-or-later
"""The device has asserted its pin behind a masked input of the I/O APIC; then new QEMU takes over.

A pin is a level (PCI Local Bus Specification 3.0, 2.2.6): it is there when the input is unmasked.
"""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import Coverage
from fixtures.matrix import Point
from fixtures.rig import Rig
from tests.qemu.test_level import pin, release

POINTS = Coverage(
    also=("intx", "intx,path=qemu"),
    irq=("intx",),
    container=("type1",),
    accel=("kvm",),
    iommu=("intel-iommu",),
    reset=("bus",),
    irqchip=("full",),
    apic=("xapic",),
)


@pytest.fixture(scope="module")
def behind_a_mask(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Rig:
    rig = bench.rig(point, request.addfinalizer)
    rig.use_all()
    pin(rig).mask_input(True)
    rig.endpoint.fire(0)
    rig.device.settle()
    rig.machine.settle()
    rig.begin()
    rig.hand_over().leave()
    return rig


def test_what_is_asserted_behind_a_masked_input_is_delivered_when_that_is_unmasked(
    behind_a_mask: Rig,
) -> None:
    assert behind_a_mask.times_taken(0) == 0
    pin(behind_a_mask).mask_input(False)
    behind_a_mask.model.fire(0)
    behind_a_mask.await_delivery(0)


def test_so_is_the_next_request(behind_a_mask: Rig) -> None:
    release(behind_a_mask)
    behind_a_mask.fire(0)
