# SPDX-License-Identifier: GPL-2.0-or-later
"""The ivshmem endpoint: what its server says, and that a real QEMU turns it into interrupts.

The guest sees the device of QEMU itself here, without VFIO, so that what the harness does to
a device is known to be right before QEMU under test has a part in it.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures.endpoints import IvshmemDoorbell
from fixtures.guests import MsixFunction, Op, ProbeGuest
from fixtures.guests.probe import Verb
from fixtures.waiting import until

Plugged = Any  # tests/suite/conftest.py

pytestmark = pytest.mark.filterwarnings("error")  # also what a thread does not handle


def servers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ivshmem server"]


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def hear(stream: socket.socket) -> tuple[int, int | None]:
    """One message of the server: its number, and the descriptor that came with it."""
    message, descriptors, _, _ = socket.recv_fds(stream, 8, 1)
    return struct.unpack("<q", message)[0], descriptors[0] if descriptors else None


@pytest.fixture
def endpoint() -> Iterator[IvshmemDoorbell]:
    endpoint = IvshmemDoorbell(8)
    yield endpoint
    if endpoint._doorbells:
        endpoint.close()


# The server's side of the protocol (docs/specs/ivshmem-spec.rst), to a client of our own.


def test_a_client_is_told_version_id_memory_and_one_eventfd_per_vector(
    endpoint: IvshmemDoorbell,
) -> None:
    with endpoint.attach() as stream:
        assert [hear(stream), hear(stream)] == [(0, None), (1, None)]
        number, memory = hear(stream)
        assert number == -1
        assert memory is not None
        assert os.fstat(memory).st_size == endpoint.MEMORY_SIZE
        os.close(memory)
        doorbells = []
        for _ in range(8):
            number, doorbell = hear(stream)
            assert number == 1
            assert doorbell is not None
            doorbells.append(doorbell)
        stream.setblocking(False)
        with pytest.raises(BlockingIOError):
            hear(stream)  # nothing more: there are no other peers
        for vector in (5, 0, 5, 7):
            endpoint.fire(vector)
        for vector, doorbell in enumerate(doorbells):
            fired = {0: 1, 5: 2, 7: 1}.get(vector)
            if fired:
                assert os.eventfd_read(doorbell) == fired
            with pytest.raises(BlockingIOError):
                os.eventfd_read(doorbell)
            os.close(doorbell)


@pytest.mark.parametrize("heard", [0, 1, 20])
def test_a_client_that_goes_away_is_no_error_and_the_next_is_served(heard: int) -> None:
    endpoint = IvshmemDoorbell(500)
    for _ in range(2):
        stream = endpoint.attach()
        for _ in range(heard):
            _, descriptor = hear(stream)
            if descriptor is not None:
                os.close(descriptor)
        stream.close()
        until(lambda: not servers(), "the server to notice", 10, pause_s=0.01)
    with endpoint.attach() as stream:
        assert [hear(stream), hear(stream)] == [(0, None), (1, None)]
    endpoint.close()


def test_every_descriptor_is_given_back() -> None:
    before = open_descriptors()
    endpoint = IvshmemDoorbell(64)
    for _ in range(2):
        stream = endpoint.attach()
        assert hear(stream) == (0, None)
        stream.close()
    assert len(open_descriptors() - before) > 64
    until(lambda: not servers(), "the server to notice", 10, pause_s=0.01)
    endpoint.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("vectors", [0, -1, 2049])
def test_a_size_that_no_table_has_is_refused(vectors: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 2048 entries, not {vectors}"):
        IvshmemDoorbell(vectors)


# A real QEMU as the client.


@pytest.fixture(scope="module", params=[1, 8, 64], ids="{}-vectors".format)
def there(request: pytest.FixtureRequest, plugged: Callable[[int], Plugged]) -> Plugged:
    return plugged(request.param)


@pytest.fixture
def function(there: Plugged) -> MsixFunction:
    return there.function()  # type: ignore[no-any-return]


def taken(there: Plugged, function: MsixFunction) -> list[int]:
    """How often the guest has taken each vector's interrupt."""
    return [there.guest.count(function.idt_vector(n)) for n in range(function.size)]


