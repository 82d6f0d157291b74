# SPDX-License-Identifier: GPL-2.0-or-later
"""The pin has a request behind Interrupt Disable; then new QEMU takes over."""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import Coverage
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same
from fixtures.rig import TakenOver

POINTS = Coverage(
    irq=("intx",),
    accel=("kvm",),
    reset=("bus",),
    apic=("xapic",),
    iommu=("intel-iommu",),
)


@pytest.fixture(scope="module")
def taken_over(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> TakenOver:
    rig = bench.rig(point, request.addfinalizer)
    rig.enable()
    rig.program(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.mask(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.check()
    return rig.take_over()


def test_interrupt_disable_is_set_after_cpr(taken_over: TakenOver) -> None:
    assert taken_over.after.masked == set(taken_over.rig.vectors)
    expect_same("configuration space", taken_over.before.config, taken_over.after.config)


def test_nothing_is_delivered_by_the_takeover(taken_over: TakenOver) -> None:
    assert taken_over.after.log_count == taken_over.before.log_count


def test_the_request_is_delivered_once_when_it_is_cleared(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.unmask(*rig.vectors)
    rig.await_delivery(*rig.vectors)
    rig.check()
    rig.begin()
    rig.fire(*rig.vectors)
    rig.check()
