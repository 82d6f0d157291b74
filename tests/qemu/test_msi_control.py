# SPDX-License-Identifier: GPL-2.0-or-later
"""MSI's Message Control was written with its read-only bits as 0; then new QEMU takes over.

Such a write is allowed: read-only bits keep their values (PCI 3.0, 6.8.1.3).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.guests.pci import MSI_WRITABLE, MsiFunction
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same
from fixtures.rig import Rig, TakenOver

POINTS = Coverage(
    irq=("msi:1", "msi:8"),
    **SOUND,
    endpoint=("vfio-user",),
    iommu=("intel-iommu",),
    container=("type1",),
    bars=("mmap",),
    reset=("bus",),
    apic=("xapic",),
    irqchip=("full",),
)


@dataclass(frozen=True)
class Written:
    """A rig, and its function's configuration space before the write and after it."""

    rig: Rig
    before: bytes
    after: bytes


@pytest.fixture(scope="module")
def written(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Written:
    rig = bench.rig(point, request.addfinalizer)
    rig.enable()
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    function = rig.function
    assert isinstance(function, MsiFunction)
    before = function.config()
    (control,) = struct.unpack_from("<H", before, function.control)
    function.write_config(function.control, control & MSI_WRITABLE, 2)
    return Written(rig, before, function.config())


@pytest.fixture(scope="module")
def rig(written: Written) -> Rig:
    return written.rig


@pytest.fixture(scope="module")
def taken_over(written: Written) -> TakenOver:
    return written.rig.take_over()


def test_the_write_changes_nothing(written: Written) -> None:
    expect_same("configuration space", written.before, written.after)


def test_each_vector_is_delivered_exactly_once_and_in_order_before_cpr(rig: Rig) -> None:
    rig.fire(*rig.vectors)
    rig.check()


def test_config_space_is_the_same(taken_over: TakenOver) -> None:
    expect_same("configuration space", taken_over.before.config, taken_over.after.config)


def test_each_vector_is_delivered_exactly_once_and_in_order_after_cpr(
    taken_over: TakenOver,
) -> None:
    rig = taken_over.rig
    rig.fire(*rig.vectors)
    rig.check()
