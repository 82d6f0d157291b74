# SPDX-License-Identifier: GPL-2.0-or-later
"""MSI or MSI-X is disabled, never having been enabled or after use; then new QEMU takes over."""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same
from fixtures.rig import TakenOver

POINTS = Coverage(
    "msix:8",
    irq=("msix:8", "msi:8"),
    **SOUND,
    reset=("bus",),
    apic=("xapic",),
    iommu=("intel-iommu",),
)


@pytest.fixture(scope="module", params=("never-used", "after-use"))
def taken_over(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> TakenOver:
    rig = bench.rig(point, request.addfinalizer)
    if request.param == "after-use":
        rig.enable()
        rig.program(*rig.vectors)
        rig.unmask(*rig.vectors)
        rig.fire(*rig.vectors)
        rig.mask(*rig.vectors)
        rig.disable()
        rig.check()
    return rig.take_over()


def test_it_is_disabled_after_cpr(taken_over: TakenOver) -> None:
    expect_same("configuration space", taken_over.before.config, taken_over.after.config)
    expect_same("the MSI-X table", taken_over.before.table, taken_over.after.table, 16)


@pytest.mark.usefixtures("traces")
def test_no_vector_has_an_eventfd_in_either_qemu(taken_over: TakenOver) -> None:
    for eventfds in (taken_over.held_before.eventfds, taken_over.held_after.eventfds):
        assert [key for key in eventfds if key[0] in ("interrupt", "kvm_interrupt")] == []


def test_nothing_is_delivered_by_the_takeover(taken_over: TakenOver) -> None:
    assert taken_over.after.log_count == taken_over.before.log_count


def test_it_can_be_enabled_after_cpr_and_every_vector_fires(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.enable()
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.check()
