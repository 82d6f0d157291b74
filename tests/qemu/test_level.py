# SPDX-License-Identifier: GPL-2.0-or-later
"""The device does not release its pin, as nobody acknowledges it; then new QEMU takes over.

A pin is a level: it interrupts again at each end of an interrupt for as long as it is asserted
(PCI Local Bus Specification 3.0, 2.2.6).  With KVM it is a matter of moments whether the known
issue intx-stays-masked shows here: test_masked_input has what always does.
"""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import Coverage
from fixtures.guests.pci import IntxFunction
from fixtures.matrix import Point
from fixtures.rig import Rig
from fixtures.waiting import until

POINTS = Coverage(
    irq=("intx",),
    path=("qemu",),
    container=("type1",),
    accel=("kvm",),
    iommu=("intel-iommu",),
    reset=("bus",),
    irqchip=("full",),
    apic=("xapic",),
)
WAIT_S = 5.0


def pin(rig: Rig) -> IntxFunction:
    assert isinstance(rig.function, IntxFunction)
    return rig.function


def expect_more(rig: Rig) -> None:
    taken = rig.times_taken(0)
    until(
        lambda: rig.times_taken(0) > taken + 3,
        "the guest to take more interrupts of a pin that stays asserted",
        WAIT_S,
        pause_s=0.01,
    )


def release(rig: Rig) -> None:
    """From now on the handler acknowledges, and so is what there is."""
    rig.program(0)
    pin(rig).acknowledge()
    rig.observe()  # what was on its way has arrived
    rig.begin()


@pytest.fixture(scope="module")
def asserted(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Rig:
    rig = bench.rig(point, request.addfinalizer)
    rig.use_all()
    pin(rig).ignore()
    rig.endpoint.fire(0)
    expect_more(rig)
    rig.hand_over().leave()
    return rig


@pytest.fixture(scope="module")
def released(asserted: Rig) -> Rig:
    release(asserted)
    return asserted


def test_it_goes_on_to_interrupt(asserted: Rig) -> None:
    expect_more(asserted)


def test_it_interrupts_no_more_when_it_is_released(released: Rig) -> None:
    released.check()


def test_the_next_request_is_delivered(released: Rig) -> None:
    released.fire(0)
