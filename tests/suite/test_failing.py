# SPDX-License-Identifier: GPL-2.0-or-later
"""A cpr-transfer that somebody makes go wrong, between two real QEMUs of this machine.

TCG, the probe guest, no VFIO, as in test_transfer.py.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from fixtures.cpr import CprError, Failing, Step, TooLate
from fixtures.cpr.relay import Relay
from fixtures.guests import Op, ProbeGuest
from fixtures.guests.probe import Verb
from fixtures.hosts import LocalHost
from fixtures.machines import Machine
from images.errors import SuiteError

OldQemu = tuple[Machine, ProbeGuest]  # tests/suite/conftest.py


# Who is between them.


@pytest.fixture
def relay(local: LocalHost) -> Iterator[Relay]:
    relay = Relay(local, 0.3)
    yield relay
    relay.cut()


@pytest.fixture
def caller(local: LocalHost, relay: Relay) -> Iterator[socket.socket]:
    with local.connect(relay.path) as stream:
        stream.settimeout(20)
        relay.answer()
        yield stream


@pytest.fixture
def callee(local: LocalHost, relay: Relay, caller: socket.socket) -> Iterator[socket.socket]:
    assert caller
    path = relay.path.with_suffix(".new")
    with local.listen(path) as listener:
        assert not relay.has_called
        relay.call(path)
        assert relay.has_called
        stream = listener.accept()[0]
    with stream:
        stream.settimeout(20)
        yield stream


def test_it_passes_on_what_it_is_told_to(
    relay: Relay, caller: socket.socket, callee: socket.socket
) -> None:
    caller.sendall(b"12345")
    relay.pass_some(2)
    assert callee.recv(100) == b"12"
    relay.pass_on()
    assert callee.recv(100) == b"345"
    relay.pass_on()  # of nothing
    caller.sendall(b"before, MA")
    caller.sendall(b"RK, after")
    relay.pass_up_to(b"MARK")
    assert callee.recv(100) == b"before, "


def test_what_is_said_back_gets_nowhere_and_a_cut_is_seen_on_either_side(
    relay: Relay, caller: socket.socket, callee: socket.socket
) -> None:
    callee.sendall(b"well?")
    relay.cut()
    assert caller.recv(100) == b""
    with pytest.raises(ConnectionResetError):
        callee.recv(100)


def test_what_does_not_come_is_told(relay: Relay, caller: socket.socket) -> None:
    with pytest.raises(SuiteError, match="does not send on: timed out"):
        relay.pass_some(1)
    caller.close()
    with pytest.raises(SuiteError, match="sends no more"):
        relay.pass_some(1)


def test_who_does_not_call_is_told(relay: Relay) -> None:
    with pytest.raises(SuiteError, match=r"old QEMU does not call .*\.relay: timed out"):
        relay.answer()


# What goes wrong, and when.


@pytest.mark.parametrize(
    ("fault", "at"),
    [
        (Failing.cut, Step.CALLED),
        (Failing.cut_amid, Step.CALLED),
        (Failing.cancel, Step.ACTIVE),
        (Failing.kill, Step.LOADED),
    ],
)
def test_the_guest_goes_on_in_old_qemu(
    old: OldQemu, fault: Callable[[Failing], None], at: Step
) -> None:
    machine, guest = old
    cpr = Failing(machine, machine.successor(options=("-S",)), fault, at=at)
    cpr.fail()
    assert (cpr.reached, machine.status()) == (at, "running")
    assert cpr.told
    assert cpr.states[-1] in ("cancelled", "failed")
    guest.batch([Op(Verb.NOP)])


def test_a_guest_that_runs_in_both_is_told(old: OldQemu) -> None:
    """QEMU lets it, where it has no vfio device."""
    machine, _ = old
    cpr = TooLate(machine, fault=Failing.cut)
    try:
        with pytest.raises(CprError, match="the guest runs in new QEMU and in old QEMU"):
            cpr.run()
    finally:
        cpr.new.close()


def test_a_guest_that_goes_back_is_told(old: OldQemu) -> None:
    machine, _ = old
    with pytest.raises(CprError, match="the guest runs in old QEMU again"):
        TooLate(machine, fault=Failing.kill).run()


def test_what_was_to_go_wrong_and_did_not_is_no_failure_of_qemu_that_was_seen(
    old: OldQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Relay) -> None:
        raise SuiteError("nobody calls")

    monkeypatch.setattr(Relay, "answer", refuse)
    with pytest.raises(CprError, match="nobody calls"):
        Failing(old[0], old[0].successor(), Failing.cut, at=Step.CALLED).fail()
