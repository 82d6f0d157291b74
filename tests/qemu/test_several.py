# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest has several functions; one is in a storm, others have vectors pending; then a CPR."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from fixtures.bench import LabBench
from fixtures.cpr import Step
from fixtures.oracle.model import MsixModel
from fixtures.oracle.observation import expect_same_counts
from fixtures.rig import Rig, TakenOver, held
from fixtures.several import ARRANGEMENTS, Arrangements, Together
from fixtures.storm import Storm

POINTS = Arrangements(
    "msix:8+twins",
    also=(
        "msix:8+cpr-exec+twins",
        "msix:8+kinds",
        "msix:8+virtual",
        "msix:8+multifunction",
        "msix:8+flr+vfio-user+multifunction",
        "msix:8+split+viommu",
        "msix:8+split+remapped",
        "msix:8+iommufd+trap+twins",
        "msix:8+cpr-exec+iommufd+trap+objects",
        "msix:8+iommufd+trap+mixed",
        "msix:8+iommufd+split+trap+apart",
    ),
)

#: Of every function but the first, where its pending bits survive: masked, and of these pending.
MASKED = (1, 2, 6)
FIRED = (2, 6)


@dataclass(frozen=True)
class Several:
    """All functions of a guest after a CPR; the first was in a storm."""

    taken_over: Sequence[TakenOver]
    storm: Storm

    @property
    def rigs(self) -> list[Rig]:
        return [each.rig for each in self.taken_over]

    @property
    def calm(self) -> list[TakenOver]:
        """All but the first, where they have masks that survive."""
        return [each for each in self.taken_over[1:] if isinstance(each.rig.model, MsixModel)]


@pytest.fixture(scope="module")
def several(request: pytest.FixtureRequest, bench: LabBench, point: Together) -> Several:
    first = bench.rig(point, request.addfinalizer)
    for rig in first.family:
        rig.use_all()
    for rig in first.family[1:]:
        if isinstance(rig.model, MsixModel):
            rig.mask(*of(rig, MASKED))
            rig.fire(*of(rig, FIRED))
        rig.begin()
    storm = Storm(first)
    return Several(first.take_all_over(during=storm), storm)


def of(rig: Rig, vectors: Sequence[int]) -> set[int]:
    """Those of some vectors that a function has."""
    return set(vectors) & set(rig.vectors)


@contextmanager
def counted_anew(several: Several) -> Iterator[list[Rig]]:
    """No function has a vector masked or pending; in the end, what each has taken is checked."""
    for rig in several.rigs:
        rig.unmask(*rig.vectors)
        rig.await_delivery(*rig.vectors)
    for rig in several.rigs:
        rig.begin()
    yield several.rigs
    for rig in several.rigs:
        rig.check()


def test_the_storm_goes_on_through_all_of_the_takeover(several: Several) -> None:
    times = several.taken_over[0].cpr.times
    assert several.storm.during(times[Step.MIGRATE], times[Step.RUNNING]) > 0


def test_each_event_of_the_storm_is_delivered_exactly_once(several: Several) -> None:
    first = several.rigs[0]
    first.await_delivery(*first.vectors)
    first.check(in_order=False)


def test_nothing_is_delivered_of_the_other_functions(several: Several) -> None:
    for rig in several.rigs[1:]:
        rig.check()


def test_masks_and_pending_bits_are_those_of_each_function(several: Several) -> None:
    assert not several.taken_over[0].after.pending
    for each in several.calm:
        assert each.before.pending == each.after.pending == of(each.rig, FIRED)
        assert each.after.masked == of(each.rig, MASKED)


def test_pending_vectors_are_delivered_once_when_unmasked(several: Several) -> None:
    for rig in [each.rig for each in several.calm]:
        rig.begin()
        rig.unmask(*of(rig, MASKED))
        rig.await_delivery(*of(rig, FIRED))
        rig.check(in_order=False)


def test_every_vector_of_every_function_is_delivered_exactly_once_and_in_order(
    several: Several,
) -> None:
    with counted_anew(several) as rigs:
        for rig in rigs:
            rig.fire(*rig.vectors)


@pytest.mark.usefixtures("traces")
def test_vectors_bypass_qemu_again(several: Several) -> None:
    with counted_anew(several) as rigs:
        mark = rigs[0].machine.trace_mark()
        for rig in rigs:
            rig.fire(*rig.vectors)
    assert [rig.handled_by_qemu(mark) for rig in several.rigs] == [0] * len(several.rigs)


def test_masking_holds_back_the_vectors_of_one_function_and_of_no_other(several: Several) -> None:
    with counted_anew(several) as rigs:
        last = rigs[-1]
        last.mask(*last.vectors)
        for rig in rigs:
            rig.fire(*rig.vectors)
        last.unmask(*last.vectors)
        last.await_delivery(*last.vectors)
        last.check(in_order=False)
        last.begin()


def test_a_message_changed_while_masked_is_the_one_delivered(several: Several) -> None:
    """Or, where an IOMMU remaps interrupts, an entry of its table that the message names still."""
    with counted_anew(several) as rigs:
        for rig in rigs:
            rig.mask(*rig.vectors)
            rig.change_message(*rig.vectors)
            rig.unmask(*rig.vectors)
            rig.fire(*rig.vectors)


@pytest.mark.usefixtures("traces")
def test_new_qemu_holds_the_same_eventfds_by_name_and_vector(several: Several) -> None:
    identities = []
    for each in several.taken_over:
        before = dict(each.held_before.eventfds)
        assert before
        assert dict(each.held_after.eventfds) == before
        identities += list(before.values())
    assert len(set(identities)) == len(identities)


@pytest.mark.usefixtures("same_build")
def test_new_qemu_holds_as_many_descriptors_of_each_kind(several: Several) -> None:
    each = several.taken_over[0]
    expect_same_counts("descriptors", each.held_before.counts, each.held_after.counts)


def test_no_configuration_space_is_written(several: Several) -> None:
    for each in several.taken_over:
        assert [line for line in each.config_writes if " @0x4 " in line] == []
        each.expect_same()


@pytest.mark.usefixtures("traces")
@pytest.mark.limits(container=("iommufd",))
def test_new_qemu_makes_no_page_table(several: Several) -> None:
    first, new = several.rigs[0].machines
    assert first.trace("iommufd_backend_alloc_hwpt")
    assert new.trace("iommufd_backend_alloc_hwpt") == []


@pytest.mark.usefixtures("traces")
def test_a_further_function_can_be_plugged_in(
    several: Several, bench: LabBench, point: Together
) -> None:
    """Into the container, or to the page table, of the first: new QEMU knows it still.  With an
    IOMMU in the machine, it gets one of its own."""
    machine = several.rigs[0].machine

    def containers() -> int:
        if point.container == "type1":
            return held(machine).counts["/dev/vfio/vfio"]
        return len(machine.trace("iommufd_backend_alloc_hwpt"))

    before = containers()
    machine.plug(bench.spare(point))
    assert containers() == before + ARRANGEMENTS[point.arrangement].viommu
    with counted_anew(several) as rigs:
        for rig in rigs:
            rig.fire(*rig.vectors)
