# SPDX-License-Identifier: GPL-2.0-or-later
"""Vectors fire while their mask bit is set; then new QEMU takes over."""

from __future__ import annotations

from collections import deque

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import MSI, MSIX, SOUND, Coverage
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same
from fixtures.rig import TakenOver

POINTS = Coverage(
    "msix:1",
    "msix:8",
    "msix:64",
    irq=("msix:1", "msix:8", "msix:33", "msix:64", "msix:65", "msix:150", "msi:8"),
    **SOUND,
    # What is pending is between QEMU and its guest.
    iommu=("intel-iommu",),
    reset=("bus",),
    apic=("xapic",),
)


def fired(vectors: range) -> dict[int, int]:
    """The vectors that fire, and how often: all of a large table, some of a small one."""
    if len(vectors) in (1, 64):
        return dict.fromkeys(vectors, 1)
    return {vector: times for vector, times in ((1, 1), (2, 3), (5, 2)) if vector in vectors}


@pytest.fixture(scope="module")
def taken_over(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> TakenOver:
    rig = bench.rig(point, request.addfinalizer)
    rig.enable()
    rig.program(*rig.vectors)
    # Each has been in use before: a masked vector that was never used has no eventfd at all.
    rig.unmask(*rig.vectors)
    rig.mask(*rig.vectors)
    for vector, times in fired(rig.vectors).items():
        rig.fire(*[vector] * times)
    rig.check()
    return rig.take_over()


def from_the_middle(vectors: set[int]) -> list[int]:
    """One in the middle, then from both ends: each has others above it, below it, or both."""
    left = deque(sorted(vectors))
    middle = left[len(left) // 2]
    left.remove(middle)
    return [middle, *(left.pop() if n % 2 else left.popleft() for n in range(len(left)))]


def test_pending_bits_are_set_before_cpr(taken_over: TakenOver) -> None:
    assert taken_over.before.pending == set(fired(taken_over.rig.vectors))


def test_pending_bits_are_the_same_after_cpr(taken_over: TakenOver) -> None:
    assert taken_over.after.pending == set(fired(taken_over.rig.vectors))


def test_masked_vectors_are_masked_after_cpr(taken_over: TakenOver) -> None:
    assert taken_over.after.masked == set(taken_over.rig.vectors)
    expect_same("the MSI-X table", taken_over.before.table, taken_over.after.table, 16)


def test_nothing_masked_is_delivered_by_the_takeover(taken_over: TakenOver) -> None:
    assert taken_over.after.log_count == taken_over.before.log_count


@pytest.mark.limits(irq=MSIX)
def test_each_pending_vector_is_delivered_once_when_unmasked(taken_over: TakenOver) -> None:
    """The PBA is compared after each: one vector's unmasking is not to touch another's bit."""
    rig = taken_over.rig
    idle = sorted(rig.model.masked - rig.model.pending)
    rig.unmask(*idle[1::2])
    rig.check()
    for vector in from_the_middle(rig.model.pending):
        assert rig.unmask_and_look(vector) == rig.model.pending
        rig.await_delivery(vector)
    rig.check()


@pytest.mark.limits(irq=MSI)
def test_each_pending_msi_vector_is_delivered_once_when_unmasked(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    for vector in from_the_middle(rig.model.pending):
        rig.unmask(vector)
        rig.await_delivery(vector)
        rig.check()


def test_vectors_that_fire_while_masked_after_cpr_become_pending(
    taken_over: TakenOver,
) -> None:
    """Those that CPR found masked, and have not been touched since, among them."""
    rig = taken_over.rig
    rig.fire(*sorted(rig.model.masked - rig.model.pending))
    rig.check()
    rig.mask(*rig.vectors)
    rig.fire(*rig.vectors[:3], *rig.vectors[-3:])
    rig.check()
    rig.unmask(rig.vectors[0])
    rig.await_delivery(rig.vectors[0])
    rig.check()


def test_pba_is_clear_when_all_are_unmasked(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.unmask(*rig.vectors)
    rig.await_delivery(*rig.vectors)
    assert rig.observe().pending == set()


def test_unmasked_vectors_fire_as_ever(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.unmask(*rig.vectors)
    rig.await_delivery(*rig.vectors)
    rig.begin()
    rig.fire(*rig.vectors)
    rig.check()
