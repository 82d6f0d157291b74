# SPDX-License-Identifier: GPL-2.0-or-later
"""The probe as a guest with a driver, in a real QEMU of this machine: TCG, no VFIO, no CPR."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from fixtures.direct import DirectBench, described
from fixtures.driven import DrivenProbe
from fixtures.guests.base import Guest
from fixtures.rig import Rig
from fixtures.subject import Subject
from fixtures.waiting import until

VECTORS = 4
NAMES = [f"vector {n}" for n in range(VECTORS)]


@pytest.fixture(scope="module")
def rig(subject: Subject) -> Iterator[Rig]:
    bench = DirectBench(subject)
    with ExitStack() as stack:
        stack.callback(bench.close)
        yield bench.rig(described(VECTORS), stack.callback, pba=False)


@pytest.fixture(scope="module")
def guest(rig: Rig) -> DrivenProbe:
    return DrivenProbe(rig)


def test_it_is_a_guest(guest: DrivenProbe) -> None:
    as_any: Guest = guest
    assert as_any.boot() == "1"


def test_each_round_raises_each_vector_once_and_all_of_it_comes(guest: DrivenProbe) -> None:
    before = guest.interrupts()
    traffic = guest.traffic()
    traffic.moves()
    assert traffic.end() == [(name, name) for name in NAMES * 2]
    assert guest.interrupts() == {name: (before[name][0] + 2,) for name in NAMES}


def test_what_comes_without_being_sent_shows(guest: DrivenProbe, rig: Rig) -> None:
    traffic = guest.traffic()
    count = rig.guest.look().log_count
    rig.endpoint.fire(2)
    until(lambda: rig.guest.look().log_count > count, "the interrupt", 10)
    assert traffic.end()[-1] == ("nothing", "vector 2")


def test_what_is_sent_and_does_not_come_shows(guest: DrivenProbe, rig: Rig) -> None:
    traffic = guest.traffic()
    rig.model.fire(1)
    assert traffic.end()[-1] == ("vector 1", "nothing")


def test_it_is_sent_to_a_cpu(guest: DrivenProbe) -> None:
    traffic = guest.traffic()
    names = guest.send_to(0)
    assert names == set(NAMES)
    guest.await_interrupts(names, 0)
    assert all(sent == came for sent, came in traffic.end())


def test_its_driver_lets_go_of_the_function_and_takes_it_back(guest: DrivenProbe) -> None:
    guest.rebind()
    assert guest.traffic().end() == [(name, name) for name in NAMES]


def test_after_a_reset_it_lives_anew(guest: DrivenProbe) -> None:
    before = guest.account()
    guest.reset()
    after = guest.account()
    assert (before.boot, after.boot) == ("1", "2")
    assert after.interrupts == dict.fromkeys(NAMES, (1,))  # as its driver took the function
    assert guest.traffic().end() == [(name, name) for name in NAMES]
    assert guest.account().uptime_s > after.uptime_s
