# SPDX-License-Identifier: GPL-2.0-or-later
"""An IOMMU of a real QEMU translates the DMA of a function as a driver of ours has told it to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from fixtures.endpoints.vfio_user import DmaError, VfioUserEndpoint
from fixtures.guests import ProbeGuest
from fixtures.guests.translation import PAGE, PAGES, Translation
from fixtures.hosts import LocalHost
from fixtures.machines import Machine
from fixtures.several import VIOMMU

SLOT, RAM = 4, 0x7_0000


@dataclass
class Plugged:
    """A machine with an IOMMU, and an endpoint of ours that does DMA."""

    guest: ProbeGuest
    endpoint: VfioUserEndpoint


@pytest.fixture(scope="module")
def there(local: LocalHost, a_machine: Callable[..., Machine]) -> Iterator[Plugged]:
    endpoint = VfioUserEndpoint()
    try:
        endpoint.listen(local.scratch / "translation.sock")
        device = endpoint.qemu_device("endpoint", bus="pcie.0", addr=f"{SLOT:x}")
        machine = a_machine(VIOMMU, device)
        machine.start()
        guest = ProbeGuest(machine.host, machine.spec.ram, machine.died)
        machine.alive(guest.wait_ready)
        yield Plugged(guest, endpoint)
    finally:
        endpoint.close()


@pytest.fixture(scope="module")
def pages(there: Plugged) -> Translation:
    return Translation(there.guest, SLOT)


def test_a_page_is_reached_while_it_is_mapped(there: Plugged, pages: Translation) -> None:
    address = pages.map(7, RAM)
    there.endpoint.dma_write(address + 16, b"a page's")
    assert there.guest.memory(RAM + 16, 8) == b"a page's"
    assert pages.unmap(7) == address
    with pytest.raises(DmaError):
        there.endpoint.dma_read(address, 1)


def test_two_pages_are_told_apart(there: Plugged, pages: Translation) -> None:
    first, last = pages.map(0, RAM), pages.map(PAGES - 1, RAM + PAGE)
    there.endpoint.dma_write(first, b"first")
    there.endpoint.dma_write(last, b"last!")
    assert there.guest.memory(RAM, 5) == b"first"
    assert there.guest.memory(RAM + PAGE, 5) == b"last!"


def test_nothing_is_where_the_guest_itself_has_the_page(there: Plugged, pages: Translation) -> None:
    pages.map(1, RAM)
    with pytest.raises(DmaError):
        there.endpoint.dma_read(RAM, 1)


@pytest.mark.parametrize("page", [-1, PAGES])
def test_there_is_no_such_page(pages: Translation, page: int) -> None:
    with pytest.raises(ValueError, match=f"there are pages 0 to 511, and no page {page}"):
        pages.map(page, RAM)
