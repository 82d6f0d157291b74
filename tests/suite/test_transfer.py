# SPDX-License-Identifier: GPL-2.0-or-later
"""cpr-transfer between two real QEMUs of this machine: how it goes well, and how it fails.

TCG, the probe guest, no VFIO: what is tried here is the choreography, and that of everything
that can go wrong the first thing is told, with the step it happened at.
"""

from __future__ import annotations

import shlex
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace

import pytest

from fixtures.cpr import CprError, Step, Transfer
from fixtures.cpr.transfer import _listens
from fixtures.guests import Op, ProbeGuest
from fixtures.guests.probe import Verb
from fixtures.hosts import LocalHost
from fixtures.machines import Event, Machine, Monitor
from fixtures.waiting import until
from images.errors import SuiteError

OldQemu = tuple[Machine, ProbeGuest]  # tests/suite/conftest.py


@pytest.fixture
def failing(request: pytest.FixtureRequest) -> Callable[..., CprError]:
    """Runs a transfer that must fail; new QEMU is ended afterwards."""

    def run(transfer: Transfer) -> CprError:
        request.addfinalizer(transfer.new.close)
        with pytest.raises(CprError) as caught:
            transfer.run()
        return caught.value

    return run


def assert_goes_on(old: OldQemu) -> None:
    """Old QEMU still runs its guest, which still does as it is told."""
    machine, guest = old
    assert machine.status() == "running"
    loops = guest.look().loops
    until(lambda: guest.look().loops > loops, "the guest to go on", 10, but=machine.died)
    guest.batch([Op(Verb.NOP)])


def set_capability(machine: Machine, name: str) -> None:
    capability = {"capability": name, "state": True}
    machine.monitor.execute("migrate-set-capabilities", {"capabilities": [capability]})


# It goes well.


@pytest.fixture
def done(old: OldQemu) -> Iterator[Transfer]:
    transfer = Transfer(old[0])
    assert transfer.step == Step.IDLE
    assert transfer.run() is transfer.new
    yield transfer
    transfer.new.close()


def test_new_qemu_runs_the_guest_and_old_qemu_is_left_in_postmigrate(
    old: OldQemu, done: Transfer
) -> None:
    machine, guest = old
    assert (machine.status(), done.new.status()) == ("postmigrate", "running")
    guest.stuck = done.new.died
    loops = guest.look().loops
    machine.quit()
    assert machine.process.poll() == 0
    until(lambda: guest.look().loops > loops, "the guest to go on", 10, but=done.new.died)
    guest.batch([Op(Verb.NOP)])


def test_its_steps_have_their_times_in_order(done: Transfer) -> None:
    assert done.step == Step.RUNNING
    assert list(done.times) == [
        Step.START,
        Step.LISTENING,
        Step.MIGRATE,
        Step.MONITOR,
        Step.HANDOVER,
        Step.RUNNING,
    ]
    assert list(done.times.values()) == sorted(done.times.values())


def test_what_is_to_be_done_at_its_steps_is_done_in_their_order(old: OldQemu) -> None:
    seen: list[tuple[Step, str]] = []

    def look(step: Step) -> None:
        seen.append((step, transfer.new.status() if step == Step.RUNNING else old[0].status()))

    steps = (Step.RUNNING, Step.MIGRATE)
    transfer = Transfer(old[0], moments={step: partial(look, step) for step in steps})
    try:
        transfer.run()
    finally:
        transfer.new.close()
    assert seen == [(Step.MIGRATE, "running"), (Step.RUNNING, "running")]


def test_it_tells_for_how_long_the_guest_stood_still(done: Transfer) -> None:
    took_ms = (done.times[Step.RUNNING] - done.times[Step.MIGRATE]) * 1e3
    assert done.downtime_ms is not None
    assert 0 <= done.downtime_ms <= took_ms


def test_the_blackout_is_from_stop_to_resume_where_both_were_seen() -> None:
    def saw(**events: float) -> Machine:
        found = {name: Event(name, at, {}) for name, at in events.items()}
        return SimpleNamespace(monitor=SimpleNamespace(seen=found.get))  # type: ignore[return-value]

    assert Transfer(saw(STOP=10.0), saw(RESUME=10.25)).blackout_ms == 250
    assert Transfer(saw(STOP=10.0), saw()).blackout_ms is None, "it came before our session"
    assert Transfer(saw(), saw(RESUME=10.25)).blackout_ms is None


def test_a_socket_listens_only_once_it_does(local: LocalHost) -> None:
    """QEMU's is in the file system before it listens, and connecting is refused in between."""
    machine: Machine = SimpleNamespace(host=local)  # type: ignore[assignment]
    path = local.scratch / "7.cpr"
    assert not _listens(machine, path)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as other:
        other.bind(str(local.scratch / "17.cpr"))
        other.listen()
        server.bind(str(path))
        assert not _listens(machine, path)
        server.listen()
        assert _listens(machine, path)


