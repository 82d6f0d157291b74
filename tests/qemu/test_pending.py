# SPDX-License-Identifier: GPL-2.0-or-later
"""Vectors fire while their mask bit is set; then new QEMU takes over."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest

from fixtures.bench import Bench
from fixtures.oracle.observation import expect_same
from fixtures.rig import TakenOver


@dataclass(frozen=True)
class Scene:
    """All ``vectors`` are masked, and those in ``fired`` fire so many times."""

    vectors: int
    name: str
    fired: dict[int, int]

    def __str__(self) -> str:
        return f"{self.vectors}-{self.name}"


SCENES = (
    Scene(1, "only", {0: 1}),
    Scene(8, "several", {1: 1, 2: 3, 5: 2}),
    Scene(64, "all", dict.fromkeys(range(64), 1)),
)


@pytest.fixture(scope="module", params=SCENES, ids=str)
def scene(request: pytest.FixtureRequest) -> Scene:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def taken_over(request: pytest.FixtureRequest, bench: Bench, scene: Scene) -> TakenOver:
    rig = bench.rig(scene.vectors, request.addfinalizer)
    rig.enable()
    rig.program(*rig.vectors)
    # Each has been in use before: a masked vector that was never used has no eventfd at all.
    rig.unmask(*rig.vectors)
    rig.mask(*rig.vectors)
    for vector, times in scene.fired.items():
        rig.fire(*[vector] * times)
    rig.check()
    return rig.take_over()


def from_the_middle(vectors: set[int]) -> list[int]:
    """One in the middle, then from both ends: each has others above it, below it, or both."""
    left = deque(sorted(vectors))
    middle = left[len(left) // 2]
    left.remove(middle)
    return [middle, *(left.pop() if n % 2 else left.popleft() for n in range(len(left)))]


def test_pending_bits_are_set_before_cpr(taken_over: TakenOver, scene: Scene) -> None:
    assert taken_over.before.pending == set(scene.fired)


def test_pending_bits_are_the_same_after_cpr(taken_over: TakenOver, scene: Scene) -> None:
    assert taken_over.after.pending == set(scene.fired)


def test_masked_vectors_are_masked_after_cpr(taken_over: TakenOver) -> None:
    assert taken_over.after.masked == set(taken_over.rig.vectors)
    expect_same("the MSI-X table", taken_over.before.table, taken_over.after.table, 16)


def test_nothing_masked_is_delivered_by_the_takeover(taken_over: TakenOver) -> None:
    assert taken_over.after.log_count == taken_over.before.log_count


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