def await_one_more(there: Plugged, function: MsixFunction, vector: int, before: int) -> None:
    until(
        lambda: there.guest.count(function.idt_vector(vector)) > before,
        f"vector {vector}",
        20,
        but=there.machine.died,
    )


def test_every_vector_fires_exactly_once_and_in_order(
    there: Plugged, function: MsixFunction
) -> None:
    everything = range(function.size)
    assert len(everything) == there.endpoint.vectors
    function.set_control(enable=True, function_mask=False)
    function.set_mask(False, *everything)
    before, log = taken(there, function), there.guest.look().log_count
    for vector in everything:
        there.endpoint.fire(vector)
        await_one_more(there, function, vector, before[vector])
    there.machine.settle()
    there.guest.batch([Op(Verb.NOP)])
    assert taken(there, function) == [count + 1 for count in before]
    order = [delivery.vector for delivery in there.guest.log(log, there.guest.look().log_count)]
    assert order == [function.idt_vector(n) for n in everything]


def test_masked_vectors_become_pending_and_fire_once_when_unmasked(
    there: Plugged, function: MsixFunction
) -> None:
    everything = range(function.size)
    function.set_control(enable=True, function_mask=False)
    before, log = taken(there, function), there.guest.look().log_count
    for vector in everything:
        there.endpoint.fire(vector)
        until(lambda v=vector: v in function.pending(), f"vector {vector} to be pending", 20)
        assert function.pending() == set(range(vector + 1))
    assert taken(there, function) == before
    function.set_mask(False, *everything)
    there.guest.batch([Op(Verb.NOP)])
    assert taken(there, function) == [count + 1 for count in before]
    assert there.guest.look().log_count == log + function.size
    assert function.pending() == set()


def test_a_disabled_function_neither_delivers_nor_remembers(
    there: Plugged, function: MsixFunction
) -> None:
    everything = range(function.size)
    function.set_mask(False, *everything)
    before = taken(there, function)
    for vector in everything:
        there.endpoint.fire(vector)
    there.machine.settle()
    function.set_control(enable=True, function_mask=False)
    there.guest.batch([Op(Verb.NOP)])
    assert (taken(there, function), function.pending()) == (before, set())


def test_signals_that_the_client_has_not_read_are_one(
    there: Plugged, function: MsixFunction
) -> None:
    last = function.size - 1
    function.set_control(enable=True, function_mask=False)
    function.set_mask(False, last)
    before = taken(there, function)[last]
    there.machine.process.signal(signal.SIGSTOP)
    try:
        for _ in range(3):
            there.endpoint.fire(last)
    finally:
        there.machine.process.signal(signal.SIGCONT)
    await_one_more(there, function, last, before)
    there.machine.settle()
    there.guest.batch([Op(Verb.NOP)])
    assert taken(there, function)[last] == before + 1


def test_the_witness_keeps_its_value_until_the_device_is_reset(
    there: Plugged, function: MsixFunction
) -> None:
    place = there.endpoint.witness_register
    function.write(*place, 0x5EEDCAFE)
    function.set_control(enable=True, function_mask=False)
    assert function.read(*place) == 0x5EEDCAFE
    guest: ProbeGuest = there.guest
    loops = guest.look().loops
    there.machine.monitor.execute("system_reset")
    # The guest clears its mailbox when it starts.
    until(lambda: guest.look().loops < loops, "the guest to start again", 20)
    guest.wait_ready()
    assert there.function().read(*place) == 0


def test_a_qemu_that_is_killed_leaves_an_endpoint_that_can_be_plugged_again(
    plugged: Callable[[int], Plugged],
) -> None:
    first = plugged(8)
    first.machine.process.kill()
    first.endpoint.fire(3)
    with first.endpoint.attach() as stream:
        assert hear(stream) == (0, None)