def test_a_machine_can_be_taken_over_again_and_again(old: OldQemu, done: Transfer) -> None:
    old[0].quit()
    again = Transfer(done.new)
    try:
        assert again.run().status() == "running"
        assert done.new.status() == "postmigrate"
    finally:
        again.new.close()


PORT = "pcie-root-port,id=port0,chassis=1,addr=0x5"


def test_new_qemu_can_be_given_devices_by_its_monitor(a_machine: Callable[..., Machine]) -> None:
    late = "virtio-rng-pci,id=late,bus=port0"
    machine = a_machine(PORT, late)
    machine.start()
    transfer = Transfer(machine, late=[late])
    try:
        new = transfer.run()
        assert new.status() == "running"
        assert late not in new.argv
        assert new.spec == machine.spec
        assert list(transfer.times)[3:5] == [Step.MONITOR, Step.PLUG]
        new.monitor.execute("qom-list", {"path": "/machine/peripheral/late"})
    finally:
        transfer.new.close()


# It fails.


def test_a_new_qemu_that_refuses_a_device_of_its_monitor_is_quoted(
    a_machine: Callable[..., Machine], failing: Callable[..., CprError]
) -> None:
    late = "virtio-rng-pci,id=late,addr=0x6"
    machine = a_machine(late)
    machine.start()
    error = failing(Transfer(machine, late=[late]))
    assert error.step == Step.PLUG
    assert "new QEMU refused device_add: Bus 'pcie.0' does not support hotplugging" in str(error)


class Misled(Machine):
    """A new QEMU with an option that it does not know."""

    def start(self, incoming: Sequence[str] = ()) -> None:
        super().start([*incoming, "-no-such-option"])


def test_a_new_qemu_that_dies_at_its_start_is_told_with_its_last_words(
    old: OldQemu, failing: Callable[..., CprError]
) -> None:
    machine, _ = old
    error = failing(Transfer(machine, Misled(machine.host, machine.spec, "new QEMU")))
    assert error.step == Step.LISTENING
    assert str(error).startswith(
        "cpr-transfer failed while waiting for new QEMU to listen on the CPR channel: "
    )
    assert "ended with 1; its last words:" in str(error)
    assert "-no-such-option: invalid option" in str(error)
    assert str(error).endswith(" -no-such-option"), "the command line, to be pasted"
    assert machine.monitor.seen("MIGRATION") is None, "old QEMU has not been told anything"
    assert_goes_on(old)


def test_a_new_qemu_that_refuses_a_device_is_told_with_its_last_words(
    old: OldQemu, failing: Callable[..., CprError]
) -> None:
    """It creates its devices after it has read the CPR state: old QEMU sees it go, too."""
    machine, _ = old
    error = failing(Transfer(machine, machine.successor(devices=("no-such-device",))))
    assert error.step == Step.MONITOR
    assert "old QEMU: migration failed: " in str(error)
    assert "'no-such-device' is not a valid device model name" in str(error)
    assert_goes_on(old)


def test_old_qemu_is_given_a_moment_to_see_that_new_qemu_has_gone() -> None:
    states = iter(("active", "active", "failed"))
    monitor = SimpleNamespace(
        events=[Event("MIGRATION", 1.0, {"status": "active"})],
        execute=lambda *_, **__: {"status": next(states), "error-desc": "it has gone"},
    )
    old = SimpleNamespace(monitor=monitor, died=lambda: None)
    new = SimpleNamespace(is_started=True, died=lambda: "ended with 1")
    transfer = Transfer(old, new)  # type: ignore[arg-type]
    transfer._mark = 0
    assert transfer._old_says() == (
        "old QEMU: migration failed: it has gone\nnew QEMU ended with 1"
    )


class Deaf(Machine):
    """A new QEMU that listens on nothing."""

    def start(self, _incoming: Sequence[str] = ()) -> None:
        super().start(["-S"])


def test_a_new_qemu_that_does_not_listen_is_told_at_the_deadline(
    old: OldQemu, failing: Callable[..., CprError]
) -> None:
    machine, guest = old
    # RAM of its own, as it starts a guest in it.
    spec = machine.successor(ram=machine.spec.ram.with_suffix(".other")).spec
    error = failing(Transfer(machine, Deaf(machine.host, spec, "new QEMU"), deadline_s=0.5))
    machine.host.remove(spec.ram)
    assert (error.step, str(error).rpartition(": ")[2]) == (
        Step.LISTENING,
        "waited 0.5 s for its CPR socket",
    )
    assert machine.monitor.seen("MIGRATION") is None, "old QEMU has not been told anything"
    assert_goes_on((machine, guest))


class Doomed(Machine):
    """A new QEMU that is killed when it begins to load."""

    @property
    def monitor(self) -> Monitor:
        self.process.kill()
        return super().monitor


