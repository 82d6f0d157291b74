# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest falls asleep, old QEMU leaves it in files and ends, and it wakes up in new QEMU."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import MSIX, Coverage
from fixtures.cpr import CprError, Reboot
from fixtures.guests.probe import Snapshot
from fixtures.matrix import Point
from fixtures.oracle.observation import Observation, expect_same, expect_same_counts
from fixtures.rig import Held, Rig, held

#: RAM that the probe leaves alone (images/probe/probe.ld).
FREE_RAM = 0x60000
POINTS = Coverage(mode=("cpr-reboot",), irq=("msix:8", "msi:8", "intx"), irqchip=("full",))


@dataclass(frozen=True)
class Attempt:
    """A CPR of a guest that did not sleep, with what was seen on either side of it.

    :ivar at_first: configuration space when the driver had found the function.
    """

    rig: Rig
    refused: CprError
    at_first: bytes
    before: Observation
    after: Observation


@pytest.fixture(scope="module")
def attempt(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Attempt:
    rig = bench.rig(point, request.addfinalizer)
    at_first = rig.function.config()
    rig.use_all()
    if point.irq in MSIX:
        rig.mask(*rig.vectors[::2])
        rig.fire(*rig.vectors[::4])
        rig.check()
    before = rig.observe()
    with pytest.raises(CprError) as caught:
        Reboot(rig.machine).save()
    return Attempt(rig, caught.value, at_first, before, rig.observe())


@dataclass(frozen=True)
class Asleep:
    """The guest asleep, in old QEMU and in new QEMU.

    :ivar written: what its RAM had at one place.
    :ivar state: the file that its state was in.
    :ivar held: the descriptors of old QEMU, when all vectors were in use.
    """

    rig: Rig
    ram_before: bytes
    ram_after: bytes
    status: str
    written: bytes
    state: bytes
    held: Held


@pytest.fixture(scope="module")
def asleep(attempt: Attempt) -> Asleep:
    rig = attempt.rig
    rig.unmask(*rig.vectors)
    rig.await_delivery()
    descriptors = held(rig.machine)
    host, spec = rig.machine.host, rig.machine.spec
    written = secrets.token_bytes(4096)
    host.write(spec.ram, (FREE_RAM, written))
    rig.suspend()
    before = rig.guest.memory(0, spec.ram_mb << 20)
    cpr = rig.hand_over()
    assert isinstance(cpr, Reboot)
    after = rig.guest.memory(0, spec.ram_mb << 20)
    state = host.read(cpr.state)
    return Asleep(rig, before, after, rig.machine.status(), written, state, descriptors)


@dataclass(frozen=True)
class Woken:
    """The guest awake in new QEMU, and its driver using the function again."""

    rig: Rig
    before: Snapshot
    after: Snapshot
    config: bytes


@pytest.fixture(scope="module")
def woken(asleep: Asleep) -> Woken:
    rig = asleep.rig
    before = rig.guest.look()
    rig.wake()
    result = Woken(rig, before, rig.guest.look(), rig.function.config())
    rig.use_all()
    return result


@pytest.fixture
def rig(woken: Woken) -> Rig:
    return woken.rig


def test_it_is_refused_with_a_reason_while_the_guest_runs(attempt: Attempt) -> None:
    reason = "VFIO device only supports cpr-reboot for runstate suspended"
    assert reason in str(attempt.refused)


def test_nothing_is_delivered_by_the_attempt(attempt: Attempt) -> None:
    assert attempt.after.log_count == attempt.before.log_count


def test_nothing_of_the_function_is_changed_by_the_attempt(attempt: Attempt) -> None:
    expect_same("configuration space", attempt.before.config, attempt.after.config)
    expect_same("the MSI-X table", attempt.before.table, attempt.after.table, 16)
    assert attempt.after.masked == attempt.before.masked
    assert attempt.after.pending == attempt.before.pending
    assert attempt.after.witness == attempt.before.witness != 0


def test_every_vector_fires_in_old_qemu_after_the_attempt(attempt: Attempt) -> None:
    rig = attempt.rig
    rig.unmask(*rig.vectors)
    rig.await_delivery()
    rig.begin()
    rig.fire(*rig.vectors)
    rig.check()


def test_the_guest_sleeps_in_new_qemu(asleep: Asleep) -> None:
    assert asleep.status == "suspended"


def test_guest_ram_is_the_same_to_the_byte(asleep: Asleep) -> None:
    expect_same("guest RAM", asleep.ram_before, asleep.ram_after, 16)


def test_the_state_is_in_a_file_that_holds_no_guest_ram(asleep: Asleep) -> None:
    assert asleep.state
    assert asleep.written in asleep.ram_before
    assert asleep.written[:64] not in asleep.state


def test_the_guest_goes_on_where_it_fell_asleep(woken: Woken) -> None:
    assert woken.after.loops > woken.before.loops > 0
    assert woken.after.done > woken.before.done > 0


def test_nothing_is_delivered_on_the_way(woken: Woken) -> None:
    assert woken.after.log_count == woken.before.log_count > 0


def test_the_function_is_as_its_driver_found_it_at_first(woken: Woken, attempt: Attempt) -> None:
    expect_same("configuration space", attempt.at_first, woken.config)


def test_each_vector_is_delivered_exactly_once_and_in_order(rig: Rig) -> None:
    rig.fire(*rig.vectors)
    rig.check()


def test_masking_holds_a_vector_back_and_unmasking_delivers_it(rig: Rig) -> None:
    rig.mask(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.check()
    rig.unmask(*rig.vectors)
    rig.await_delivery(*rig.vectors)
    rig.check(in_order=False)


@pytest.mark.usefixtures("traces")
@pytest.mark.limits(path=("kvm",), accel=("kvm",))
def test_unmasked_vectors_bypass_qemu(rig: Rig) -> None:
    mark = rig.machine.trace_mark()
    rig.fire(*rig.vectors)
    rig.check()
    assert rig.handled_by_qemu(mark) == 0


@pytest.mark.usefixtures("same_build")
def test_new_qemu_holds_as_many_descriptors_of_each_kind(rig: Rig, asleep: Asleep) -> None:
    expect_same_counts("descriptors", asleep.held.counts, held(rig.machine).counts)


def test_they_can_do_it_again(rig: Rig) -> None:
    rig.suspend()
    rig.hand_over()
    rig.wake()
    rig.use_all()
