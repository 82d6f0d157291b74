# SPDX-License-Identifier: GPL-2.0-or-later
"""MSI-X is enabled with the last vector alone unmasked; then new QEMU takes over."""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.matrix import Point
from fixtures.rig import TakenOver

POINTS = Coverage(
    "msix:8",
    irq=("msix:8", "msix:65"),
    **SOUND,
    iommu=("intel-iommu",),
    reset=("bus",),
    apic=("xapic",),
)


@pytest.fixture(scope="module")
def taken_over(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> TakenOver:
    rig = bench.rig(point, request.addfinalizer)
    last = rig.vectors[-1]
    rig.program(*rig.vectors)
    rig.unmask(last)
    rig.enable()
    rig.fire(last)
    rig.check()
    return rig.take_over()


def test_nothing_is_delivered_by_the_takeover(taken_over: TakenOver) -> None:
    assert taken_over.after.log_count == taken_over.before.log_count == 1


def test_it_is_delivered_once_after_cpr(taken_over: TakenOver) -> None:
    taken_over.rig.fire(taken_over.rig.vectors[-1])
    taken_over.rig.check()


def test_those_below_it_can_be_unmasked_after_cpr_and_fire(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.unmask(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.check()