def test_a_new_qemu_that_is_killed_while_it_loads_leaves_the_guest_in_old_qemu(
    old: OldQemu, failing: Callable[..., CprError]
) -> None:
    machine, _ = old
    error = failing(Transfer(machine, Doomed(machine.host, machine.spec, "new QEMU")))
    assert error.step == Step.MONITOR
    assert "was killed by signal 9" in str(error)
    assert shlex.join(machine.spec.arguments()[:2]) in str(error), "its command line"
    until(
        lambda: (
            machine.monitor.execute("query-migrate").get("status") in ("failed", "cancelled", None)
        ),
        "old QEMU to give up",
        20,
        pause_s=0.01,
    )
    assert_goes_on(old)


def test_a_migration_that_does_not_end_is_told_at_the_deadline(
    old: OldQemu, failing: Callable[..., CprError]
) -> None:
    machine, _ = old
    set_capability(machine, "pause-before-switchover")
    transfer = Transfer(machine, deadline_s=0.5)
    error = failing(transfer)
    assert error.step == Step.HANDOVER == transfer.step
    assert "waited 0.5 s for old QEMU to complete the migration" in str(error)
    assert Step.RUNNING not in transfer.times


def test_a_guest_that_cannot_go_on_in_new_qemu_is_not_waited_for(
    old: OldQemu, failing: Callable[..., CprError], monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = Transfer(old[0])
    monkeypatch.setattr(transfer.new, "status", lambda: "internal-error")
    error = failing(transfer)
    assert error.step == Step.HANDOVER
    assert "new QEMU is in internal-error; its last words:" in str(error)


def test_a_new_qemu_that_cannot_load_the_state_is_told_with_its_last_words(
    a_machine: Callable[..., Machine], failing: Callable[..., CprError]
) -> None:
    machine = a_machine("nec-usb-xhci,id=usb")
    machine.start()
    machine.alive(ProbeGuest(machine.host, machine.spec.ram, machine.died).wait_ready)
    error = failing(Transfer(machine, machine.successor(devices=())))
    assert error.step in (Step.MONITOR, Step.HANDOVER), "its death may be quicker than our QMP"
    assert "new QEMU ended with 1; its last words:" in str(error)
    assert "load of migration failed" in str(error)


def test_a_new_qemu_whose_sockets_close_before_it_is_gone_is_quoted_too(
    a_machine: Callable[..., Machine], failing: Callable[..., CprError]
) -> None:
    answers = iter([None, None, "ended with 1"])

    class Refused(Transfer):
        """Old QEMU gives up on a new QEMU that is seen dead at the third look."""

        def _handover(self) -> None:
            self.old.monitor.execute("migrate_cancel")
            until(lambda: "cancelled" in self._states(), "old QEMU to give up", 20)
            self.new.died = lambda: next(answers)  # type: ignore[method-assign]
            raise SuiteError("it has given up")

    machine = a_machine()
    machine.start()
    set_capability(machine, "pause-before-switchover")
    assert "\nnew QEMU ended with 1" in str(failing(Refused(machine)))


def test_a_migration_that_is_cancelled_leaves_the_guest_in_old_qemu(
    old: OldQemu, failing: Callable[..., CprError]
) -> None:
    machine, _ = old

    class Regretted(Machine):
        """A new QEMU at whose sight old QEMU changes its mind."""

        @property
        def monitor(self) -> Monitor:
            monitor = super().monitor
            machine.monitor.wait_event("STOP", 20)
            machine.monitor.execute("migrate_cancel")
            return monitor

    set_capability(machine, "pause-before-switchover")
    error = failing(Transfer(machine, Regretted(machine.host, machine.spec, "new QEMU")))
    assert error.step == Step.HANDOVER
    assert "migration cancelled" in str(error)
    until(lambda: machine.status() == "running", "old QEMU to go on", 20, pause_s=0.01)
    assert_goes_on(old)


def test_an_old_qemu_that_refuses_is_quoted(old: OldQemu, failing: Callable[..., CprError]) -> None:
    machine, _ = old
    set_capability(machine, "postcopy-ram")
    error = failing(Transfer(machine))
    assert error.step == Step.MIGRATE
    assert "old QEMU refused migrate" in str(error)
    assert_goes_on(old)


def test_a_dead_old_qemu_is_told_as_such(old: OldQemu, failing: Callable[..., CprError]) -> None:
    machine, _ = old
    machine.process.kill()
    error = failing(Transfer(machine))
    assert error.step == Step.MIGRATE
    assert "old QEMU" in str(error)
    assert "killed by signal 9" in str(error)


def test_a_failed_transfer_can_be_followed_by_one_that_succeeds(
    old: OldQemu, failing: Callable[..., CprError]
) -> None:
    machine, guest = old
    failing(Transfer(machine, machine.successor(devices=("no-such-device",))))
    transfer = Transfer(machine)
    try:
        transfer.run()
        guest.stuck = transfer.new.died
        guest.batch([Op(Verb.NOP)])
    finally:
        transfer.new.close()
