# SPDX-License-Identifier: GPL-2.0-or-later
"""cpr-exec of a real QEMU of this machine: how it goes well, and how it fails.

TCG, the probe guest, no VFIO, as in test_transfer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from fixtures.cpr import CprError, Exec, Step
from fixtures.guests import Op, ProbeGuest
from fixtures.guests.probe import Verb
from fixtures.machines import Machine
from fixtures.waiting import until

OldQemu = tuple[Machine, ProbeGuest]  # tests/suite/conftest.py


@pytest.fixture
def an_exec(request: pytest.FixtureRequest) -> Callable[..., Exec]:
    """Makes a cpr-exec; new QEMU is ended afterwards."""

    def make(old: Machine, new: Machine | None = None) -> Exec:
        cpr = Exec(old, new)
        request.addfinalizer(cpr.new.close)
        return cpr

    return make


def assert_goes_on(machine: Machine, guest: ProbeGuest) -> None:
    until(lambda: machine.status() == "running", "the guest to be running", 10, pause_s=0.01)
    loops = guest.look().loops
    until(lambda: guest.look().loops > loops, "the guest to go on", 10, but=machine.died)
    guest.batch([Op(Verb.NOP)])


class Commanded(Machine):
    """A new QEMU that is started by another command line than it should be."""

    words: tuple[str, ...]

    def command(self, incoming: object = ()) -> list[str]:
        del incoming
        self.argv = list(self.words)
        return self.argv


def commanded(old: Machine, *said: str) -> Machine:
    new = Commanded(old.host, old.spec, "new QEMU")
    new.words = said
    return new


def test_new_qemu_runs_the_guest_in_the_process_of_old_qemu(
    old: OldQemu, an_exec: Callable[..., Exec]
) -> None:
    machine, guest = old
    pid = machine.process.pid
    cpr = an_exec(machine)
    assert cpr.step == Step.IDLE
    new = cpr.run()
    assert list(cpr.times) == [Step.MIGRATE, Step.EXEC, Step.MONITOR, Step.HANDOVER, Step.RUNNING]
    assert new.process.pid == pid
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    assert command.decode().split("\0")[:-1] == new.argv != machine.argv
    assert machine.monitor.is_lost
    assert not new.monitor.is_lost
    cpr.leave()
    assert_goes_on(new, guest)


def test_it_can_be_done_again_and_again(old: OldQemu, an_exec: Callable[..., Exec]) -> None:
    machine, guest = old
    _, start_s = machine.monitor, machine.start_s
    for _ in range(3):
        cpr = an_exec(machine)
        machine = cpr.run()
        cpr.leave()
    assert_goes_on(machine, guest)
    assert machine.start_s == start_s is not None


@pytest.mark.parametrize(
    ("command", "why"),
    [("/no/such/qemu", "No such file or directory"), ("/etc/passwd", "Permission denied")],
)
def test_what_cannot_be_executed_leaves_the_guest_in_old_qemu(
    old: OldQemu, an_exec: Callable[..., Exec], command: str, why: str
) -> None:
    machine, guest = old
    with pytest.raises(CprError) as caught:
        an_exec(machine, commanded(machine, command)).run()
    assert caught.value.step == Step.EXEC
    assert str(caught.value) == (
        "cpr-exec failed while waiting for old QEMU to become new QEMU: "
        f"old QEMU: migration failed: execvp {command} failed: {why}"
    )
    assert_goes_on(machine, guest)
    new = an_exec(machine).run()
    assert_goes_on(new, guest)


def test_a_new_qemu_that_ends_at_once_is_told(old: OldQemu, an_exec: Callable[..., Exec]) -> None:
    machine, _ = old
    with pytest.raises(CprError) as caught:
        an_exec(machine, commanded(machine, "sh", "-c", "echo no such machine >&2; exit 7")).run()
    assert "ended with 7; its last words:\nno such machine" in str(caught.value)


def test_a_new_qemu_with_other_devices_is_told_in_its_words(
    old: OldQemu, an_exec: Callable[..., Exec]
) -> None:
    machine, _ = old
    with pytest.raises(CprError) as caught:
        an_exec(machine, machine.successor(devices=("no-such-device",))).run()
    assert "'no-such-device' is not a valid device model name" in str(caught.value)


def test_the_state_file_is_among_what_is_left(old: OldQemu, an_exec: Callable[..., Exec]) -> None:
    new = an_exec(old[0]).run()
    assert PurePosixPath(new.main_path) in new.files
    assert Path(new.main_path).stat().st_size > 0
