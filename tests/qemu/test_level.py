# SPDX-License-Identifier: GPL-2.0-or-later
"""The device has asserted its pin, and does not release it; then new QEMU takes over.

A pin is a level (PCI Local Bus Specification 3.0, 2.2.6): it is there when an input of the I/O
APIC is unmasked, and interrupts again at each end of an interrupt.  The fixtures are what happens,
one after the other.
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
    also=("intx", "intx,path=qemu"),
    irq=("intx",),
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
    """What is asserted, and acknowledged by nobody, interrupts again and again."""
    taken = rig.times_taken(0)
    rig.machine.alive(
        lambda: until(
            lambda: rig.times_taken(0) > taken + 3,
            "the guest to take more interrupts of a pin that stays asserted",
            WAIT_S,
            pause_s=0.01,
            but=rig.machine.stuck,
        )
    )


def release(rig: Rig) -> None:
    """From now on the handler acknowledges, and so is what there is."""
    rig.program(0)
    pin(rig).acknowledge()
    rig.observe()  # what was on its way has arrived
    rig.begin()


@pytest.fixture(scope="module")
def behind_a_mask(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Rig:
    rig = bench.rig(point, request.addfinalizer)
    rig.use_all()
    rig.begin()
    pin(rig).mask_input(True)
    rig.raise_blindly(0)
    rig.device.settle()
    rig.machine.settle()
    rig.hand_over().leave()
    return rig


@pytest.fixture(scope="module")
def unmasked(behind_a_mask: Rig) -> Rig:
    pin(behind_a_mask).mask_input(False)
    return behind_a_mask


@pytest.fixture(scope="module")
def asserted(unmasked: Rig) -> Rig:
    release(unmasked)
    pin(unmasked).ignore()
    unmasked.raise_blindly(0)
    expect_more(unmasked)
    unmasked.hand_over().leave()
    return unmasked


@pytest.fixture(scope="module")
def released(asserted: Rig) -> Rig:
    release(asserted)
    return asserted


def test_nothing_is_delivered_behind_a_masked_input(behind_a_mask: Rig) -> None:
    assert behind_a_mask.times_taken(0) == 0


def test_what_was_asserted_there_is_delivered_when_it_is_unmasked(unmasked: Rig) -> None:
    unmasked.await_delivery(0)


def test_so_is_what_comes_after_it(unmasked: Rig) -> None:
    release(unmasked)
    unmasked.fire(0)


# By KVM it is a matter of moments whether these show the known issue that those before always show.


@pytest.mark.limits(path=("qemu",))
def test_what_nobody_acknowledges_goes_on_to_interrupt(asserted: Rig) -> None:
    expect_more(asserted)


@pytest.mark.limits(path=("qemu",))
def test_it_interrupts_no_more_when_it_is_released(released: Rig) -> None:
    released.check()


@pytest.mark.limits(path=("qemu",))
def test_the_next_request_is_delivered(released: Rig) -> None:
    released.fire(0)
