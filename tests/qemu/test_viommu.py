# SPDX-License-Identifier: GPL-2.0-or-later
"""An IOMMU of the guest's translates what the device reads and writes; then new QEMU takes over."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fixtures.bench import LabBench
from fixtures.endpoints.vfio_user import DmaError, VfioUserEndpoint
from fixtures.endpoints.vfio_user.witness import DmaUnmapped
from fixtures.guests.translation import PAGE, Translation
from fixtures.rig import Rig
from fixtures.several import Arrangements, Together
from fixtures.waiting import until
from tests.qemu.test_rollback import expect_dma

POINTS = Arrangements(also=("msix:8+vfio-user+split+viommu",))

#: Pages of RAM, clear of the probe's own, that the device is given as its pages FIRST, ...
RAM = (0x7_0000, 0x7_2000, 0x7_4000)
FIRST, SECOND, THIRD = 3, 4, 200


@dataclass(frozen=True)
class Translated:
    """A guest after a CPR, whose device had two pages before it.

    :ivar unmapped: what was taken from the device in the CPR.
    """

    rig: Rig
    endpoint: VfioUserEndpoint
    pages: Translation
    at: tuple[int, int]
    unmapped: list[DmaUnmapped]


@pytest.fixture(scope="module")
def translated(request: pytest.FixtureRequest, bench: LabBench, point: Together) -> Translated:
    rig = bench.rig(point, request.addfinalizer)
    rig.use_all()
    endpoint = rig.endpoint
    assert isinstance(endpoint, VfioUserEndpoint)
    pages = Translation(rig.guest, rig.function.slot)
    at = pages.map(FIRST, RAM[0]), pages.map(SECOND, RAM[1])
    for address, place in zip(at, RAM, strict=False):
        expect_mapped(rig, endpoint, address, place)
    mark = endpoint.witness.mark()
    rig.take_over()
    return Translated(rig, endpoint, pages, at, endpoint.witness.since(mark, DmaUnmapped))


def expect_mapped(rig: Rig, endpoint: VfioUserEndpoint, address: int, place: int) -> None:
    """A page of the device's is one of the guest's RAM, to its end."""
    until(lambda: reaches(endpoint, address), f"the device to be given {address:#x}", 10)
    expect_dma(rig, address, place)
    expect_dma(rig, address + PAGE - 16, place + PAGE - 16)


def reaches(endpoint: VfioUserEndpoint, address: int) -> bool:
    try:
        return bool(endpoint.dma_read(address, 1))
    except DmaError:
        return False


def test_no_page_is_taken_from_the_device_in_the_takeover(translated: Translated) -> None:
    assert translated.unmapped == []


def test_dma_reaches_the_same_pages_as_before(translated: Translated) -> None:
    for address, place in zip(translated.at, RAM, strict=False):
        expect_mapped(translated.rig, translated.endpoint, address, place)


def test_what_the_guest_maps_now_is_reached_as_well(translated: Translated) -> None:
    address = translated.pages.map(THIRD, RAM[2])
    expect_mapped(translated.rig, translated.endpoint, address, RAM[2])


def test_what_the_guest_takes_away_is_not_reached_any_more(translated: Translated) -> None:
    address = translated.pages.unmap(FIRST)
    until(lambda: not reaches(translated.endpoint, address), f"{address:#x} to be taken away", 10)
    expect_mapped(translated.rig, translated.endpoint, translated.at[1], RAM[1])


def test_every_vector_is_delivered_exactly_once_and_in_order(translated: Translated) -> None:
    rig = translated.rig
    rig.begin()
    rig.fire(*rig.vectors)
    rig.check()
