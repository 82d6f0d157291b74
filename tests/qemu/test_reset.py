# SPDX-License-Identifier: GPL-2.0-or-later
"""After a CPR, the guest's machine is reset, and its driver uses the function again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same, expect_same_counts
from fixtures.rig import WITNESS, Rig, held

POINTS = Coverage(
    "msix:8",
    irq=("msix:8", "msi:8", "intx"),
    **SOUND,
    container=("type1",),
    iommu=("intel-iommu",),
    apic=("xapic",),
    irqchip=("full",),
    bars=("mmap",),
    reset=("flr", "bus"),
)


@dataclass(frozen=True)
class Reset:
    """A guest that has been reset in new QEMU.

    :ivar at_first: the function's configuration space as the driver found it before the CPR.
    :ivar now: the same, after the reset.
    :ivar descriptors: those that new QEMU held before the reset.
    """

    rig: Rig
    at_first: bytes
    now: bytes
    descriptors: Mapping[str, int]


@pytest.fixture(scope="module")
def reset(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Reset:
    rig = bench.rig(point, request.addfinalizer)
    at_first = rig.function.config()
    rig.use_all()
    rig.take_over()
    descriptors = held(rig.machine).counts
    assert rig.function.read(*rig.endpoint.witness_register) == WITNESS
    rig.reset()
    now = rig.function.config()
    rig.use_all()
    return Reset(rig, at_first, now, descriptors)


@pytest.fixture
def rig(reset: Reset) -> Rig:
    return reset.rig


def test_the_device_is_reset_with_its_guest(rig: Rig) -> None:
    assert rig.found == 0


def test_the_function_is_as_its_driver_found_it_at_first(reset: Reset) -> None:
    expect_same("configuration space", reset.at_first, reset.now)


def test_each_vector_is_delivered_exactly_once_and_in_order(rig: Rig) -> None:
    rig.fire(*rig.vectors)
    rig.check()


def test_masking_holds_a_vector_back_and_unmasking_delivers_it(rig: Rig) -> None:
    rig.mask(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.check()
    rig.unmask(*rig.vectors)
    rig.await_delivery(*rig.vectors)
    rig.check(in_order=False)


def test_qemu_holds_as_many_descriptors_of_each_kind_as_before(reset: Reset) -> None:
    expect_same_counts("descriptors", reset.descriptors, held(reset.rig.machine).counts)
