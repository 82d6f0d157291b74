# SPDX-License-Identifier: GPL-2.0-or-later
"""The models say what the PCI Local Bus Specification 3.0 says, rule by rule."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.oracle.model import InterruptModel, IntxModel, MsiModel, MsixModel

# MSI-X.


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


# MSI.


def msi_in_use(size: int = 4, granted: int = 4) -> MsiModel:
    """A function as its driver leaves it: enabled."""
    model = MsiModel(size, granted=granted)
    model.set_control(enable=True)
    return model


def test_after_reset_msi_is_disabled_and_no_vector_is_masked() -> None:
    """6.8.1.3: MSI Enable after reset is 0; 6.8.1.7, 6.8.1.8: so are all mask and pending bits."""
    model = MsiModel(32)
    assert (model.enabled, model.masked, model.pending) == (False, set(), set())


def test_while_msi_is_disabled_an_event_is_neither_delivered_nor_pending() -> None:
    """6.8.1.3: with MSI Enable clear, a function must not use MSI to request service."""
    model = MsiModel(4, granted=4)
    model.fire(1)
    model.set_mask(True, 2)
    model.fire(2)
    model.set_control(enable=True)
    model.set_mask(False, 2)
    assert (model.delivered, model.pending) == ([], set())


def test_a_masked_message_is_sent_once_when_unmasked() -> None:
    """6.8.3.5: the same for MSI with mask bits as for MSI-X."""
    model = msi_in_use()
    model.set_mask(True, 2, 3)
    for vector in (3, 2, 1, 3):
        model.fire(vector)
    assert (model.delivered, model.pending) == ([1], {2, 3})
    model.set_mask(False, 3)
    assert (model.delivered, model.pending) == ([1, 3], {2})


def test_what_is_pending_when_msi_is_disabled_is_sent_when_it_is_enabled_and_unmasked() -> None:
    """6.8.1.8, 6.8.3.5: only sending clears a pending bit."""
    model = msi_in_use()
    model.set_mask(True, 0)
    model.fire(0)
    model.set_control(enable=False)
    model.set_mask(False, 0)
    assert (model.delivered, model.pending) == ([], {0})
    model.set_control(enable=True)
    assert (model.delivered, model.pending) == ([0], set())


def test_vectors_that_were_not_granted_are_not_used() -> None:
    """6.8.1.3: Multiple Message Enable may say less than Multiple Message Capable."""
    model = msi_in_use(size=32, granted=2)
    model.set_mask(True, 1, 2)
    for vector in (0, 1, 2, 31):
        model.fire(vector)
    assert (model.delivered, model.pending) == ([0], {1})
    model.set_mask(False, 1, 2)
    assert (model.delivered, model.pending) == ([0, 1], set())
    assert [n for n in range(32) if model.can_deliver(n)] == [0, 1]


def test_msi_without_mask_bits_cannot_be_masked() -> None:
    """6.8.1.7: they are optional."""
    model = MsiModel(4, granted=4, maskable=False)
    with pytest.raises(ValueError, match="has no mask bits"):
        model.set_mask(True, 0)
    model.fire(0)
    model.set_control(enable=True)
    model.fire(1)
    assert (model.masked, model.pending, model.delivered) == (set(), set(), [1])


# INTx.


def test_after_reset_the_pin_may_be_used() -> None:
    """6.2.2: Interrupt Disable after reset is 0."""
    model = IntxModel()
    assert (model.size, model.masked, model.asserted) == (1, set(), False)
    model.fire(0)
    assert (model.delivered, model.asserted) == ([0], True)


def test_a_pin_that_is_asserted_already_is_delivered_once() -> None:
    """2.2.6: it is a level, which stays until the driver clears the request."""
    model = IntxModel()
    model.fire(0)
    model.fire(0)
    assert model.delivered == [0]
    model.acknowledge()
    assert not model.asserted
    model.fire(0)
    assert model.delivered == [0, 0]


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_request_while_interrupt_disable_is_set_is_delivered_once_when_it_is_cleared(
    times: int,
) -> None:
    """6.2.2: the function must not assert its pin; 6.2.3: Interrupt Status shows the request."""
    model = IntxModel()
    model.set_mask(True, 0)
    for _ in range(times):
        model.fire(0)
    assert (model.delivered, model.pending, model.asserted) == ([], {0}, True)
    model.set_mask(False, 0)
    assert (model.delivered, model.pending, model.asserted) == ([0], set(), True)
    model.set_mask(False, 0)
    assert model.delivered == [0]


def test_what_is_not_acknowledged_is_delivered_again_after_interrupt_disable() -> None:
    """6.2.3: Interrupt Disable has no effect on Interrupt Status."""
    model = IntxModel()
    model.fire(0)
    model.set_mask(True, 0)
    assert (model.delivered, model.pending) == ([0], {0})
    model.set_mask(False, 0)
    assert (model.delivered, model.pending) == ([0, 0], set())


def test_what_is_acknowledged_while_interrupt_disable_is_set_is_not_delivered() -> None:
    """6.2.3: Interrupt Status is clear then, so that there is nothing to assert."""
    model = IntxModel()
    model.set_mask(True, 0)
    model.fire(0)
    model.acknowledge()
    model.set_mask(False, 0)
    assert (model.delivered, model.pending, model.asserted) == ([], set(), False)


def test_disabling_intx_is_to_set_interrupt_disable() -> None:
    """6.2.2: there is no other bit for it."""
    model = IntxModel()
    model.set_control(enable=False)
    assert model.masked == {0}
    model.fire(0)
    model.set_control(enable=True)
    assert (model.masked, model.delivered) == (set(), [0])


# A guest whose CPUs are stopped.

KINDS: dict[str, Callable[[], InterruptModel]] = {"MSI-X": in_use, "MSI": msi_in_use}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_stopped_guest_takes_nothing_until_it_goes_on(make: Callable[[], InterruptModel]) -> None:
    model = make()
    model.stop()
    model.fire(1)
    assert (model.delivered, model.pending) == ([], set())
    model.cont()
    assert (model.delivered, model.waiting) == ([1], set())


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_vector_that_comes_to_a_stopped_guest_several_times_is_taken_once(
    make: Callable[[], InterruptModel],
) -> None:
    """Intel SDM, volume 3, 12.8.4: the local APIC has one bit for it (IRR)."""
    model = make()
    model.stop()
    for vector in (2, 1, 2, 2):
        model.fire(vector)
    model.cont()
    assert sorted(model.delivered) == [1, 2]
    model.fire(2)
    assert model.delivered[2:] == [2], "once it runs, each counts again"


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_masked_vector_becomes_pending_whether_the_guest_is_stopped_or_not(
    make: Callable[[], InterruptModel],
) -> None:
    """6.8.3.5: the mask is the function's, which is not stopped."""
    model = make()
    model.set_mask(True, 1)
    model.stop()
    model.fire(1)
    model.cont()
    assert (model.delivered, model.pending) == ([], {1})


