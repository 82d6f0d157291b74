# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of vectors that a failure leaves for machines."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from fixtures.evidence import vectors
from fixtures.guests.probe import GuestError, Place
from fixtures.oracle.model import MsixModel
from fixtures.oracle.observation import Observation

#: Two entries of an MSI-X table: address, data, and vector control.
TABLE = bytes.fromhex("0000e0fe 00000000 30000000 00000000 0000e0fe 00000000 31000000 01000000")


def side(taken: tuple[int, int], masked: set[int]) -> Observation:
    return Observation(
        counters=(*[0] * 0x30, *taken),
        log_count=sum(taken),
        config=b"",
        table=TABLE,
        masked=frozenset(masked),
        pending=frozenset(),
        witness=0,
        loops=1,
    )


class Guest:
    """A guest that has taken vector 0 twice, and says that 1 is masked and pending."""

    stuck = False

    def counts(self, _: int) -> list[list[int]]:
        return [[*[0] * 0x30, 3, 0]]

    def batch(self, _: object, __: float) -> list[int]:
        if self.stuck:
            raise GuestError("no answer")
        return [0, 1, 0b10]


def rig(**more: Any) -> Any:
    model = MsixModel(2)
    model.set_control(enable=True)
    model.set_mask(False, 0, 1)
    model.fire(0)
    return SimpleNamespace(
        vectors=range(2),
        model=model,
        guest=Guest(),
        device=SimpleNamespace(interrupts=lambda: {0: 7}),
        function=SimpleNamespace(
            place=lambda n: Place(0, 0x30 + n),
            mask_ops=lambda: [1, 2],
            pba_ops=lambda: [3],
            masked=lambda words: frozenset(n for n, word in enumerate(words) if word),
            bits=lambda words: {n for n in range(2) if words[0] >> n & 1},
        ),
        sides={"before": side((1, 1), set()), "after": side((1, 2), {1})},
        shows_pending=True,
        _counts=[[*[0] * 0x30, 1, 0]],
        **more,
    )


def test_a_vector_before_and_after_the_cpr_and_now() -> None:
    table = vectors.of(rig())
    json.dumps(table)
    first, second = table["vectors"]
    assert first == {
        "vector": 0,
        "place": "IDT vector 0x30 of CPU 0",
        "before": {"taken": 1, "masked": False, "pending": False, "message": MESSAGE},
        "after": {"taken": 1, "masked": False, "pending": False, "message": MESSAGE},
        "now": {"taken": 2, "masked": False, "pending": False, "served": 7},
        "must": {"taken": 1, "masked": False, "pending": False},
    }
    assert (second["before"]["taken"], second["after"]["taken"]) == (1, 2)
    assert (second["before"]["masked"], second["after"]["masked"]) == (False, True)
    assert second["now"] == {"taken": 0, "masked": True, "pending": True}


MESSAGE = "0xfee00000/0x30"


def test_each_of_several_functions_is_named() -> None:
    one, other = rig(), rig()
    one.family = other.family = [one, other]
    one.device.address, other.device.address = "0000:01:00.0", "0000:01:00.1"
    rows = vectors.of(one)["vectors"]
    assert [(row["function"], row["vector"]) for row in rows] == [
        ("0000:01:00.0", 0),
        ("0000:01:00.0", 1),
        ("0000:01:00.1", 0),
        ("0000:01:00.1", 1),
    ]


def test_before_a_cpr_there_are_no_sides() -> None:
    some = rig()
    some.sides = {}
    assert vectors.of(some)["vectors"][0].keys() == {"vector", "place", "now", "must"}


def test_of_a_guest_that_cannot_answer_there_is_what_its_ram_says() -> None:
    some = rig()
    some.guest.stuck = True
    assert vectors.of(some)["vectors"][0]["now"] == {"taken": 2, "served": 7}


def test_a_guest_that_is_stopped_is_not_asked() -> None:
    some = rig()
    some.model.stop()
    assert vectors.of(some)["vectors"][0]["now"] == {"taken": 2, "served": 7}
