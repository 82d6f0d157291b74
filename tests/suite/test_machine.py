# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine: what it says when it dies, and what its files tell."""

from __future__ import annotations

import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from fixtures.guests import Op, ProbeGuest
from fixtures.guests.probe import Verb
from fixtures.machines import CommandRefusedError, Machine
from fixtures.machines.machine import MachineDiedError
from fixtures.waiting import DeadlineError, until


@pytest.fixture
def machine(a_machine: Callable[..., Machine]) -> Machine:
    """One that runs, and so does its guest."""
    machine = a_machine()
    machine.start()
    machine.alive(ProbeGuest(machine.host, machine.spec.ram, machine.died).wait_ready)
    return machine


def test_a_machine_that_runs_has_not_died(machine: Machine) -> None:
    assert machine.died() is None
    assert machine.status() == "running"
    machine.settle()
    assert machine.said() == ""


def test_before_its_start_there_is_nothing_to_ask(a_machine: Callable[..., Machine]) -> None:
    machine = a_machine()
    with pytest.raises(RuntimeError, match="old QEMU has not been started"):
        machine.died()
    machine.close()


def test_a_machine_that_does_not_start_says_why_and_how_it_was_started(
    a_machine: Callable[..., Machine],
) -> None:
    machine = a_machine("no-such-device")
    machine.start()
    with pytest.raises(MachineDiedError) as caught:
        machine.status()
    lines = str(caught.value).splitlines()
    assert lines[0] == "old QEMU ended with 1; its last words:"
    assert "'no-such-device' is not a valid device model name" in lines[1]
    assert lines[-2] == "its command line:"
    again = subprocess.run(shlex.split(lines[-1]), capture_output=True, text=True)
    assert "no-such-device" in again.stderr, "the command line can be pasted"


def test_its_death_is_a_better_explanation_than_a_lost_monitor(machine: Machine) -> None:
    assert machine.status() == "running"
    machine.process.kill()
    with pytest.raises(MachineDiedError, match=r"^old QEMU was killed by signal 9 \(SIGKILL\); "):
        machine.settle()


def test_its_death_may_be_known_a_little_after_its_monitor_is_lost(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.status() == "running"
    machine.process.kill()
    died, later = machine.died, time.monotonic() + 0.3
    monkeypatch.setattr(machine, "died", lambda: died() if time.monotonic() > later else None)
    with pytest.raises(MachineDiedError, match=r"^old QEMU was killed by signal 9 \(SIGKILL\); "):
        machine.settle()


def test_it_quits_when_told_to(machine: Machine) -> None:
    machine.quit()
    assert machine.process.poll() == 0
    machine.quit()
    machine.close()


def test_a_machine_that_is_killed_can_be_quit_and_closed_all_the_same(machine: Machine) -> None:
    machine.process.kill()
    machine.quit()
    machine.close()


def test_a_machine_that_stopped_its_guest_says_so_until_it_goes_on(machine: Machine) -> None:
    assert machine.stuck() is None
    machine.monitor.execute("stop")
    assert str(machine.stuck()).startswith("old QEMU is in paused; its last words:\n(none)")
    machine.monitor.execute("cont")
    assert machine.stuck() is None
    machine.process.kill()
    assert str(machine.stuck()).startswith("was killed by signal 9 ")


def test_a_machine_that_dies_when_it_has_stopped_its_guest_is_dead(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.monitor.execute("stop")
    machine.process.kill()
    late = iter([None])
    monkeypatch.setattr(machine, "died", lambda: next(late, "was killed"))
    assert machine.stuck() == "was killed"


def test_a_machine_that_gets_a_signal_that_nobody_sends_has_crashed(machine: Machine) -> None:
    assert machine.crash is None
    machine.process.signal(signal.SIGSEGV)
    machine.process.wait(20)
    assert machine.crash == "SIGSEGV"
    with pytest.raises(MachineDiedError, match=r"^old QEMU was killed by signal 11 \(SIGSEGV\); "):
        machine.quit()
    machine.forget_core()


def test_a_signal_that_ssh_has_no_name_for_is_a_crash_too(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SIGBUS is, which a guest's access to a device that was reset can end in."""
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_process", SimpleNamespace(poll=lambda: -99, wait=lambda _: None))
        assert machine.crash == "unnamed"
        assert "was killed by signal 99 (unnamed)" in str(machine.died())


def test_a_machine_that_we_ended_has_not_crashed(machine: Machine) -> None:
    machine.process.kill()
    assert machine.crash is None


def test_traces_are_found_by_their_event_and_from_a_mark_on(machine: Machine) -> None:
    assert machine.trace("no_such_event") == []
    text = machine._trace_bytes(0).decode()
    assert "kvm_irqchip" not in text
    machine.host.run(
        f"printf '1@2.5:vfio_msi_interrupt (0000:01:00.0) vector 3\\n' >> {machine.trace_path}"
    )
    mark = machine.trace_mark()
    assert machine.trace("vfio_msi_interrupt") == ["(0000:01:00.0) vector 3"]
    assert machine.trace("vfio_msi_interrupt", mark) == []
    assert machine.trace("msi_interrupt") == [], "the name of an event is whole"
    machine.host.run(f"printf 'vfio_pci_reset \\nvfio_pci_reset_flr x\\n' >> {machine.trace_path}")
    until(lambda: machine.trace_mark() > mark, "the trace to grow", 5)
    assert machine.trace("vfio_pci_reset", mark) == [""]


def test_a_successor_is_of_the_same_make_with_files_of_its_own(machine: Machine) -> None:
    new = machine.successor()
    assert new.spec == machine.spec
    assert new.role == "new QEMU"
    for name in ("qmp_path", "log_path", "trace_path", "cpr_path", "main_path"):
        assert getattr(new, name) != getattr(machine, name)


def test_what_is_plugged_in_is_of_its_make_until_its_guest_lets_go_of_it(
    a_machine: Callable[..., Machine],
) -> None:
    port, device = "pcie-root-port,id=port0,chassis=1", "virtio-rng-pci,id=late,bus=port0"
    machine = a_machine(port)
    machine.start()
    with pytest.raises(CommandRefusedError, match="'no-such-device' is not a valid device model"):
        machine.plug("no-such-device,id=late,bus=port0")
    assert machine.spec.devices == (port,)
    machine.plug(device)
    assert machine.spec.devices == machine.successor().spec.devices == (port, device)
    with pytest.raises(DeadlineError, match="the guest to let go of late"):
        machine.unplug(device, deadline_s=0.2)
    assert machine.spec.devices == (port, device)


def test_its_guest_begins_anew_when_it_is_reset(machine: Machine) -> None:
    guest = ProbeGuest(machine.host, machine.spec.ram, machine.died)
    until(lambda: guest.look().loops > 0, "the guest to run", 10)
    machine.monitor.execute("stop")
    guest.forget_ready()
    machine.reset()
    machine.monitor.execute("cont")
    guest.wait_ready()
    guest.batch([Op(Verb.NOP)])
    assert guest.look().done == 1
