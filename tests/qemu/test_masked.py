# SPDX-License-Identifier: GPL-2.0-or-later
"""Every second MSI vector is masked, and none is pending; then new QEMU takes over."""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same
from fixtures.rig import TakenOver

POINTS = Coverage(
    irq=("msi:2", "msi:8", "msi:32"),
    **SOUND,
    reset=("bus",),
    apic=("xapic",),
    iommu=("intel-iommu",),
)


@pytest.fixture(scope="module")
def taken_over(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> TakenOver:
    rig = bench.rig(point, request.addfinalizer)
    rig.enable()
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    rig.mask(*rig.vectors[1::2])
    rig.fire(*rig.vectors[::2])
    rig.check()
    return rig.take_over()


def test_masked_vectors_and_no_others_are_masked_after_cpr(taken_over: TakenOver) -> None:
    assert taken_over.after.masked == set(taken_over.rig.vectors[1::2])
    expect_same("configuration space", taken_over.before.config, taken_over.after.config)


def test_nothing_is_delivered_by_the_takeover(taken_over: TakenOver) -> None:
    assert taken_over.after.log_count == taken_over.before.log_count


def test_unmasked_vectors_fire_beside_those_that_are_masked(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.fire(*rig.vectors[::2])
    rig.check()


def test_masked_vectors_are_held_back_and_delivered_once_when_unmasked(
    taken_over: TakenOver,
) -> None:
    """By the masks that old QEMU set."""
    rig = taken_over.rig
    rig.fire(*rig.vectors[1::2])
    rig.check()
    rig.unmask(*rig.vectors[1::2])
    rig.await_delivery(*rig.vectors[1::2])
    rig.check(in_order=False)
