# SPDX-License-Identifier: GPL-2.0-or-later
"""The device is a vfio-user server, attached to QEMU without a host's VFIO; there is no CPR."""

from __future__ import annotations

import pytest

from fixtures.direct import DirectBench, described
from fixtures.endpoints.vfio_user import Irq, VfioUserEndpoint
from fixtures.rig import Rig


@pytest.fixture(scope="module", params=(1, 8, 64), ids=lambda n: f"{n}-vectors")
def rig(request: pytest.FixtureRequest, direct_bench: DirectBench) -> Rig:
    rig = direct_bench.rig(described(request.param), request.addfinalizer)
    rig.enable()
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    return rig


def test_every_vector_that_was_unmasked_has_an_eventfd(
    rig: Rig, endpoint: VfioUserEndpoint
) -> None:
    assert endpoint.armed() == (Irq.MSIX, frozenset(rig.vectors))


def test_each_vector_is_delivered_exactly_once_and_in_order(rig: Rig) -> None:
    rig.fire(*rig.vectors)
    rig.check()


def test_vectors_raised_while_the_guest_is_stopped_are_delivered_once_when_it_goes_on(
    rig: Rig,
) -> None:
    """However often they were: the local APIC has one bit for each (IRR)."""
    rig.machine.monitor.execute("stop")
    rig.signal(*rig.vectors)
    for vector in rig.vectors:
        rig.endpoint.fire(vector)
    rig.machine.settle()
    rig.machine.monitor.execute("cont")
    rig.await_delivery(*rig.vectors)
    rig.check(in_order=False)


def test_masked_vectors_are_delivered_once_when_unmasked(rig: Rig) -> None:
    """However often they fired."""
    rig.mask(*rig.vectors)
    rig.signal(*rig.vectors)
    rig.signal(*rig.vectors)
    rig.check(pba=False)
    rig.unmask(*rig.vectors)
    rig.await_delivery(*rig.vectors)
    rig.check(in_order=False)


def test_pending_bits_are_set_while_masked(rig: Rig) -> None:
    rig.mask(*rig.vectors)
    rig.signal(*rig.vectors)
    pending = rig.observe().pending
    rig.unmask(*rig.vectors)
    rig.await_delivery(*rig.vectors)
    assert pending == set(rig.vectors)


def test_function_mask_holds_all_vectors_back(rig: Rig) -> None:
    rig.function_mask(True)
    rig.signal(*rig.vectors)
    rig.check(pba=False)
    rig.function_mask(False)
    rig.await_delivery(*rig.vectors)
    rig.check(in_order=False)


def test_a_message_changed_while_masked_is_the_one_delivered(rig: Rig) -> None:
    rig.mask(*rig.vectors)
    rig.change_message(*rig.vectors)
    rig.unmask(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.check()


def test_disabling_takes_every_eventfd_back_and_enabling_gives_new_ones(
    rig: Rig, endpoint: VfioUserEndpoint
) -> None:
    rig.mask(*rig.vectors)
    rig.disable()
    assert endpoint.armed() is None
    rig.enable()
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    assert endpoint.armed() == (Irq.MSIX, frozenset(rig.vectors))
    rig.fire(*rig.vectors)
    rig.check()


def test_enabling_gives_an_eventfd_to_every_vector_that_is_unmasked_by_then(
    rig: Rig, endpoint: VfioUserEndpoint
) -> None:
    """All at once, in as many messages as the server takes descriptors by."""
    rig.disable()
    rig.enable()
    assert endpoint.armed() == (Irq.MSIX, frozenset(rig.vectors))
    rig.fire(*rig.vectors)
    rig.check()