def test_a_pin_that_is_asserted_while_the_guest_is_stopped_is_taken_once() -> None:
    """2.2.6: it is a level."""
    model = IntxModel()
    model.stop()
    model.fire(0)
    model.fire(0)
    model.cont()
    assert model.delivered == [0]


# All kinds, whatever happens to them.

Act = tuple[str, int]


class Watched:
    """A model of any kind, and what has happened to it.

    A driver acknowledges INTx as soon as it is delivered, as the probe does.
    """

    VERBS = ("fire", "mask", "unmask", "enable", "disable", "function mask")

    def __init__(self, model: InterruptModel, *, enabled: bool) -> None:
        self.model = model
        self.can_mask = not isinstance(model, MsiModel) or model.maskable
        self.fired: Counter[int] = Counter()
        self.was_disabled = not enabled
        if enabled:
            model.set_control(enable=True)

    def do(self, verb: str, vector: int) -> None:
        model, before = self.model, len(self.model.delivered)
        vector %= model.size
        if verb == "fire":
            self.fired[vector] += 1
            model.fire(vector)
        elif verb in ("mask", "unmask"):
            if self.can_mask:
                model.set_mask(verb == "mask", vector)
        elif verb in ("enable", "disable"):
            self.was_disabled |= verb == "disable"
            model.set_control(enable=verb == "enable")
        elif isinstance(model, MsixModel):
            model.set_control(enable=True, function_mask=True)
        if isinstance(model, IntxModel) and len(model.delivered) > before:
            model.acknowledge()

    def has_message(self, vector: int) -> bool:
        return not isinstance(self.model, MsiModel) or vector < self.model.granted


