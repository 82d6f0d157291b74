# SPDX-License-Identifier: GPL-2.0-or-later
"""Function Mask is set, and vectors fire behind it; then new QEMU takes over."""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same
from fixtures.rig import TakenOver

POINTS = Coverage(
    "msix:64",
    irq=("msix:1", "msix:32", "msix:64", "msix:65"),
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
    rig.function_mask(True)
    rig.fire(*rig.vectors[::2])
    rig.check()
    return rig.take_over()


def test_function_mask_is_set_after_cpr(taken_over: TakenOver) -> None:
    expect_same("configuration space", taken_over.before.config, taken_over.after.config)
    assert taken_over.after.masked == set(), "the vectors' own mask bits"


def test_nothing_is_delivered_by_the_takeover(taken_over: TakenOver) -> None:
    assert taken_over.after.log_count == taken_over.before.log_count


def test_pending_bits_are_the_same_after_cpr(taken_over: TakenOver) -> None:
    assert taken_over.before.pending == set(taken_over.rig.vectors[::2])
    assert taken_over.after.pending == taken_over.before.pending


def test_vectors_that_fire_behind_the_function_mask_become_pending(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.function_mask(True)
    rig.fire(rig.vectors[-1])
    rig.check()


def test_all_pending_vectors_are_delivered_once_when_it_is_cleared(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.function_mask(False)
    rig.await_delivery(*rig.vectors)
    rig.check(in_order=False)


def test_vectors_fire_as_ever_when_it_is_cleared(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.function_mask(False)
    rig.await_delivery(*rig.vectors)
    rig.begin()
    rig.fire(*rig.vectors)
    rig.check()
