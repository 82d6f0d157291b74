# SPDX-License-Identifier: GPL-2.0-or-later
"""The device is a vfio-user server that is slow, or goes away, while its guest runs."""

from __future__ import annotations

import threading

import pytest

from fixtures.direct import DirectBench, described
from fixtures.endpoints.vfio_user import VfioUserEndpoint
from fixtures.rig import WITNESS, Rig
from fixtures.waiting import until

#: How long QEMU waits for an answer.
PATIENCE_MS = 2000
#: What a read returns that no device answers.
NOTHING = 0xFFFF_FFFF


@pytest.fixture(params=(8,), ids=lambda n: f"{n}-vectors")
def rig(request: pytest.FixtureRequest, direct_bench: DirectBench) -> Rig:
    patience = {"x-msg-timeout": PATIENCE_MS}
    rig = direct_bench.rig(described(request.param), request.addfinalizer, **patience)
    rig.enable()
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    return rig


def read_in_vain(rig: Rig, endpoint: VfioUserEndpoint) -> tuple[list[int], threading.Thread]:
    """Let the guest read a register of an endpoint that does not answer: the answer, once it is
    there, and who waits for it."""
    answers: list[int] = []
    reader = threading.Thread(
        target=lambda: answers.append(rig.function.read(*endpoint.witness_register))
    )
    reader.start()
    until(lambda: endpoint.held, "the guest's read", 10, pause_s=0.005)
    return answers, reader


def test_an_answer_that_comes_late_is_the_right_one(rig: Rig, endpoint: VfioUserEndpoint) -> None:
    with endpoint.silence():
        answers, reader = read_in_vain(rig, endpoint)
        reader.join(PATIENCE_MS / 1000 / 4)
        assert reader.is_alive(), f"answered by somebody else: {answers}"
    reader.join(10.0)
    assert answers == [WITNESS]


def test_vectors_raised_while_the_guest_waits_for_an_answer_are_delivered_once(
    rig: Rig, endpoint: VfioUserEndpoint
) -> None:
    with endpoint.silence():
        answers, reader = read_in_vain(rig, endpoint)
        for vector in rig.vectors:
            rig.endpoint.fire(vector)
            rig.model.fire(vector)
    reader.join(10.0)
    assert answers == [WITNESS]
    rig.await_delivery(*rig.vectors)
    rig.check(in_order=False)


@pytest.mark.parametrize("leave", ["drop", "die"])
def test_the_guest_runs_on_when_the_server_has_gone(
    rig: Rig, endpoint: VfioUserEndpoint, leave: str
) -> None:
    """A device that went away answers nothing: reads are all ones, writes are lost."""
    getattr(endpoint, leave)()
    until(lambda: not endpoint.clients, "the connection to end", 10, pause_s=0.01)
    assert rig.function.read(*endpoint.witness_register) == NOTHING
    rig.function.write(*endpoint.witness_register, WITNESS)
    rig.mask(*rig.vectors)
    rig.disable()
    loops = rig.guest.look().loops
    until(lambda: rig.guest.look().loops > loops, "the guest to run on", 10, pause_s=0.01)
    assert rig.machine.status() == "running"


def test_a_request_that_nobody_answers_any_more_ends(rig: Rig, endpoint: VfioUserEndpoint) -> None:
    with endpoint.silence():
        answers, reader = read_in_vain(rig, endpoint)
        endpoint.die()
        reader.join(3 * PATIENCE_MS / 1000)
    assert answers == [NOTHING]
    assert rig.machine.status() == "running"