MODELS: list[Callable[[], InterruptModel]] = [
    lambda: MsixModel(4),
    lambda: MsiModel(4, granted=4),
    lambda: MsiModel(8, granted=4),
    lambda: MsiModel(4, granted=4, maskable=False),
    IntxModel,
]
#: What has happened to a function that is in use, or is not yet.
watched = st.builds(
    lambda make, enabled: Watched(make(), enabled=enabled), st.sampled_from(MODELS), st.booleans()
)
maskable = watched.filter(lambda seen: seen.can_mask)
#: Few vectors, so that much happens to each.
acts = st.lists(
    st.tuples(st.sampled_from(("fire", *Watched.VERBS)), st.integers(0, 2)), min_size=5, max_size=25
)
#: The same examples in each run.
whatever_happens = settings(max_examples=200, deadline=None, derandomize=True)


def relive(seen: Watched, history: list[Act]) -> InterruptModel:
    for act in history:
        seen.do(*act)
    return seen.model


@whatever_happens
@given(watched, acts, st.integers(0, 7))
def test_an_event_is_delivered_or_pending_or_dropped_and_never_two_of_them(
    seen: Watched, history: list[Act], vector: int
) -> None:
    model = relive(seen, history)
    vector %= model.size
    before = copy.deepcopy(model)
    model.fire(vector)
    delivered = model.delivered[len(before.delivered) :]
    pending = model.pending - before.pending
    assert model.delivered[: len(before.delivered)] == before.delivered
    assert model.pending >= before.pending, "nothing else was changed"
    if before.can_deliver(vector):
        assert (delivered, pending) == ([vector], set())
    elif before.enabled and seen.has_message(vector):
        assert (delivered, pending) == ([], {vector} - before.pending)
    else:
        assert (delivered, pending) == ([], set())


@whatever_happens
@given(watched, acts)
def test_no_vector_stays_pending_that_may_be_delivered(seen: Watched, history: list[Act]) -> None:
    model = relive(seen, history)
    assert [n for n in model.pending if model.can_deliver(n)] == []


@whatever_happens
@given(watched, acts)
def test_nothing_is_delivered_that_did_not_happen_and_nothing_is_lost_but_while_disabled(
    seen: Watched, history: list[Act]
) -> None:
    model = relive(seen, history)
    for n in range(model.size):
        seen_so_far = model.delivered.count(n) + (n in model.pending)
        assert seen_so_far <= seen.fired[n]
        if seen.has_message(n) and (not seen.was_disabled or isinstance(model, IntxModel)):
            assert (seen_so_far > 0) == (seen.fired[n] > 0)


@whatever_happens
@given(maskable, acts)
def test_unmasking_everything_delivers_what_is_pending_exactly_once(
    seen: Watched, history: list[Act]
) -> None:
    model = relive(seen, history)
    pending, before = set(model.pending), len(model.delivered)
    for _ in range(2):
        model.set_control(enable=True)
        model.set_mask(False, *range(model.size))
        assert Counter(model.delivered[before:]) == Counter(pending)
    assert model.pending == set()


@whatever_happens
@given(maskable, acts, st.booleans(), st.permutations(range(8)))
def test_the_order_of_masks_matters_for_nothing_but_the_order_of_deliveries(
    seen: Watched, history: list[Act], masked: bool, order: list[int]
) -> None:
    model = relive(seen, history)
    other, before = copy.deepcopy(model), len(model.delivered)
    vectors = [n for n in order if n < model.size]
    model.set_mask(masked, *sorted(vectors))
    other.set_mask(masked, *vectors)
    assert [n for n in vectors if n in other.delivered[before:]] == other.delivered[before:]
    model.delivered.sort()
    other.delivered.sort()
    assert model == other
