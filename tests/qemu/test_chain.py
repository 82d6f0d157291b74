# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU is taken over from many times in a row, and its vectors are used in each generation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same, expect_same_counts
from fixtures.rig import Rig, TakenOver

POINTS = Coverage(
    container=("type1",),
    irq=("msix:8",),
    **SOUND,
    iommu=("intel-iommu",),
    reset=("bus",),
    irqchip=("full",),
    apic=("xapic",),
    bars=("mmap",),
    endpoint=("ivshmem",),
)

#: In each mode.  What cpr-exec leaves open, the next new QEMU inherits.
GENERATIONS = {"cpr-transfer": 5, "cpr-exec": 10}
#: Masked from the first generation to the last, and of these FIRED is pending.
MASKED = (1, 6)
FIRED = 6


@pytest.fixture(scope="module")
def chain(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Sequence[TakenOver]:
    rig = bench.rig(point, request.addfinalizer)
    rig.use_all()
    rig.mask(*MASKED)
    rig.fire(FIRED)
    takeovers = []
    for _ in range(GENERATIONS[point.mode]):
        takeovers.append(rig.take_over())
        rig.begin()
        rig.fire(*(n for n in rig.vectors if n not in MASKED))
        rig.check()
    return takeovers


@pytest.fixture
def rig(chain: Sequence[TakenOver]) -> Rig:
    return chain[-1].rig


def test_nothing_is_delivered_by_any_takeover(chain: Sequence[TakenOver]) -> None:
    assert [each.after.log_count - each.before.log_count for each in chain] == [0] * len(chain)


def test_masks_and_pending_bits_are_the_same_in_each_generation(
    chain: Sequence[TakenOver],
) -> None:
    assert [each.after.masked for each in chain] == [set(MASKED)] * len(chain)
    assert [each.after.pending for each in chain] == [{FIRED}] * len(chain)


def test_config_space_and_msix_table_are_those_of_the_first_qemu(
    chain: Sequence[TakenOver],
) -> None:
    expect_same("configuration space", chain[0].before.config, chain[-1].after.config)
    expect_same("the MSI-X table", chain[0].before.table, chain[-1].after.table, 16)


def test_the_device_is_never_reset(chain: Sequence[TakenOver]) -> None:
    assert {each.after.witness for each in chain} == {chain[0].before.witness} != {0}


@pytest.mark.usefixtures("traces")
def test_the_eventfds_are_those_of_the_first_qemu(chain: Sequence[TakenOver]) -> None:
    first = dict(chain[0].held_before.eventfds)
    assert first
    assert [dict(each.held_after.eventfds) for each in chain] == [first] * len(chain)


@pytest.mark.usefixtures("same_build")
def test_new_qemu_holds_as_many_descriptors_of_each_kind_as_the_first(
    chain: Sequence[TakenOver],
) -> None:
    expect_same_counts("descriptors", chain[0].held_before.counts, chain[-1].held_after.counts)


def test_the_pending_vector_is_delivered_once_when_unmasked(rig: Rig) -> None:
    rig.begin()
    rig.unmask(*MASKED)
    rig.await_delivery(FIRED)
    rig.check()


@pytest.mark.usefixtures("traces")
def test_unmasked_vectors_bypass_qemu_again(rig: Rig) -> None:
    rig.unmask(*rig.vectors)
    rig.await_delivery()
    rig.begin()
    mark = rig.machine.trace_mark()
    rig.fire(*rig.vectors)
    rig.check()
    assert rig.handled_by_qemu(mark) == 0
