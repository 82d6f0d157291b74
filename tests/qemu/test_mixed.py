# SPDX-License-Identifier: GPL-2.0-or-later
"""Vectors are in every state there is, side by side; then new QEMU takes over."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same
from fixtures.rig import TakenOver


@dataclass(frozen=True)
class Mix:
    """A table of so many vectors; each state comes in turn, so that none has its own region.

    The first and the last vector, and those at the edge of a word, are pending.
    """

    vectors: int

    @property
    def unmasked(self) -> list[int]:
        return self._each_fourth(0)

    @property
    def masked(self) -> list[int]:
        """In use once, and masked since; their messages were changed meanwhile."""
        return self._each_fourth(1)

    @property
    def pending(self) -> list[int]:
        """Masked as well, and fired."""
        return sorted({*self._each_fourth(2), *self._edges})

    @property
    def unused(self) -> list[int]:
        return self._each_fourth(3)

    @property
    def _edges(self) -> set[int]:
        return {0, 31, 32, self.vectors - 1}

    def _each_fourth(self, first: int) -> list[int]:
        return [n for n in range(first, self.vectors, 4) if n not in self._edges]


POINTS = Coverage(
    "msix:64",
    irq=("msix:33", "msix:64", "msix:65"),
    **SOUND,
    reset=("bus",),
    apic=("xapic", "smp"),
    iommu=("intel-iommu",),
)


@pytest.fixture(scope="module")
def mix(point: Point) -> Mix:
    return Mix(point.vectors)


@pytest.fixture(scope="module")
def taken_over(
    request: pytest.FixtureRequest, bench: LabBench, point: Point, mix: Mix
) -> TakenOver:
    rig = bench.rig(point, request.addfinalizer)
    rig.enable()
    used = [*mix.unmasked, *mix.masked, *mix.pending]
    rig.program(*used)
    rig.unmask(*used)
    rig.mask(*mix.masked, *mix.pending)
    rig.change_message(*mix.masked)
    rig.fire(*mix.pending)
    rig.fire(*mix.unmasked)
    rig.check()
    return rig.take_over()


def test_masks_and_pending_bits_are_the_same_after_cpr(taken_over: TakenOver, mix: Mix) -> None:
    assert taken_over.after.masked == {*mix.masked, *mix.pending, *mix.unused}
    assert taken_over.after.pending == taken_over.before.pending == set(mix.pending)
    expect_same("the MSI-X table", taken_over.before.table, taken_over.after.table, 16)


def test_nothing_is_delivered_by_the_takeover(taken_over: TakenOver) -> None:
    assert taken_over.after.log_count == taken_over.before.log_count


@pytest.mark.usefixtures("traces")
def test_only_vectors_that_were_used_have_eventfds(taken_over: TakenOver, mix: Mix) -> None:
    vectors = {n for name, n in taken_over.held_before.eventfds if name == "interrupt"}
    assert vectors == {*mix.unmasked, *mix.masked, *mix.pending}
    assert dict(taken_over.held_after.eventfds) == dict(taken_over.held_before.eventfds)


def test_unmasked_vectors_fire_beside_the_others(taken_over: TakenOver, mix: Mix) -> None:
    rig = taken_over.rig
    rig.fire(*mix.unmasked)
    rig.check()


def test_an_unused_vector_can_be_enabled_after_cpr_and_fires(
    taken_over: TakenOver, mix: Mix
) -> None:
    """While others are pending, and stay so."""
    rig = taken_over.rig
    for vector in mix.unused:
        rig.program(vector)
        rig.unmask(vector)
        rig.fire(vector)
    rig.check()


def test_unmasking_delivers_what_was_pending_and_nothing_else(
    taken_over: TakenOver, mix: Mix
) -> None:
    rig = taken_over.rig
    rig.unmask(*mix.masked)
    rig.check()
    rig.unmask(*mix.pending)
    rig.await_delivery(*mix.pending)
    rig.check(in_order=False)


def test_a_message_changed_before_cpr_is_the_one_delivered_after_it(
    taken_over: TakenOver, mix: Mix
) -> None:
    rig = taken_over.rig
    rig.unmask(*mix.masked)
    rig.fire(*mix.masked)
    rig.check()


def test_all_of_them_fire_in_the_end(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    rig.await_delivery(*rig.vectors)
    rig.begin()
    rig.fire(*rig.vectors)
    rig.check()
