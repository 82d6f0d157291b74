# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU has been taken over from, its vectors have been used since; then it is taken over again."""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same, expect_same_counts
from fixtures.rig import TakenOver

POINTS = Coverage("msix:8", irq=("msix:8", "msix:65"), **SOUND, reset=("bus",), apic=("xapic",))

#: Masked after the first CPR.  Of these, FIRED fire before the second.
MASKED = (1, 2, 6)
FIRED = (2, 6)


@pytest.fixture(scope="module")
def first(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> TakenOver:
    rig = bench.rig(point, request.addfinalizer)
    rig.enable()
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    return rig.take_over()


@pytest.fixture(scope="module")
def taken_over(first: TakenOver) -> TakenOver:
    rig = first.rig
    rig.mask(*MASKED)
    rig.fire(*FIRED)
    rig.fire(*(n for n in rig.vectors if n not in MASKED))
    rig.check()
    return rig.take_over()


def test_masks_and_pending_bits_are_the_same(taken_over: TakenOver) -> None:
    assert taken_over.after.masked == set(MASKED)
    assert taken_over.after.pending == taken_over.before.pending == set(FIRED)


def test_nothing_is_delivered_by_the_takeover(taken_over: TakenOver) -> None:
    assert taken_over.after.log_count == taken_over.before.log_count


@pytest.mark.usefixtures("traces")
def test_the_eventfds_are_still_those_of_the_first_qemu(
    first: TakenOver, taken_over: TakenOver
) -> None:
    assert dict(taken_over.held_before.eventfds) == dict(first.held_after.eventfds)
    assert dict(taken_over.held_after.eventfds) == dict(first.held_before.eventfds)


@pytest.mark.usefixtures("same_build")
def test_new_qemu_holds_as_many_descriptors_of_each_kind_as_the_first(
    first: TakenOver, taken_over: TakenOver
) -> None:
    expect_same_counts("descriptors", first.held_before.counts, taken_over.held_after.counts)


def test_config_space_is_the_same(taken_over: TakenOver) -> None:
    expect_same("configuration space", taken_over.before.config, taken_over.after.config)


def test_the_device_is_not_reset(taken_over: TakenOver) -> None:
    assert taken_over.after.witness == taken_over.before.witness != 0


def test_pending_vectors_are_delivered_once_when_unmasked(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.unmask(*MASKED)
    rig.await_delivery(*rig.vectors)
    rig.check(in_order=False)


def test_every_vector_fires_exactly_once_and_in_order(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.rest()
    rig.fire(*rig.vectors)
    rig.check()


@pytest.mark.usefixtures("traces")
@pytest.mark.limits(path=("kvm",))
def test_unmasked_vectors_bypass_qemu_again(taken_over: TakenOver) -> None:
    assert taken_over.rig.delivered_by_qemu() == 0
