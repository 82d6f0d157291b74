# SPDX-License-Identifier: GPL-2.0-or-later
"""The device is a vfio-user server, with as many vectors as MSI-X allows; there is no CPR."""

from __future__ import annotations

import pytest

from fixtures.direct import DirectBench, described
from fixtures.endpoints.vfio_user import Irq, VfioUserEndpoint
from fixtures.rig import Rig

# What 64 vectors show as well is not tried again: each pass over so many costs a second.


@pytest.fixture(scope="module", params=(2048,), ids=lambda n: f"{n}-vectors")
def rig(request: pytest.FixtureRequest, direct_bench: DirectBench) -> Rig:
    rig = direct_bench.rig(described(request.param), request.addfinalizer)
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    rig.enable()
    return rig


def test_enabling_gives_an_eventfd_to_every_vector(rig: Rig, endpoint: VfioUserEndpoint) -> None:
    """In as many messages as the server takes descriptors by."""
    assert endpoint.armed() == (Irq.MSIX, frozenset(rig.vectors))


def test_each_vector_is_delivered_exactly_once_and_in_order(rig: Rig) -> None:
    rig.fire(*rig.vectors)
    rig.check()


def test_masked_vectors_are_delivered_once_when_unmasked(rig: Rig) -> None:
    """However often they fired; and wherever the guest has them by then."""
    rig.mask(*rig.vectors)
    rig.change_message(*rig.vectors)
    rig.signal(*rig.vectors)
    rig.signal(*rig.vectors)
    rig.check(pba=False)
    rig.unmask(*rig.vectors)
    rig.await_delivery(*rig.vectors)
    rig.check(in_order=False)
