# SPDX-License-Identifier: GPL-2.0-or-later
"""Vectors fire all the time, each again once it is delivered, or masked; new QEMU takes over."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import MESSAGES, MSIX, Coverage
from fixtures.cpr import Cpr, Step
from fixtures.matrix import Point
from fixtures.rig import Rig
from fixtures.storm import Storm

POINTS = Coverage(
    also=("msix:64", "intx", "intx,path=qemu"),
    irq=("msix:64", "msi:32", "intx"),
    container=("type1",),
    accel=("kvm",),
    iommu=("intel-iommu",),
    reset=("bus",),
    irqchip=("full",),
    apic=("xapic", "smp"),
)


#: Of eight vectors in a row, which is masked.
MASKED = 5


def masked(rig: Rig) -> list[int]:
    return [n for n in rig.vectors if n % 8 == MASKED]


@dataclass(frozen=True)
class Stormy:
    """A rig after a CPR in a storm."""

    rig: Rig
    cpr: Cpr
    storm: Storm


@pytest.fixture(scope="module")
def stormy(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Stormy:
    rig = bench.rig(point, request.addfinalizer)
    rig.use_all()
    if point.irq in MSIX:
        rig.mask(*masked(rig))
    with Storm(rig) as storm:
        cpr = rig.hand_over()
        storm.goes_on()
    rig.time_deliveries()
    cpr.leave()
    return Stormy(rig, cpr, storm)


def test_it_goes_on_through_all_of_the_takeover(stormy: Stormy) -> None:
    times, during = stormy.cpr.times, stormy.storm.during
    assert during(0, times[Step.MIGRATE]) > 0
    assert during(times[Step.MIGRATE], times[Step.RUNNING]) > 0


@pytest.mark.limits(irq=MESSAGES)
def test_each_event_is_delivered_exactly_once(stormy: Stormy) -> None:
    stormy.rig.await_delivery(*stormy.rig.vectors)
    stormy.rig.check(in_order=False)


@pytest.mark.limits(irq=("intx",))
def test_no_request_is_left_and_the_next_one_is_served(stormy: Stormy) -> None:
    rig = stormy.rig
    rig.await_delivery(0)
    assert rig.observe().pending == set()
    rig.begin()
    rig.fire(0)


@pytest.mark.limits(irq=MSIX)
def test_what_fired_while_masked_is_delivered_once_when_unmasked(stormy: Stormy) -> None:
    rig = stormy.rig
    assert rig.model.pending == set(masked(rig))
    rig.begin()
    rig.unmask(*masked(rig))
    rig.await_delivery(*masked(rig))
    rig.check(in_order=False)


@pytest.mark.usefixtures("traces")
@pytest.mark.limits(path=("kvm",))
def test_vectors_bypass_qemu_again_and_are_delivered_once(stormy: Stormy) -> None:
    assert stormy.rig.delivered_by_qemu() == 0
