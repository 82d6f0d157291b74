# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest is paused while QEMU is taken over from; vectors fire before, in between and after."""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import MSIX, Coverage
from fixtures.matrix import Point
from fixtures.rig import Rig

POINTS = Coverage(
    also=("msix:64", "intx"),
    irq=("msix:64", "msi:8", "intx"),
    accel=("kvm",),
    iommu=("intel-iommu",),
    reset=("bus",),
)


def firing(rig: Rig, moment: int) -> list[int]:
    """Of four vectors in a row, the first fires at each moment, and each of the others at one."""
    return [n for n in rig.vectors if n % 4 in (0, moment)]


def masked(rig: Rig) -> list[int]:
    """Of each kind of these, one in four."""
    return [n for n in rig.vectors if n // 4 % 4 == 3]


@pytest.fixture(scope="module")
def paused(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Rig:
    rig = bench.rig(point, request.addfinalizer)
    rig.use_all()
    if point.irq in MSIX:
        rig.mask(*masked(rig))
    rig.begin()
    rig.stop()
    rig.fire(*firing(rig, 1))
    rig.hand_over(lambda: rig.fire(*firing(rig, 2))).leave()
    rig.fire(*firing(rig, 3))
    return rig


@pytest.fixture(scope="module")
def resumed(paused: Rig) -> Rig:
    paused.cont()
    return paused


def test_it_stays_paused(paused: Rig) -> None:
    assert paused.machine.status() == "paused"
    assert paused.taken() == 0


def test_each_vector_that_fired_is_delivered_exactly_once_when_it_goes_on(resumed: Rig) -> None:
    resumed.check(in_order=False)


@pytest.mark.limits(irq=MSIX)
def test_those_that_are_masked_are_delivered_once_when_unmasked(resumed: Rig) -> None:
    resumed.begin()
    resumed.unmask(*masked(resumed))
    resumed.await_delivery(*masked(resumed))
    resumed.check(in_order=False)


@pytest.mark.usefixtures("traces")
@pytest.mark.limits(path=("kvm",))
def test_vectors_bypass_qemu_again_and_are_delivered_once(resumed: Rig) -> None:
    assert resumed.delivered_by_qemu() == 0
