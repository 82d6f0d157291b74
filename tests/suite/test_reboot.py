# SPDX-License-Identifier: GPL-2.0-or-later
"""cpr-reboot of a real QEMU of this machine: how it goes well, and how it fails.

TCG, the probe guest, no VFIO, as in test_transfer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

from fixtures.cpr import CprError, Reboot, Step
from fixtures.guests import Op, ProbeGuest
from fixtures.guests.probe import Verb
from fixtures.machines import Machine
from fixtures.waiting import until

SCRATCH = 0x70000  # RAM that the guest does not use
ICR_LOW, ICR_HIGH = 0xFEE00300, 0xFEE00310  # of the local APIC
VECTOR = 0x5A

Sleeper = tuple[Machine, ProbeGuest]


@pytest.fixture
def sleeper(a_machine: Callable[..., Machine]) -> Iterator[Sleeper]:
    """Old QEMU with two CPUs, and its guest, which has fallen asleep after an interrupt of CPU 1
    that writes 7 to `SCRATCH`."""
    machine = a_machine().successor("old QEMU", cpus=2)
    machine.start()
    guest = ProbeGuest(machine.host, machine.spec.ram, machine.died)
    machine.alive(guest.wait_ready)
    guest.batch([Op(Verb.X2APIC), Op(Verb.ACKNOWLEDGE, SCRATCH, VECTOR << 32 | 7)])
    guest.batch([Op(Verb.MSR_WRITE, 0x830, 1 << 32 | VECTOR)])
    until(lambda: guest.count(VECTOR, cpu=1), "an interrupt", 10)
    guest.batch([Op(Verb.WRITE, SCRATCH, 0)])
    guest.fall_asleep()
    until(lambda: machine.status() == "suspended", "the guest to fall asleep", 10, pause_s=0.01)
    yield machine, guest
    machine.close()


@pytest.fixture
def a_reboot(request: pytest.FixtureRequest) -> Callable[..., Reboot]:
    """Makes a cpr-reboot; new QEMU is ended afterwards."""

    def make(old: Machine, new: Machine | None = None) -> Reboot:
        cpr = Reboot(old, new)
        request.addfinalizer(cpr.new.close)
        return cpr

    return make


def assert_wakes_up(machine: Machine, guest: ProbeGuest) -> None:
    """With what it knew, and with CPUs that are as after any reset."""
    machine.monitor.execute("system_wakeup")
    guest.wait_ready()
    assert machine.status() == "running"
    assert guest.look().cpus == 2
    assert guest.look().log_count == 1
    assert guest.count(VECTOR, cpu=1) == 1
    interrupt = [Op(Verb.WRITE, ICR_HIGH, 1 << 24), Op(Verb.WRITE, ICR_LOW, VECTOR)]
    guest.batch(interrupt)  # x2APIC mode has no such registers
    until(lambda: guest.count(VECTOR, cpu=1) == 2, "an interrupt", 10)
    assert guest.batch([Op(Verb.READ, SCRATCH)]) == [7]


def test_a_guest_that_sleeps_wakes_up_with_what_it_knew(sleeper: Sleeper) -> None:
    assert_wakes_up(*sleeper)


def test_it_wakes_up_in_new_qemu(sleeper: Sleeper, a_reboot: Callable[..., Reboot]) -> None:
    machine, guest = sleeper
    cpr = a_reboot(machine)
    new = cpr.run()
    guest.stuck = new.died
    assert list(cpr.times) == [
        *(Step.MIGRATE, Step.SAVED, Step.START, Step.MONITOR, Step.HANDOVER, Step.ASLEEP)
    ]
    assert machine.process.poll() == 0
    assert new.status() == "suspended"
    assert_wakes_up(new, guest)


def test_the_state_file_is_among_what_is_left(
    sleeper: Sleeper, a_reboot: Callable[..., Reboot]
) -> None:
    cpr = a_reboot(sleeper[0])
    cpr.save()
    assert cpr.state in cpr.new.files
    assert 0 < Path(cpr.state).stat().st_size < 1 << 20


def test_a_state_that_cannot_be_written_leaves_the_guest_in_old_qemu(
    sleeper: Sleeper, a_reboot: Callable[..., Reboot]
) -> None:
    machine, guest = sleeper
    cpr = a_reboot(machine)
    cpr.state = PurePosixPath("/no/such/directory/state")
    with pytest.raises(CprError) as caught:
        cpr.save()
    assert caught.value.step == Step.MIGRATE
    assert "/no/such/directory/state" in str(caught.value)
    assert machine.status() == "suspended"
    # The next CPR may be another, whose new QEMU would refuse a state without RAM.
    capabilities = machine.monitor.execute("query-migrate-capabilities")
    assert {"capability": "x-ignore-shared", "state": False} in capabilities
    assert_wakes_up(machine, guest)


def test_a_new_qemu_with_other_devices_is_told_in_its_words(
    sleeper: Sleeper, a_reboot: Callable[..., Reboot]
) -> None:
    machine, _ = sleeper
    cpr = a_reboot(machine, machine.successor(devices=("no-such-device",)))
    with pytest.raises(CprError) as caught:
        cpr.run()
    assert caught.value.step == Step.MONITOR
    assert "'no-such-device' is not a valid device model name" in str(caught.value)


def test_a_state_that_is_none_is_told(sleeper: Sleeper, a_reboot: Callable[..., Reboot]) -> None:
    machine, _ = sleeper
    cpr = a_reboot(machine)
    cpr.save()
    Path(cpr.state).write_bytes(b"no state of a guest" * 100)
    with pytest.raises(CprError) as caught:
        cpr.load()
    assert caught.value.step == Step.HANDOVER
    assert "ended with 1" in str(caught.value)
