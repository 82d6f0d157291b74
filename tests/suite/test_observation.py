# SPDX-License-Identifier: GPL-2.0-or-later
"""What differs from the model is named, vector by vector, in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.guests.probe import Delivery, Place
from fixtures.oracle import Mismatch, MsixModel
from fixtures.oracle.model import InterruptModel, IntxModel, MsiModel
from fixtures.oracle.observation import (
    compare,
    expect_flat,
    expect_same,
    expect_same_counts,
)
from fixtures.rig import Rig


@pytest.fixture
def model() -> MsixModel:
    """Vectors 0 and 2 were delivered, 1 is masked and pending, 3 is masked."""
    model = MsixModel(4)
    model.set_control(enable=True, function_mask=False)
    model.set_mask(False, 0, 2)
    for vector in (2, 1, 0):
        model.fire(vector)
    return model


def as_it_is(model: MsixModel) -> dict[str, object]:
    """What is seen of a function that does as its model says: the arguments of `compare`."""
    return {
        "seen": list(model.delivered),
        "strange": {},
        "pending": frozenset(model.pending),
        "masked": set(model.masked),
    }


def text_of(model: MsixModel, **changes: object) -> str:
    """What is said of a function that differs so."""
    with pytest.raises(Mismatch) as caught:
        compare(model, **{**as_it_is(model), **changes})  # type: ignore[arg-type]
    return str(caught.value)


def rows(text: str) -> dict[int, tuple[str, str]]:
    """The rows of the table: vector to what must be and what was."""
    cells = [re.split(r" {2,}", line.strip()) for line in text.splitlines()[2:]]
    return {int(vector): (must, was) for vector, must, was in cells}


def test_what_is_as_the_model_says_is_no_mismatch(model: MsixModel) -> None:
    compare(model, **as_it_is(model))  # type: ignore[arg-type]
    compare(MsixModel(1), [], {}, frozenset(), {0})


def test_the_order_is_not_what_is_compared_here(model: MsixModel) -> None:
    compare(model, **{**as_it_is(model), "seen": [0, 2]})  # type: ignore[arg-type]


def test_a_level_may_interrupt_several_times_but_not_without_a_request() -> None:
    model = IntxModel()
    model.fire(0)
    compare(model, [0, 0, 0], {}, frozenset(), frozenset())
    with pytest.raises(Mismatch, match=r"delivered 1x +delivered 0x"):
        compare(model, [], {}, frozenset(), frozenset())
    with pytest.raises(Mismatch, match=r"delivered 0x +delivered 1x"):
        compare(IntxModel(), [0], {}, frozenset(), frozenset())


Words = tuple[str, str]
DIFFERENCES: dict[str, tuple[dict[str, object], dict[int, Words]]] = {
    "lost": ({"seen": [2]}, {0: ("delivered 1x", "delivered 0x")}),
    "doubled": ({"seen": [2, 0, 2]}, {2: ("delivered 1x", "delivered 2x")}),
    "misrouted": (
        {"seen": [2, 3]},
        {0: ("delivered 1x", "delivered 0x"), 3: ("delivered 0x, masked", "delivered 1x, masked")},
    ),
    "spurious": (
        {"seen": [2, 0, 1]},
        {1: ("delivered 0x, pending, masked", "delivered 1x, pending, masked")},
    ),
    "pending bit lost": (
        {"pending": frozenset()},
        {1: ("delivered 0x, pending, masked", "delivered 0x, masked")},
    ),
    "pending bit set": (
        {"pending": frozenset({0, 1})},
        {0: ("delivered 1x", "delivered 1x, pending")},
    ),
    "unmasked": (
        {"masked": {3}},
        {1: ("delivered 0x, pending, masked", "delivered 0x, pending")},
    ),
    "masked": ({"masked": {1, 2, 3}}, {2: ("delivered 1x", "delivered 1x, masked")}),
}


@pytest.mark.parametrize(("changes", "named"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_what_differs_is_named_and_nothing_else(
    model: MsixModel, changes: dict[str, object], named: dict[int, Words]
) -> None:
    text = text_of(model, **changes)
    count = len(named)
    assert text.splitlines()[0] == f"{count} of 4 vectors are not as they must be:"
    assert rows(text) == named


def test_the_table_lines_up(model: MsixModel) -> None:
    assert text_of(model, seen=[2, 1, 1], pending=frozenset()) == (
        "2 of 4 vectors are not as they must be:\n"
        "  vector   must be                            was\n"
        "       0   delivered 1x                       delivered 0x\n"
        "       1   delivered 0x, pending, masked      delivered 2x, masked"
    )


def test_a_long_table_is_cut_and_says_so() -> None:
    model = MsixModel(64)
    lines = text_of(model, masked=set()).splitlines()
    assert lines[0] == "64 of 64 vectors are not as they must be:"
    assert len(lines) == 2 + 20 + 1
    assert lines[-1] == "  ... and 44 more"


def test_interrupts_of_nobody_are_named_by_where_they_came(model: MsixModel) -> None:
    assert text_of(model, strange={Place(0, 0x21): 3, Place(1, 0xFF): 1}) == (
        "interrupts came that nothing had raised: "
        "IDT vector 0x21 of CPU 0 3 times, IDT vector 0xff of CPU 1 1 times"
    )


def test_a_vector_that_went_astray_is_missing_and_shows_where_it_came(model: MsixModel) -> None:
    text = text_of(model, seen=[], strange={Place(1, 0x30): 1})
    table, _, last = text.rpartition("\n")
    assert rows(table)[0] == ("delivered 1x", "delivered 0x")
    assert last.endswith("IDT vector 0x30 of CPU 1 1 times")


def test_many_interrupts_of_nobody_are_cut_and_say_so(model: MsixModel) -> None:
    text = text_of(model, strange={Place(0, vector): 1 for vector in range(0x30, 0x50)})
    assert text.endswith("IDT vector 0x43 of CPU 0 1 times, and 12 more")


def test_msi_is_compared_in_all_vectors_that_the_function_has() -> None:
    model = MsiModel(4, granted=2)
    model.set_control(enable=True)
    model.set_mask(True, 1)
    for vector in (0, 1):
        model.fire(vector)
    compare(model, [0], {}, {1}, {1})
    with pytest.raises(Mismatch) as caught:
        compare(model, [0, 3], {}, {1, 2}, {1})
    assert rows(str(caught.value)) == {
        2: ("delivered 0x", "delivered 0x, pending"),
        3: ("delivered 0x", "delivered 1x"),
    }


def test_interrupt_disable_is_compared_as_the_mask_of_vector_0() -> None:
    model = IntxModel()
    model.fire(0)
    model.acknowledge()
    model.set_mask(True, 0)
    compare(model, [0], {}, frozenset(), {0})
    with pytest.raises(Mismatch) as caught:
        compare(model, [0], {}, frozenset(), frozenset())
    assert rows(str(caught.value)) == {0: ("delivered 1x, masked", "delivered 1x")}


# The order, and what no vector of ours names: the rig's own part of the comparison.


class FakeGuest:
    """A guest that has taken these IDT vectors, in this order."""

    def __init__(self, *taken: int, cpu: int = 0) -> None:
        self._taken = [Delivery(vector, tsc=0, cpu=cpu) for vector in taken]

    def log(self, _since: int, _count: int) -> list[Delivery]:
        return self._taken


class FakeFunction:
    """A function with pending bits, or without."""

    def __init__(self, *, has_pending_bits: bool) -> None:
        self._has_pending_bits = has_pending_bits

    def idt_vector(self, vector: int) -> int:
        return 0x30 + vector

    def place(self, vector: int) -> Place:
        return Place(0, self.idt_vector(vector))

    def mask_ops(self) -> list[object]:
        return ["an operation"]

    def pba_ops(self) -> list[object]:
        return ["an operation"] if self._has_pending_bits else []

    def masked(self, words: Sequence[int]) -> frozenset[int]:
        return frozenset(words)

    bits = masked


@pytest.fixture
def rig_that_saw() -> Callable[..., Rig]:
    """A rig whose guest has taken these IDT vectors since it began to count."""

    def make(
        model: InterruptModel, *taken: int, pending_bits: Set[int] | None = None, cpu: int = 0
    ) -> Rig:
        masked = sorted(model.masked)

        class Seen(Rig):
            def __init__(self) -> None:
                self.model, self.vectors = model, range(model.size)
                self._pba = True
                self.guest = FakeGuest(*taken, cpu=cpu)  # type: ignore[assignment]
                self.function = FakeFunction(  # type: ignore[assignment]
                    has_pending_bits=pending_bits is not None
                )
                self._log_count = 0
                self.family = [self]

            def _settle(self) -> None:
                pass

            def _acknowledged(self) -> None:
                pass

            def _read(self, *parts: object) -> tuple[list[list[int]], Any]:
                assert len(parts) == 2
                return [masked, sorted(pending_bits or ())], SimpleNamespace(log_count=len(taken))

        return Seen()

    return make


def test_a_rig_that_saw_what_the_model_says_is_content(
    model: MsixModel, rig_that_saw: Callable[..., Rig]
) -> None:
    rig = rig_that_saw(model, 0x32, 0x30, pending_bits={1})
    rig.check()
    model.masked = {0, 1, 3}  # but not what the guest reads
    with pytest.raises(Mismatch, match="1 of 4 vectors"):
        rig.check()


def test_a_vector_that_another_cpu_took_is_told(
    model: MsixModel, rig_that_saw: Callable[..., Rig]
) -> None:
    rig = rig_that_saw(model, 0x32, 0x30, pending_bits={1}, cpu=1)
    with pytest.raises(
        Mismatch, match=r"IDT vector 0x32 of CPU 1 1 times, IDT vector 0x30 of CPU 1"
    ):
        rig.check()


def test_pending_bits_that_are_not_to_be_compared_are_not(
    model: MsixModel, rig_that_saw: Callable[..., Rig]
) -> None:
    rig = rig_that_saw(model, 0x32, 0x30, pending_bits=set())
    with pytest.raises(Mismatch, match="1 of 4 vectors"):
        rig.check()
    rig.check(pba=False)


def test_a_function_without_pending_bits_need_not_show_what_is_pending(
    rig_that_saw: Callable[..., Rig],
) -> None:
    model = IntxModel()
    model.set_mask(True, 0)
    model.fire(0)
    rig_that_saw(model).check()
    with pytest.raises(Mismatch, match="1 of 1 vectors"):
        rig_that_saw(model, 0x30).check()


def test_another_order_is_told(model: MsixModel, rig_that_saw: Callable[..., Rig]) -> None:
    rig = rig_that_saw(model, 0x30, 0x32)
    with pytest.raises(Mismatch, match=r"another order: \[0, 2\], and must be \[2, 0\]"):
        rig.check()
    rig.check(in_order=False)


@pytest.mark.parametrize("stray", [0x20, 0x34, 0xFF])
def test_an_interrupt_that_no_vector_of_ours_names_is_told(
    model: MsixModel, rig_that_saw: Callable[..., Rig], stray: int
) -> None:
    told = f"interrupts came that nothing had raised: IDT vector {stray:#x} of CPU 0 1 times"
    with pytest.raises(Mismatch, match=told):
        rig_that_saw(model, 0x32, stray, 0x30).check()


def test_the_same_bytes_are_the_same() -> None:
    expect_same("it", bytes(8), bytes(8))


@pytest.mark.parametrize(
    ("after", "says"),
    [
        (b"\0\0\0\0\1\0\0\0", "it differs: 0x4: 00000000 -> 01000000"),
        (b"\1\0\0\0\0\0\0\2", "it differs: 0x0: 00000000 -> 01000000, 0x4: 00000000 -> 00000002"),
        (bytes(4), "it differs: 0x4: 00000000 -> "),
    ],
)
def test_what_differs_is_told_with_its_place(after: bytes, says: str) -> None:
    with pytest.raises(Mismatch) as caught:
        expect_same("it", bytes(8), after)
    assert str(caught.value) == says


def test_of_many_differences_some_are_said() -> None:
    with pytest.raises(Mismatch, match=r"it differs: 0x0: 00 -> 01, .* and at 36 more places$"):
        expect_same("it", bytes(100), b"\1" * 100, 1)


def test_equal_counts_are_the_same_also_where_there_is_none() -> None:
    expect_same_counts("descriptors", {"eventfd": 2, "socket": 0}, {"eventfd": 2})


def test_counts_that_differ_are_named_with_what_was_and_is_there() -> None:
    with pytest.raises(Mismatch) as caught:
        expect_same_counts("descriptors", {"a": 1, "b": 2, "c": 3}, {"b": 2, "c": 1, "d": 1})
    assert str(caught.value) == "descriptors differ: a 1 -> 0, c 3 -> 1, d 0 -> 1"


@pytest.mark.parametrize(
    "values",
    [[7], [5, 9], [5, 400, 5, 6, 7, 6, 8, 500, 7], [9, 8, 7], [0, 0, 0, 3]],
    ids=["one", "within-the-slack", "spoilt-ones", "shrinking", "from-nothing"],
)
def test_what_does_not_grow_is_flat(values: Sequence[float]) -> None:
    expect_flat("it", values, slack=4)


@pytest.mark.parametrize("values", [[5, 10], [5, 6, 10], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
def test_what_grows_is_told_with_all_of_its_values(values: Sequence[float]) -> None:
    shown = ", ".join(map(str, values))
    with pytest.raises(Mismatch, match=rf"^it grows from \d+ to \d+: {shown}$"):
        expect_flat("it", values, slack=4)


def test_what_grows_by_no_more_than_its_factor_is_flat() -> None:
    expect_flat("it", [5, 15], factor=3, slack=0)
    with pytest.raises(Mismatch, match=r"it grows from 5 to 15\.5"):
        expect_flat("it", [5, 15.5], factor=3, slack=0)
