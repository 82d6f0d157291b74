# SPDX-License-Identifier: GPL-2.0-or-later
"""New QEMU dies when the guest has been stopped for it; the guest goes on in old QEMU."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import MESSAGES, MSIX, SOUND, Coverage
from fixtures.cpr import Failing
from fixtures.endpoints.vfio_user import VfioUserEndpoint
from fixtures.guests.probe import Op, Verb
from fixtures.matrix import Point
from fixtures.oracle.observation import Observation, expect_same, expect_same_counts
from fixtures.rig import Held, Rig, held

POINTS = Coverage(
    "msix:8",
    also=("msi:8", "intx", "iommufd,bars=trap"),
    mode=("cpr-transfer",),
    irq=("msix:8", "msi:8", "intx"),
    **SOUND,
    iommu=("intel-iommu",),
    reset=("bus",),
    apic=("xapic",),
)

#: Of four vectors in a row: those that are masked, the one that fires before the CPR, and those
#: that fire while the guest is stopped for it.
MASKED, BEFORE, MEANWHILE = (2, 3), 2, (0, 3)
#: Where the device and the guest write: clear of the probe's own.
FREE_RAM = 0x60000


def some(rig: Rig, *rest: int) -> list[int]:
    return [n for n in rig.vectors if n % 4 in rest]


def expect_dma(rig: Rig, address: int = FREE_RAM, place: int = FREE_RAM) -> None:
    """What the device writes to one address is at one place in the guest's RAM, and the device
    reads what the guest has written there."""
    endpoint = rig.endpoint
    assert isinstance(endpoint, VfioUserEndpoint)
    written = secrets.token_bytes(8)
    endpoint.dma_write(address, written)
    assert rig.guest.memory(place, 8) == written
    by_guest = secrets.randbits(31)
    rig.guest.batch([Op(Verb.WRITE, place + 8, by_guest)])
    assert endpoint.dma_read(address + 8, 4) == by_guest.to_bytes(4, "little")


@dataclass(frozen=True)
class Attempt:
    """A CPR that failed, with what was seen on either side of it.

    :ivar mark: see `Machine.trace_mark`; before it.
    """

    rig: Rig
    cpr: Failing
    mark: int
    before: Observation
    after: Observation
    held_before: Held
    held_after: Held


@pytest.fixture(scope="module")
def attempt(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Attempt:
    rig = bench.rig(point, request.addfinalizer)
    rig.use_all()
    if point.irq in MSIX:
        rig.mask(*some(rig, *MASKED))
        rig.fire(*some(rig, BEFORE))
        rig.check()
    rig.begin()
    before, held_before, mark = rig.observe(), held(rig.machine), rig.machine.trace_mark()

    def meanwhile() -> None:
        rig.model.stop()
        rig.fire(*some(rig, *MEANWHILE))

    cpr = Failing(rig.machine, rig.machine.successor(), Failing.kill, between=meanwhile)
    rig.machines.append(cpr.new)
    cpr.fail()
    rig.model.cont()
    return Attempt(rig, cpr, mark, before, rig.observe(), held_before, held(rig.machine))


@pytest.fixture
def kept(attempt: Attempt) -> Rig:
    return attempt.rig


def test_the_failure_is_told(attempt: Attempt) -> None:
    assert attempt.cpr.told


@pytest.mark.limits(irq=MESSAGES)
def test_what_fired_meanwhile_is_delivered_exactly_once_and_nothing_else(kept: Rig) -> None:
    kept.await_delivery(*kept.model.delivered)
    kept.check(in_order=False)


@pytest.mark.limits(irq=("intx",))
def test_a_pin_that_was_asserted_meanwhile_is_delivered(kept: Rig) -> None:
    """At least once: see `IntxModel`."""
    kept.await_delivery(0)


@pytest.mark.usefixtures("traces")
@pytest.mark.limits(irq=("intx",))
def test_it_is_delivered_by_kvm_and_not_by_qemu_as_well(attempt: Attempt) -> None:
    attempt.rig.await_delivery(0)
    assert attempt.rig.handled_by_qemu(attempt.mark) == 0


def test_masks_are_the_same(attempt: Attempt) -> None:
    assert attempt.after.masked == attempt.before.masked


@pytest.mark.limits(irq=MSIX)
def test_what_was_pending_and_what_fired_while_masked_is_pending(attempt: Attempt) -> None:
    assert attempt.before.pending == set(some(attempt.rig, BEFORE))
    assert attempt.after.pending == set(some(attempt.rig, *MASKED))


def test_config_space_and_msix_table_are_the_same(attempt: Attempt) -> None:
    expect_same("configuration space", attempt.before.config, attempt.after.config)
    expect_same("the MSI-X table", attempt.before.table, attempt.after.table, 16)


def test_the_device_is_not_reset(attempt: Attempt) -> None:
    assert attempt.after.witness == attempt.before.witness != 0


@pytest.mark.limits(endpoint=("vfio-user",), container=("type1",))
def test_dma_goes_both_ways(kept: Rig) -> None:
    expect_dma(kept)


def test_old_qemu_holds_as_many_descriptors_of_each_kind(attempt: Attempt) -> None:
    expect_same_counts("descriptors", attempt.held_before.counts, attempt.held_after.counts)


@pytest.mark.limits(irq=MSIX)
def test_pending_vectors_are_delivered_once_when_unmasked(kept: Rig) -> None:
    kept.begin()
    kept.unmask(*some(kept, *MASKED))
    kept.await_delivery(*some(kept, *MASKED))
    kept.check(in_order=False)


@pytest.mark.usefixtures("traces")
def test_vectors_bypass_qemu_as_before(kept: Rig) -> None:
    assert kept.delivered_by_qemu() == 0


def test_a_cpr_after_that_succeeds_and_every_vector_fires(kept: Rig) -> None:
    kept.take_over()
    kept.begin()
    kept.fire(*kept.vectors)
    kept.check()
