# SPDX-License-Identifier: GPL-2.0-or-later
"""An IOMMU of a real QEMU remaps what a driver of ours has told it to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fixtures.guests.pci import MSI_ADDRESS
from fixtures.guests.probe import Op, Verb
from fixtures.guests.remapping import ENTRIES, REGISTERS, REMAP, STATUS, RemappedFunction
from fixtures.several import VIOMMU
from fixtures.waiting import until

Plugged = Any  # tests/suite/conftest.py


@pytest.fixture(scope="module")
def there(plugged: Callable[..., Plugged]) -> Plugged:
    return plugged(8, VIOMMU)


@pytest.fixture
def function(there: Plugged) -> RemappedFunction:
    """Enabled, all vectors programmed and unmasked."""
    function = RemappedFunction(there.guest, there.SLOT)
    function.set_control(enable=True)
    function.program(*range(8))
    function.set_mask(False, *range(8))
    return function


def arrives(there: Plugged, function: RemappedFunction, vector: int) -> bool:
    """Fire a vector, and wait for it where it must come."""
    at = function.idt_vector(vector)
    before = there.guest.count(at)
    there.endpoint.fire(vector)
    return bool(until(lambda: there.guest.count(at) == before + 1, "the vector", 20))


def test_the_iommu_says_that_it_remaps(function: RemappedFunction) -> None:
    assert function.guest.batch([Op(Verb.READ, REGISTERS + STATUS)])[0] & REMAP


def test_a_vector_goes_where_its_entry_says(there: Plugged, function: RemappedFunction) -> None:
    for vector in range(8):
        assert arrives(there, function, vector)


def test_no_message_names_a_cpu_or_a_vector(function: RemappedFunction) -> None:
    table = function.guest.batch(function.table_ops())
    messages = [(table[4 * n], table[4 * n + 2]) for n in range(8)]
    assert len(set(messages)) == 8
    assert all(address & ~MSI_ADDRESS for address, _ in messages)
    assert {data for _, data in messages} == {0}


def test_a_vector_moves_without_its_message(there: Plugged, function: RemappedFunction) -> None:
    before = function.guest.batch(function.table_ops())
    function.move(3)
    function.program(3)
    assert arrives(there, function, 3)
    assert function.guest.batch(function.table_ops()) == before


def test_a_vector_whose_entry_is_not_there_goes_nowhere(
    there: Plugged, function: RemappedFunction
) -> None:
    function.guest.batch([Op(Verb.WRITE, ENTRIES + 16 * function._handle(5), 0)])
    counters = there.guest.look().counters
    there.endpoint.fire(5)
    assert arrives(there, function, 6)
    after = there.guest.look().counters
    assert after[function.idt_vector(5)] == counters[function.idt_vector(5)]
    function.program(5)
    assert arrives(there, function, 5)
