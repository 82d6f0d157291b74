# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupts wait in the guest's APIC, as its CPU takes none; then new QEMU takes over."""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import Coverage
from fixtures.guests.probe import Op, Verb
from fixtures.matrix import Point
from fixtures.rig import Rig, TakenOver
from fixtures.waiting import until

POINTS = Coverage(
    "msix:8",
    irq=("msix:8", "msi:8", "intx"),
    accel=("kvm",),
    reset=("bus",),
    apic=("xapic",),
    iommu=("intel-iommu",),
)

#: The Interrupt Request Register: eight times 32 bits (Intel SDM, volume 3, 12.8.4).
IRR = 0xFEE0_0200


@pytest.fixture(scope="module")
def taken_over(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> TakenOver:
    rig = bench.rig(point, request.addfinalizer)
    rig.enable()
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    rig.guest.batch([Op(Verb.INTERRUPTS, value=0)])
    for vector in rig.vectors:
        rig.endpoint.fire(vector)
    until(lambda: waiting(rig) == set(rig.vectors), "all vectors to reach the APIC", 10)
    return rig.take_over()


def waiting(rig: Rig) -> set[int]:
    """The vectors whose interrupt the CPU has not taken yet."""
    words = rig.guest.batch([Op(Verb.READ, IRR + 0x10 * n) for n in range(8)])
    idt_vectors = {n: rig.function.idt_vector(n) for n in rig.vectors}
    return {n for n, idt in idt_vectors.items() if words[idt // 32] >> idt % 32 & 1}


def test_nothing_is_delivered_by_the_takeover(taken_over: TakenOver) -> None:
    assert taken_over.after.log_count == taken_over.before.log_count


def test_each_is_delivered_once_when_the_cpu_takes_interrupts_again(
    taken_over: TakenOver,
) -> None:
    rig = taken_over.rig
    for vector in rig.vectors:
        rig.model.fire(vector)
    rig.guest.batch([Op(Verb.INTERRUPTS, value=1)])
    rig.await_delivery(*rig.vectors)
    rig.check(in_order=False)
    rig.begin()
    rig.fire(*rig.vectors)
    rig.check()
