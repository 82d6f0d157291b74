# SPDX-License-Identifier: GPL-2.0-or-later
"""A CPR fails; the guest goes on in old QEMU as if nothing had been, and the next CPR succeeds.

Unless it has run in new QEMU by then: it stays there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from fixtures.bench import LabBench, Survivor, equipment
from fixtures.coverage import MSIX, SOUND, Coverage
from fixtures.cpr import Failing, Step, TooLate
from fixtures.endpoints.vfio_user import VfioUserEndpoint
from fixtures.hosts import PciDevice
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same
from fixtures.rig import Rig
from images.errors import EnvironmentFault
from tests.qemu.test_rollback import expect_dma

POINTS = Coverage(
    also=("msix:8", "iommufd,bars=trap", "msi:8", "intx,reset=bus"),
    mode=("cpr-transfer",),
    irq=("msix:8", "msi:8", "intx"),
    **SOUND,
    iommu=("intel-iommu",),
    reset=("bus",),
    irqchip=("full",),
    apic=("xapic",),
)

MASKED, PENDING, MEANWHILE = (4, 5, 6), (4,), (0, 5)
#: Where the guest has been stopped in old QEMU.
STOPPED = (Step.ACTIVE, Step.HELD, Step.FROZEN, Step.LOADING, Step.LOADED)

#: New QEMU waits to be told to run the guest.
NOT_YET = ("-S",)
#: So often is a CPR cancelled, until that has come in time.
ATTEMPTS = 10


@pytest.fixture
def other(bench: LabBench, point: Point) -> PciDevice:
    """Another function of the lab host."""
    lab = bench.lab_with(point.iommu)
    names = [name for name in lab.endpoints if "msix" in name and name != equipment(point)]
    if not names:
        pytest.skip("the lab host has one function only (add --point msix:64)")
    device = lab.device(names[0])
    device.bind()
    return device


def expect_rollback(
    survivor: Survivor,
    fault: Callable[[Failing], None] | None = None,
    at: Step = Step.FROZEN,
    *,
    return_path: bool = True,
    meanwhile: Sequence[int] = MEANWHILE,
    devices: Callable[[str], tuple[str, ...]] = lambda device: (device,),
    **changes: Any,
) -> Failing:
    """Have a CPR go wrong, and look; then do one.

    :param meanwhile: the vectors that fire then.
    :param devices: those of new QEMU, by that of old QEMU.
    :param changes: what else differs in new QEMU.
    """
    with survivor.rig() as rig:
        rig.begin()
        masked = [vector for vector in MASKED if vector in rig.vectors]
        # A pending bit that the guest cannot see fails each CPR: msi-pending-bits-fail-cpr.
        pending = PENDING if rig.shows_pending else ()
        may_fire = set(rig.vectors) if rig.shows_pending else set(rig.vectors) - set(masked)
        rig.mask(*masked)
        rig.fire(*pending)
        rig.check()
        before = rig.observe()

        def fire() -> None:
            if at in STOPPED:
                rig.model.stop()
            rig.fire(*(n for n in meanwhile if n in may_fire))

        cpr = Failing(
            rig.machine,
            rig.machine.successor(devices=devices(*rig.machine.spec.devices), **changes),
            fault,
            at=at,
            between=fire,
            return_path=return_path,
        )
        rig.machines.append(cpr.new)
        cpr.fail()
        if rig.model.stopped:
            rig.model.cont()
        rig.await_delivery(*rig.model.delivered)
        rig.check(in_order=at not in STOPPED)
        after = rig.observe()
        assert cpr.told
        assert after.masked == before.masked == set(masked)
        assert after.pending == rig.model.pending
        assert after.witness == before.witness != 0
        expect_same("configuration space", before.config, after.config)
        expect_same("the MSI-X table", before.table, after.table, 16)
        if isinstance(rig.endpoint, VfioUserEndpoint):
            expect_dma(rig)
        if not rig.shows_pending:
            expect_held_back(rig, masked)
        rig.take_over()
        rig.begin()
        rig.unmask(*masked)
        rig.await_delivery(*rig.model.delivered)
        rig.fire(*rig.vectors)
        rig.check(in_order=False)
        rig.machines.remove(cpr.new)
        return cpr


def expect_held_back(rig: Rig, masked: Sequence[int]) -> None:
    """What fires while it is masked is delivered once when it is unmasked; it is masked again."""
    rig.begin()
    rig.fire(*masked)
    rig.check()
    rig.unmask(*masked)
    rig.await_delivery(*masked)
    rig.check(in_order=False)
    rig.mask(*masked)


def expect_guest_in_new(survivor: Survivor, fault: Callable[[Failing], None]) -> None:
    """Have a CPR go wrong too late, and see that every vector fires in new QEMU."""
    with survivor.rig() as rig:
        rig.take_over(choreography=partial(TooLate, fault=fault))
        rig.begin()
        rig.fire(*rig.vectors)
        rig.check()


def test_new_qemu_dies_before_old_qemu_calls_it(survivor: Survivor) -> None:
    expect_rollback(survivor, Failing.kill, Step.LISTENING)


def test_new_qemu_dies_before_it_reads_the_cpr_state(survivor: Survivor) -> None:
    expect_rollback(survivor, Failing.kill, Step.MIGRATE)


@pytest.mark.limits(container=("type1",))
def test_the_cpr_channel_is_cut_before_anything_is_read(survivor: Survivor) -> None:
    expect_rollback(survivor, Failing.cut, Step.CALLED)


@pytest.mark.limits(container=("type1",))
def test_the_cpr_channel_is_cut_before_the_descriptors_are_read(survivor: Survivor) -> None:
    expect_rollback(survivor, Failing.cut_amid, Step.CALLED)


def test_nobody_listens_on_the_main_channel(survivor: Survivor) -> None:
    expect_rollback(survivor, Failing.listen_elsewhere, Step.MIGRATE)


def test_the_cpr_is_cancelled_before_new_qemu_reads_the_cpr_state(survivor: Survivor) -> None:
    expect_rollback(survivor, Failing.cancel, Step.MIGRATE)


@pytest.mark.limits(container=("type1",))
def test_the_cpr_is_cancelled_when_it_has_just_become_active(survivor: Survivor) -> None:
    for _ in range(ATTEMPTS):
        cpr = expect_rollback(survivor, Failing.cancel, Step.ACTIVE, meanwhile=())
        assert cpr.states[-1] == "cancelled"
        if "device" not in cpr.states:
            return
    raise EnvironmentFault("this machine is too busy to cancel a CPR within a tenth of a second")


def test_the_cpr_is_cancelled_when_the_guest_has_been_stopped(survivor: Survivor) -> None:
    expect_rollback(survivor, Failing.cancel)


def test_the_cpr_is_cancelled_before_the_devices_are_sent(survivor: Survivor) -> None:
    expect_rollback(survivor, Failing.cancel, Step.HELD)


def test_new_qemu_of_a_cpr_that_is_cancelled_ends_with_an_error(survivor: Survivor) -> None:
    assert expect_rollback(survivor, Failing.cancel).new.crash is None


def test_the_main_channel_is_cut(survivor: Survivor) -> None:
    expect_rollback(survivor, Failing.cut)


def test_new_qemu_dies_before_it_has_loaded_the_device(survivor: Survivor) -> None:
    expect_rollback(survivor, Failing.kill, Step.LOADING)


@pytest.mark.limits(container=("type1",))
def test_the_main_channel_is_cut_before_new_qemu_has_loaded_the_device(survivor: Survivor) -> None:
    expect_rollback(survivor, Failing.cut, Step.LOADING)


def test_new_qemu_dies_when_it_has_loaded_the_guest(survivor: Survivor) -> None:
    """It would have been told to run it, as management layers do."""
    expect_rollback(survivor, Failing.kill, Step.LOADED, meanwhile=(), options=NOT_YET)


@pytest.mark.limits(container=("iommufd",))  # with type1, as the test above
def test_what_fires_before_new_qemu_dies_that_has_loaded_the_guest_is_not_lost(
    survivor: Survivor,
) -> None:
    expect_rollback(survivor, Failing.kill, Step.LOADED, options=NOT_YET)


def test_new_qemu_dies_when_it_runs_the_guest(survivor: Survivor) -> None:
    with survivor.rig(survives=False) as rig:
        cpr = TooLate(rig.machine, fault=Failing.kill)
        rig.machines.append(cpr.new)
        cpr.run()


@pytest.mark.limits(container=("type1",))
def test_the_cpr_is_cancelled_when_new_qemu_runs_the_guest(survivor: Survivor) -> None:
    expect_guest_in_new(survivor, Failing.cancel)


@pytest.mark.limits(container=("type1",))
def test_the_main_channel_is_cut_when_new_qemu_runs_the_guest(survivor: Survivor) -> None:
    expect_guest_in_new(survivor, Failing.cut)


def test_new_qemu_has_another_machine_type(survivor: Survivor) -> None:
    expect_rollback(survivor, machine="pc")


def test_new_qemu_has_no_such_device(survivor: Survivor) -> None:
    expect_rollback(survivor, devices=lambda _: ())


def test_new_qemu_has_the_device_in_another_slot(survivor: Survivor) -> None:
    expect_rollback(survivor, devices=lambda device: (device.replace("addr=0x4", "addr=0x5"),))


@pytest.mark.limits(irq=MSIX)
def test_new_qemu_has_a_device_with_another_number_of_vectors(
    survivor: Survivor, other: PciDevice
) -> None:
    expect_rollback(
        survivor,
        devices=lambda device: (re.sub("host=[^,]+", f"host={other.address}", device),),
    )


def test_new_qemu_has_too_little_memory(survivor: Survivor) -> None:
    expect_rollback(survivor, ram_mb=2)


def test_new_qemu_cannot_load_and_nobody_waits_for_it(survivor: Survivor) -> None:
    expect_rollback(survivor, devices=lambda _: (), return_path=False)
