# SPDX-License-Identifier: GPL-2.0-or-later
"""Vectors fire when old QEMU has handed the guest over, and new QEMU has not loaded it yet."""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import MSIX, Coverage
from fixtures.matrix import Point
from fixtures.rig import Rig, TakenOver

POINTS = Coverage(
    also=("msix:64", "intx"),
    irq=("msix:64", "msi:8", "intx"),
    accel=("kvm",),
    iommu=("intel-iommu",),
    reset=("bus",),
)

#: Of four vectors in a row: how often each fires, and which is masked.
TIMES = (1, 3, 0, 2)
MASKED = 3


def masked(rig: Rig) -> list[int]:
    return [n for n in rig.vectors if n % 4 == MASKED]


@pytest.fixture(scope="module")
def taken_over(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> TakenOver:
    rig = bench.rig(point, request.addfinalizer)
    rig.use_all()
    if point.irq in MSIX:
        rig.mask(*masked(rig))
    rig.begin()

    def between() -> None:
        rig.model.stop()
        for time in range(max(TIMES)):
            rig.fire(*(n for n in rig.vectors if TIMES[n % 4] > time))

    result = rig.take_over(between)
    rig.model.cont()
    return result


def test_each_vector_that_fired_is_delivered_exactly_once_however_often_it_did(
    taken_over: TakenOver,
) -> None:
    """An eventfd that nobody reads holds one more event, and no queue of them (eventfd(2))."""
    rig = taken_over.rig
    rig.await_delivery(*set(rig.model.delivered))
    rig.check(in_order=False)


@pytest.mark.limits(irq=MSIX)
def test_those_that_are_masked_are_pending(taken_over: TakenOver) -> None:
    assert taken_over.before.pending == set()
    assert taken_over.after.pending == set(masked(taken_over.rig))


@pytest.mark.limits(irq=MSIX)
def test_they_are_delivered_once_when_unmasked(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.begin()
    rig.unmask(*masked(rig))
    rig.await_delivery(*masked(rig))
    rig.check(in_order=False)


def test_the_device_is_not_reset(taken_over: TakenOver) -> None:
    assert taken_over.after.witness == taken_over.before.witness != 0


@pytest.mark.usefixtures("traces")
@pytest.mark.limits(path=("kvm",))
def test_vectors_bypass_qemu_again_and_are_delivered_once(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.begin()
    mark = rig.machine.trace_mark()
    rig.fire(*rig.vectors)
    rig.check()
    assert rig.handled_by_qemu(mark) == 0
