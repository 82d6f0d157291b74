# SPDX-License-Identifier: GPL-2.0-or-later
"""The model of MSI-X says what the PCI Local Bus Specification 3.0 says, rule by rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from fixtures.oracle.model import MsixModel


def in_use(size: int = 4) -> MsixModel:
    """A function as its driver leaves it: enabled, and every vector unmasked."""
    model = MsixModel(size)
    model.set_control(enable=True, function_mask=False)
    model.set_mask(False, *range(size))
    return model


def test_after_reset_it_is_disabled_and_every_vector_is_masked() -> None:
    """6.8.2.3: the state of both control bits after reset is 0; 6.8.2.9: a mask bit's is 1."""
    model = MsixModel(3)
    assert (model.enabled, model.function_mask) == (False, False)
    assert (model.masked, model.pending, model.delivered) == ({0, 1, 2}, set(), [])


def test_while_disabled_an_event_is_neither_delivered_nor_pending() -> None:
    """6.8.2.3: with MSI-X Enable clear, a function must not use MSI-X to request service."""
    model = in_use()
    model.set_control(enable=False, function_mask=False)
    model.fire(1)
    model.set_mask(True, 2)
    model.fire(2)
    assert (model.delivered, model.pending) == ([], set())


def test_unmasked_vectors_are_delivered_once_per_event_and_in_order() -> None:
    """6.8.3.4: a message is sent for each event."""
    model = in_use()
    for vector in (3, 0, 3, 1):
        model.fire(vector)
    assert (model.delivered, model.pending) == ([3, 0, 3, 1], set())


def test_a_masked_vector_becomes_pending_and_is_not_delivered() -> None:
    """6.8.3.5: a function must not send a message for a masked vector, and sets its bit."""
    model = in_use()
    model.set_mask(True, 2)
    model.fire(2)
    assert (model.delivered, model.pending) == ([], {2})


def test_masking_a_vector_leaves_the_others_alone() -> None:
    """6.8.2.9: each entry of the table has a mask bit of its own."""
    model = in_use()
    model.set_mask(True, 1, 2)
    for vector in range(4):
        model.fire(vector)
    assert (model.delivered, model.pending) == ([0, 3], {1, 2})


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_pending_vector_is_delivered_once_however_often_it_fired(times: int) -> None:
    """6.8.2.10: there is one bit per vector; 6.8.3.5: sending the message clears it."""
    model = in_use()
    model.set_mask(True, 1)
    for _ in range(times):
        model.fire(1)
    model.set_mask(False, 1)
    assert (model.delivered, model.pending) == ([1], set())
    model.set_mask(True, 1)
    model.set_mask(False, 1)
    assert model.delivered == [1]


def test_unmasking_delivers_pending_vectors_in_the_order_they_are_unmasked() -> None:
    """6.8.3.5: the message is sent when the vector is unmasked."""
    model = in_use()
    model.set_mask(True, 0, 1, 2)
    for vector in (0, 1, 2):
        model.fire(vector)
    model.set_mask(False, 2)
    model.set_mask(False, 1, 0)
    assert model.delivered == [2, 1, 0]


def test_function_mask_holds_back_all_vectors_and_leaves_their_mask_bits_alone() -> None:
    """6.8.2.3: all vectors are masked, regardless of their mask bits, which do not change."""
    model = in_use()
    model.set_mask(True, 3)
    model.set_control(enable=True, function_mask=True)
    for vector in range(4):
        model.fire(vector)
    assert (model.delivered, model.pending, model.masked) == ([], {0, 1, 2, 3}, {3})


def test_clearing_function_mask_delivers_what_is_pending_but_for_masked_vectors() -> None:
    """6.8.2.3: with Function Mask clear, each vector's mask bit decides again."""
    model = in_use()
    model.set_mask(True, 2)
    model.set_control(enable=True, function_mask=True)
    for vector in (3, 2, 0):
        model.fire(vector)
    model.set_control(enable=True, function_mask=False)
    assert (sorted(model.delivered), model.pending) == ([0, 3], {2})


def test_a_vector_unmasked_behind_function_mask_stays_pending() -> None:
    """6.8.2.3: Function Mask masks it still."""
    model = in_use()
    model.set_control(enable=True, function_mask=True)
    model.fire(1)
    model.set_mask(True, 1)
    model.set_mask(False, 1)
    assert (model.delivered, model.pending) == ([], {1})


@pytest.mark.parametrize("function_mask", [False, True])
def test_nothing_is_delivered_by_a_control_that_says_disabled(function_mask: bool) -> None:
    """6.8.2.3: whatever Function Mask says."""
    model = in_use()
    model.set_mask(True, 0)
    model.fire(0)
    model.set_control(enable=False, function_mask=function_mask)
    model.set_mask(False, 0)
    assert model.delivered == []


Step = tuple[str, int | None, Callable[[MsixModel, int], None]]

#: All that can happen to a function of two vectors: the vector concerned, None for both.
STEPS: list[Step] = [
    *(("fire", n, lambda m, v: m.fire(v)) for n in (0, 1)),
    *(("mask", n, lambda m, v: m.set_mask(True, v)) for n in (0, 1)),
    *(("unmask", n, lambda m, v: m.set_mask(False, v)) for n in (0, 1)),
    ("disable", None, lambda m, _: m.set_control(enable=False, function_mask=False)),
    ("enable", None, lambda m, _: m.set_control(enable=True, function_mask=False)),
    ("function mask", None, lambda m, _: m.set_control(enable=True, function_mask=True)),
]
HISTORIES = list(itertools.product(STEPS, repeat=4))


def after(history: tuple[Step, ...], size: int = 2) -> MsixModel:
    model = in_use(size)
    for _, vector, act in history:
        act(model, vector or 0)
    return model


def test_no_history_leaves_a_vector_pending_that_may_be_delivered() -> None:
    for history in HISTORIES:
        model = after(history)
        stuck = [n for n in model.pending if model.can_deliver(n)]
        assert not stuck, f"{[name for name, *_ in history]}: {model}"


def test_no_history_delivers_more_than_fired_or_loses_a_vector_that_was_never_disabled() -> None:
    for history in HISTORIES:
        model = after(history)
        names = [(name, vector) for name, vector, _ in history]
        for n in (0, 1):
            fired, seen = names.count(("fire", n)), model.delivered.count(n)
            assert seen + (n in model.pending) <= fired, f"{names}: {model}"
            if ("disable", None) not in names:
                assert (seen + (n in model.pending) > 0) == (fired > 0), f"{names}: {model}"


def test_in_every_history_a_vector_fares_as_if_it_were_alone() -> None:
    for history in HISTORIES:
        both = after(history)
        for n in (0, 1):
            alone = after(
                tuple((name, 0, act) for name, v, act in history if v in (None, n)), size=1
            )
            assert (both.delivered.count(n), n in both.pending, n in both.masked) == (
                alone.delivered.count(0),
                0 in alone.pending,
                0 in alone.masked,
            ), f"vector {n} of {[(name, v) for name, v, _ in history]}: {both}"
