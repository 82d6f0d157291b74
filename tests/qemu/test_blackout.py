# SPDX-License-Identifier: GPL-2.0-or-later
"""Vectors fire right before old QEMU hands the guest over, until new QEMU loads it, right after."""

from __future__ import annotations

from functools import partial

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import MESSAGES, MSIX, Coverage
from fixtures.cpr import MODES, Step
from fixtures.matrix import Point
from fixtures.rig import Rig, TakenOver

POINTS = Coverage(
    also=("msix:64", "intx"),
    irq=("msix:64", "msi:8", "intx"),
    accel=("kvm",),
    iommu=("intel-iommu",),
    reset=("bus",),
)

#: Of four vectors in a row: how often each fires, all at once, and which is masked.
TIMES = (1, 3, 0, 2)
MASKED = 3
#: Of eight in a row, which fires when old QEMU is about to be told to migrate, and which when the
#: guest has just been seen to run in new QEMU.
BEFORE, AFTER = 2, 6


def masked(rig: Rig) -> list[int]:
    return [n for n in rig.vectors if n % 4 == MASKED]


@pytest.fixture(scope="module")
def blackout(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> TakenOver:
    rig = bench.rig(point, request.addfinalizer)
    rig.use_all()
    if point.irq in MSIX:
        rig.mask(*masked(rig))
    rig.begin()

    def between() -> None:
        rig.model.stop()
        for time in range(max(TIMES)):
            rig.burst(*(n for n in rig.vectors if TIMES[n % 4] > time))

    def fire(moment: int) -> None:
        for vector in rig.vectors:
            if vector % 8 == moment:
                rig.endpoint.fire(vector)
                rig.model.fire(vector)

    def running() -> None:
        rig.model.cont()
        fire(AFTER)

    moments = {Step.MIGRATE: lambda: fire(BEFORE), Step.RUNNING: running}
    return rig.take_over(between, partial(MODES[point.mode], moments=moments))


@pytest.mark.limits(irq=MESSAGES)
def test_each_vector_that_fired_is_delivered_exactly_once_however_often_it_did(
    blackout: TakenOver,
) -> None:
    """An eventfd that nobody reads holds one more event, and no queue of them (eventfd(2))."""
    rig = blackout.rig
    rig.await_delivery(*set(rig.model.delivered))
    rig.check(in_order=False)


@pytest.mark.limits(irq=("intx",))
def test_a_pin_that_was_asserted_is_delivered(blackout: TakenOver) -> None:
    """At least once: see `IntxModel`."""
    blackout.rig.await_delivery(0)


@pytest.mark.usefixtures("traces")
@pytest.mark.limits(irq=("intx",), path=("kvm",))
def test_it_is_delivered_by_kvm_and_not_by_qemu_as_well(blackout: TakenOver) -> None:
    blackout.rig.await_delivery(0)
    assert blackout.rig.handled_by_qemu(0) == 0


@pytest.mark.limits(irq=("intx",))
def test_none_comes_when_the_device_has_released_its_pin(blackout: TakenOver) -> None:
    rig = blackout.rig
    rig.await_delivery(0)
    rig.observe()  # what was on its way has arrived
    rig.begin()
    rig.check()


@pytest.mark.limits(irq=MSIX)
def test_those_that_are_masked_are_pending(blackout: TakenOver) -> None:
    assert blackout.before.pending == set()
    assert blackout.after.pending == set(masked(blackout.rig))


@pytest.mark.limits(irq=MSIX)
def test_they_are_delivered_once_when_unmasked(blackout: TakenOver) -> None:
    rig = blackout.rig
    rig.begin()
    rig.unmask(*masked(rig))
    rig.await_delivery(*masked(rig))
    rig.check(in_order=False)


def test_the_device_is_not_reset(blackout: TakenOver) -> None:
    assert blackout.after.witness == blackout.before.witness != 0


def test_nothing_is_delivered_by_a_takeover_after_that(blackout: TakenOver) -> None:
    """What the eventfds held has been delivered by the first, and they hold it no more."""
    rig = blackout.rig
    rig.await_delivery(*rig.model.delivered)
    rig.begin()
    rig.take_over()
    rig.check()


@pytest.mark.usefixtures("traces")
@pytest.mark.limits(path=("kvm",))
def test_vectors_bypass_qemu_again_and_are_delivered_once(blackout: TakenOver) -> None:
    assert blackout.rig.delivered_by_qemu() == 0
