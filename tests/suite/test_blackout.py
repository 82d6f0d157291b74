# SPDX-License-Identifier: GPL-2.0-or-later
"""How a blackout is told: by words that a guest has read, and of a real guest in a lab host."""

from __future__ import annotations

import struct
import time

import pytest

from fixtures.bench import LabBench
from fixtures.blackout import gap_ms, standstill_ms
from fixtures.guests.clock import Clock, ask_clock
from fixtures.guests.probe import Verb
from fixtures.matrix import Point
from fixtures.rig import Rig
from fixtures.storm import Storm

GHZ = 1_000_000_000
#: The guest was stopped when its counter was at 5 s, and the time of day 105; new QEMU had it go on
#: at 107.
OLD, NEW, RESUMED_S = Clock(0, 100.0, GHZ), Clock(5 * GHZ, 107.0, GHZ), 107.0


def answers(*clock: int, version: int = 2, flags: int = 1) -> list[int]:
    """What `ask_clock` brings where KVM has written this."""
    ops = ask_clock()
    read = [n for n, op in enumerate(ops) if op.verb is Verb.READ]
    values = [0] * len(ops)
    values[read[0] : read[-1] + 1] = struct.unpack(
        "<11I", struct.pack("<3II4xQQIbB2x", version, 1000, 500_000_000, version, *clock, flags)
    )
    return values


@pytest.mark.parametrize(
    ("scale", "shift", "hz"),
    [(1 << 31, 0, 2e9), (1 << 31, 1, 1e9), (1 << 31, -1, 4e9)],
)
def test_a_clock_is_what_kvm_says(scale: int, shift: int, hz: float) -> None:
    clock = Clock.of(answers(7 * GHZ, 250_000_000, scale, shift))
    assert clock == Clock(7 * GHZ, 1000.75, hz)
    assert clock.time(7 * GHZ) == 1000.75
    assert clock.time(7 * GHZ + int(hz)) == 1001.75


def test_where_nobody_answers_there_is_no_clock() -> None:
    assert Clock.of(answers(0, 0, 0, 0, version=0)) is None


def test_a_counter_that_cannot_be_relied_on_is_no_clock() -> None:
    assert Clock.of(answers(0, 250_000_000, 1 << 31, 0)) is None
    assert Clock.of(answers(7 * GHZ, 250_000_000, 1 << 31, 0, flags=0)) is None


def test_a_gap_is_from_the_last_in_old_qemu_to_the_first_in_new_qemu() -> None:
    taken = [int(at * GHZ) for at in (3.0, 4.9, 5.01, 5.02)]
    assert gap_ms(taken, OLD, NEW, RESUMED_S) == pytest.approx(2110)


@pytest.mark.parametrize("taken", [[], [4], [4, 4.9], [5.1, 5.2]])
def test_there_is_no_gap_without_interrupts_on_either_side(taken: list[float]) -> None:
    assert gap_ms([int(at * GHZ) for at in taken], OLD, NEW, RESUMED_S) is None


def test_a_guest_stood_still_for_as_long_as_its_counter_shows_the_same() -> None:
    assert standstill_ms(OLD, NEW) == pytest.approx(2000)
    later = Clock(NEW.tsc + GHZ, NEW.at_s + 1, GHZ)
    assert standstill_ms(OLD, later) == pytest.approx(2000)


HELD_S = 0.5


@pytest.fixture
def rig(request: pytest.FixtureRequest, lab_bench: LabBench) -> Rig:
    rig = lab_bench.rig(Point(), request.addfinalizer)
    rig.use_all()
    return rig


def test_a_cpr_that_is_held_up_shows_by_each_clock_but_not_as_downtime(rig: Rig) -> None:
    with Storm(rig) as storm:
        cpr = rig.hand_over(lambda: time.sleep(HELD_S))
        storm.goes_on()
    cpr.leave()
    rig.time_deliveries()
    gap = rig.blackout
    assert gap is not None
    assert gap.guest_ms is not None
    assert gap.qemu_ms is not None
    assert gap.downtime_ms is not None
    assert gap.guest_ms > gap.qemu_ms > HELD_S * 1e3
    assert gap.downtime_ms < gap.qemu_ms


def test_without_interrupts_the_guest_tells_how_long_it_stood_still(rig: Rig) -> None:
    rig.hand_over(lambda: time.sleep(HELD_S)).leave()
    gap = rig.blackout
    assert gap is not None
    assert gap.guest_ms is not None
    assert gap.qemu_ms is not None
    assert gap.guest_ms == pytest.approx(gap.qemu_ms, rel=0.2)


def test_a_guest_that_was_paused_tells_nothing(rig: Rig) -> None:
    rig.stop()
    rig.hand_over().leave()
    assert rig.blackout is not None
    assert rig.blackout.guest_ms is None
    rig.time_deliveries()
    assert rig.blackout.guest_ms is None
