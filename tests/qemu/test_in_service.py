# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest is in the handler of an interrupt, and others wait for its end; then a CPR."""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench
from fixtures.guests.probe import TIMER_VECTOR
from fixtures.matrix import Point
from fixtures.rig import Rig
from fixtures.waiting import until
from tests.qemu.test_apic import POINTS

__all__ = ["POINTS"]

#: What is in service keeps others of its priority waiting, though its handler would let them
#: interrupt it (Intel SDM, volume 3, 12.8.3 and 12.8.4).
IN_SERVICE = 0
#: So often the guest's timer, which is of higher priority, interrupts that handler in new QEMU.
TICKS = 5


@pytest.fixture(scope="module")
def in_service(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Rig:
    rig = bench.rig(point, request.addfinalizer)
    rig.use_all()
    rig.begin()
    rig.guest.hold(rig.function.idt_vector(IN_SERVICE))
    rig.raise_blindly(IN_SERVICE)
    until(lambda: rig.times_taken(IN_SERVICE) >= 1, "the guest to be in the handler", 10)
    rig.model.stop()
    if others := [n for n in rig.vectors if n != IN_SERVICE]:
        rig.fire(*others)
    rig.hand_over().leave()
    return rig


@pytest.fixture(scope="module")
def ended(in_service: Rig) -> Rig:
    in_service.guest.let_go()
    in_service.model.cont()
    return in_service


def test_what_is_in_service_keeps_others_waiting(in_service: Rig) -> None:
    def ticks() -> int:
        return in_service.guest.count(TIMER_VECTOR)

    before = ticks()
    until(lambda: ticks() >= before + TICKS, "the guest's timer to interrupt the handler", 10)
    assert in_service.taken() == 1


def test_they_are_delivered_once_when_it_ends(ended: Rig) -> None:
    ended.await_delivery(*ended.vectors)
    ended.check(in_order=False)


def test_it_is_delivered_again_and_so_are_the_others(ended: Rig) -> None:
    ended.rest()
    ended.fire(*ended.vectors)
    ended.check()
