# SPDX-License-Identifier: GPL-2.0-or-later
"""The vfio-user endpoint, served to a client of our own."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fixtures.endpoints.vfio_user import (
    Description,
    DmaError,
    Irq,
    Msi,
    Msix,
    NotArmedError,
    ResetBy,
    VfioUserEndpoint,
)
from fixtures.endpoints.vfio_user.protocol import (
    MAX_MESSAGE,
    Command,
    DmaMap,
    DmaUnmap,
    Flag,
    GetInfo,
    GetIrqInfo,
    GetRegionInfo,
    GetRegionIoFds,
    Header,
    IrqInfo,
    IrqSet,
    Region,
    RegionInfo,
    RegionRead,
    RegionWrite,
    RegionWriteMulti,
    Request,
    Reset,
    SetIrqs,
    Version,
)
from fixtures.endpoints.vfio_user.witness import (
    ConfigWritten,
    Connected,
    Disconnected,
    DmaMapped,
    DmaUnmapped,
    Event,
    IrqsSet,
    Refused,
    RegionAccessed,
    WasReset,
)
from fixtures.waiting import until

pytestmark = pytest.mark.filterwarnings("error")  # also what a thread does not handle

COMMANDS: dict[type[Request] | type[Version], Command] = {
    Version: Command.VERSION,
    DmaMap: Command.DMA_MAP,
    DmaUnmap: Command.DMA_UNMAP,
    GetInfo: Command.DEVICE_GET_INFO,
    GetRegionInfo: Command.DEVICE_GET_REGION_INFO,
    GetRegionIoFds: Command.DEVICE_GET_REGION_IO_FDS,
    GetIrqInfo: Command.DEVICE_GET_IRQ_INFO,
    SetIrqs: Command.DEVICE_SET_IRQS,
    RegionRead: Command.REGION_READ,
    RegionWrite: Command.REGION_WRITE,
    RegionWriteMulti: Command.REGION_WRITE_MULTI,
    Reset: Command.DEVICE_RESET,
}
TRIGGER = IrqSet.EVENTFD | IrqSet.TRIGGER
UNMASK = SetIrqs(IrqSet.NONE | IrqSet.UNMASK, Irq.INTX, 0, 1)
PAGE = mmap.PAGESIZE


class Client:
    """A client's end of a connection."""

    def __init__(self, stream: socket.socket, **capabilities: object) -> None:
        self.stream = stream
        stream.settimeout(5)
        self.numbers = iter(range(1000, 1 << 16))
        self.capabilities = {"max_msg_fds": 8, "write_multiple": True, **capabilities}

    def negotiate(self) -> Version:
        return Version.unpack(self.ask(Version(0, 0, self.capabilities)))

    def say(self, request: Request | Version, fds: Sequence[int] = (), flags: int = 0) -> int:
        """Send a request; returns its number."""
        number, payload = next(self.numbers), request.pack()
        header = Header(number, COMMANDS[type(request)], Header.SIZE + len(payload), flags)
        socket.send_fds(self.stream, [header.pack(), payload], list(fds))
        return number

    def hear(self) -> tuple[Header, bytes]:
        header = Header.unpack(self._exactly(Header.SIZE))
        return header, self._exactly(header.size - Header.SIZE)

    def ask(self, request: Request | Version, *fds: int, expect: int = 0) -> bytes:
        """Send a request; returns the payload of its reply, which has this errno."""
        number = self.say(request, fds)
        header, payload = self.hear()
        assert (header.id, header.command) == (number, COMMANDS[type(request)])
        assert header.flags == Flag.REPLY | (Flag.ERROR if expect else 0)
        assert header.error == expect
        return payload

    def config(self, offset: int, size: int) -> bytes:
        return self.ask(RegionRead(Region.CONFIG, offset, size))[16:]

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.ask(RegionWrite(region, offset, data))

    def ended(self) -> bool:
        """Whether the server has closed the connection."""
        try:
            return self.stream.recv(1) == b""
        except ConnectionResetError:
            return True

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.stream.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data


Connect = Callable[..., Client]


def serving() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("vfio-user")]


def open_descriptors() -> dict[str, str]:
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = str(path.readlink())
    return found


@pytest.fixture
def make() -> Iterator[Callable[..., VfioUserEndpoint]]:
    """Makes endpoints, by the arguments of a description and of the endpoint."""
    endpoints = []

    def make(description: Description | None = None, **options: Any) -> VfioUserEndpoint:
        endpoints.append(VfioUserEndpoint(description, **options))
        return endpoints[-1]

    yield make
    for endpoint in endpoints:
        endpoint.close()
    assert serving() == []


@pytest.fixture
def endpoint(make: Callable[..., VfioUserEndpoint]) -> VfioUserEndpoint:
    return make(Description(msix=Msix(8), msi=Msi(4), intx=1), write_multiple=True)


@pytest.fixture
def connect(endpoint: VfioUserEndpoint) -> Iterator[Connect]:
    """Makes clients that have negotiated."""
    with contextlib.ExitStack() as streams:

        def connect(to: VfioUserEndpoint = endpoint, **capabilities: object) -> Client:
            client = Client(streams.enter_context(to.attach()), **capabilities)
            client.negotiate()
            return client

        yield connect


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    """Eight eventfds."""
    made = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
    yield made
    for descriptor in made:
        os.close(descriptor)


def signals(eventfd: int) -> int:
    """How often an eventfd has been written since the last look."""
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


@pytest.fixture
def memory() -> Iterator[int]:
    """Sixteen pages of a client's memory."""
    descriptor = os.memfd_create("memory")
    os.truncate(descriptor, 16 * PAGE)
    yield descriptor
    os.close(descriptor)


# A connection begins with VERSION.


def test_the_version_is_negotiated(endpoint: VfioUserEndpoint) -> None:
    with endpoint.attach() as stream:
        client = Client(stream, max_data_xfer_size=4096, pgsizes=4096)
        assert client.negotiate() == Version(
            0, 0, {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20, "write_multiple": True}
        )
        client.ask(Version(), expect=errno.EINVAL)
        client.ask(GetInfo())


def test_what_comes_before_the_version_is_refused_and_ends_the_connection(
    endpoint: VfioUserEndpoint,
) -> None:
    with endpoint.attach() as stream:
        client = Client(stream)
        client.ask(GetInfo(), expect=errno.EINVAL)
        assert client.ended()
    with endpoint.attach() as stream:
        client = Client(stream)
        client.ask(Version(1, 0), expect=errno.EINVAL)
        assert client.ended()


def test_a_version_with_descriptors_is_refused(
    endpoint: VfioUserEndpoint, eventfds: list[int]
) -> None:
    with endpoint.attach() as stream:
        client = Client(stream)
        client.ask(Version(), eventfds[0], expect=errno.EINVAL)
        assert client.ended()


def test_the_device_is_what_was_described(connect: Connect) -> None:
    client = connect()
    assert client.ask(GetInfo()) == struct.pack("=4I", 16, 3, 9, 5)
    sizes = [RegionInfo.unpack(client.ask(GetRegionInfo(n))).size for n in range(9)]
    assert sizes == [0x1000, 0x10000, 0, 0, 0, 0, 0, 4096, 0]
    counts = [IrqInfo.unpack(client.ask(GetIrqInfo(n))).count for n in range(5)]
    assert counts == [1, 4, 8, 1, 1]
    assert client.ask(GetRegionIoFds(0)) == struct.pack("=4I", 16, 0, 0, 0)


# What is malformed is answered, and the next message is understood.


def test_an_error_is_answered_and_the_connection_goes_on(
    endpoint: VfioUserEndpoint, connect: Connect
) -> None:
    client = connect()
    client.ask(GetRegionInfo(9), expect=errno.EINVAL)
    client.ask(RegionRead(0, 0x1000, 1), expect=errno.EINVAL)
    client.ask(GetInfo())
    assert endpoint.witness.since(0, Refused) == [
        Refused(Command.DEVICE_GET_REGION_INFO, errno.EINVAL, "", client=0),
        Refused(Command.REGION_READ, errno.EINVAL, "", client=0),
    ]


@pytest.mark.parametrize("size", [0, 15, MAX_MESSAGE + 1, 0xFFFFFFFF])
def test_a_size_that_no_message_has_is_answered_and_ends_the_connection(
    connect: Connect, size: int
) -> None:
    client = connect()
    client.stream.sendall(Header(3, Command.DEVICE_GET_INFO, size).pack())
    assert client.hear() == (Header(3, 4, 16, Flag.REPLY | Flag.ERROR, errno.EINVAL), b"")
    assert client.ended()


def test_who_wants_no_reply_gets_none(endpoint: VfioUserEndpoint, connect: Connect) -> None:
    client = connect()
    client.say(RegionWrite(0, 0, b"abcd"), flags=Flag.NO_REPLY)
    client.say(RegionWrite(0, 0x1000, b"abcd"), flags=Flag.NO_REPLY)
    assert client.ask(RegionRead(0, 0, 4))[16:] == b"abcd"
    assert len(endpoint.witness.since(0, Refused)) == 1


def test_a_reply_to_nothing_is_passed_over(connect: Connect) -> None:
    client = connect()
    client.stream.sendall(Header(1, Command.DMA_READ, 16, Flag.REPLY).pack())
    client.ask(GetInfo())


def test_a_message_may_come_byte_by_byte(connect: Connect, eventfds: list[int]) -> None:
    client = connect()
    payload = SetIrqs(TRIGGER, Irq.MSIX, 0, 1).pack()
    whole = Header(1, Command.DEVICE_SET_IRQS, 16 + len(payload)).pack() + payload
    for at in range(len(whole)):
        socket.send_fds(client.stream, [whole[at : at + 1]], [] if at else eventfds[:1])
    assert client.hear()[0].error == 0


def test_messages_may_come_all_at_once(connect: Connect) -> None:
    client = connect()
    one = Header(1, Command.DEVICE_GET_INFO, 32).pack() + GetInfo().pack()
    client.stream.sendall(50 * one)
    assert {client.hear()[1] for _ in range(50)} == {struct.pack("=4I", 16, 3, 9, 5)}


def test_a_client_that_goes_in_the_middle_of_a_message_is_no_error(
    endpoint: VfioUserEndpoint, connect: Connect
) -> None:
    for size in (1, 16, 20):
        client = connect()
        whole = Header(1, Command.DEVICE_GET_INFO, 32).pack() + GetInfo().pack()
        client.stream.sendall(whole[:size])
        client.stream.close()
        until(lambda: not endpoint.clients, "the client to be forgotten", 5, pause_s=0.002)
    connect().ask(GetInfo())


def test_descriptors_that_nothing_wants_are_closed(
    connect: Connect, eventfds: list[int], memory: int
) -> None:
    client = connect()
    client.ask(GetInfo())
    before = open_descriptors()
    client.ask(GetInfo(), *eventfds)
    client.ask(SetIrqs(TRIGGER, Irq.MSIX, 0, 3), *eventfds[:2], expect=errno.EINVAL)
    client.ask(SetIrqs(TRIGGER, Irq.MSIX, 0, 1), memory, expect=errno.EINVAL)
    client.ask(DmaMap(0x10, 0, 0, PAGE), memory, expect=errno.EINVAL)
    assert open_descriptors() == before


# Registers and resets.


def test_configuration_space_is_read_and_written_and_every_write_is_told(
    endpoint: VfioUserEndpoint, connect: Connect
) -> None:
    client = connect()
    mark = endpoint.witness.mark()
    assert client.config(0, 4) == b"\x34\x12\xed\x5e"
    client.write(Region.CONFIG, 4, b"\xff\xff\xff\xff")
    assert client.config(4, 4) == b"\x46\x05\x10\x00"
    assert endpoint.witness.since(mark, Event) == [ConfigWritten(4, 4, 0xFFFFFFFF, client=0)]


def test_accesses_of_bars_are_told_if_wanted(make: Callable[..., VfioUserEndpoint]) -> None:
    endpoint = make(record_accesses=True)
    with endpoint.attach() as stream:
        client = Client(stream)
        client.negotiate()
        client.write(0, 8, b"ab")
        client.ask(RegionRead(0, 9, 1))
    assert endpoint.witness.since(0, RegionAccessed) == [
        RegionAccessed(0, 8, b"ab", True, client=0),
        RegionAccessed(0, 9, b"b", False, client=0),
    ]


def test_many_writes_are_done_in_order_if_that_was_agreed(connect: Connect) -> None:
    client = connect()
    client.ask(RegionWriteMulti((RegionWrite(0, 0, b"abcd"), RegionWrite(0, 2, b"x"))))
    assert client.ask(RegionRead(0, 0, 4))[16:] == b"abxd"
    for refusing in (connect(write_multiple=False), connect(write_multiple=0)):
        refusing.ask(RegionWriteMulti((RegionWrite(0, 0, b"a"),)), expect=errno.EINVAL)


def test_every_reset_is_told_and_clears_the_witness_register(
    make: Callable[..., VfioUserEndpoint],
) -> None:
    endpoint = make(Description(reset=ResetBy.FLR))
    pm = make(Description(reset=ResetBy.PM, express=False))
    for which, resets in (
        (endpoint, {"message": [], "flr": [(0x10, 8, b"\0\x80")]}),
        (pm, {"message": [], "pm": [(0x01, 4, b"\3"), (0x01, 4, b"\0")]}),
    ):
        with which.attach() as stream:
            client = Client(stream)
            client.negotiate()
            for name, writes in resets.items():
                mark = which.witness.mark()
                client.write(0, 0, b"seed")
                for capability, offset, data in writes:
                    at = which.device.capabilities[capability] + offset
                    client.write(Region.CONFIG, at, data)
                if not writes:
                    client.ask(Reset())
                assert which.witness.since(mark, WasReset) == [WasReset(name, client=0)]
                assert client.ask(RegionRead(0, 0, 4))[16:] == bytes(4)


def test_a_device_that_cannot_be_reset_is_not(make: Callable[..., VfioUserEndpoint]) -> None:
    endpoint = make(Description(reset=ResetBy.NONE))
    with endpoint.attach() as stream:
        client = Client(stream)
        client.negotiate()
        assert client.ask(GetInfo())[4:8] == struct.pack("=I", 2)
        client.write(0, 0, b"seed")
        client.ask(Reset(), expect=errno.EINVAL)
        assert client.ask(RegionRead(0, 0, 4))[16:] == b"seed"


def test_pending_bits_are_read_as_the_harness_sets_them(
    endpoint: VfioUserEndpoint, connect: Connect
) -> None:
    client = connect()
    assert client.ask(RegionRead(1, 0x8000, 8))[16:] == bytes(8)
    endpoint.set_pending(5)
    assert client.ask(RegionRead(1, 0x8000, 8))[16:] == b"\x20" + bytes(7)
    endpoint.set_pending(5, False)
    assert client.ask(RegionRead(1, 0x8000, 8))[16:] == bytes(8)


# Interrupts.


@pytest.mark.parametrize(("index", "count"), [(Irq.INTX, 1), (Irq.MSI, 4), (Irq.MSIX, 8)])
def test_each_vector_signals_its_own_eventfd_once(
    endpoint: VfioUserEndpoint, connect: Connect, eventfds: list[int], index: Irq, count: int
) -> None:
    client = connect()
    client.ask(SetIrqs(TRIGGER, index, 0, count), *eventfds[:count])
    assert endpoint.armed() == (index, frozenset(range(count)))
    for vector in range(count):
        os.eventfd_write(eventfds[vector], 4)
        endpoint.fire(vector)
        assert [signals(eventfd) for eventfd in eventfds] == [
            5 if n == vector else 0 for n in range(8)
        ]
    assert endpoint.witness.since(0, IrqsSet) == [IrqsSet(index, 0, count, 0x24, count, client=0)]


def test_eventfds_are_given_in_chunks_replaced_and_taken_back(
    endpoint: VfioUserEndpoint, connect: Connect, eventfds: list[int]
) -> None:
    client = connect()
    client.ask(SetIrqs(TRIGGER, Irq.MSIX, 0, 2), *eventfds[:2])
    client.ask(SetIrqs(TRIGGER, Irq.MSIX, 2, 2), *eventfds[2:4])
    held = len(open_descriptors())
    client.ask(SetIrqs(TRIGGER, Irq.MSIX, 1, 2), *eventfds[4:6])
    assert len(open_descriptors()) == held
    for vector in range(4):
        endpoint.fire(vector)
    assert [signals(eventfd) for eventfd in eventfds] == [1, 0, 0, 1, 1, 1, 0, 0]
    client.ask(SetIrqs(TRIGGER, Irq.MSIX, 1, 2))  # no descriptors: these are given up
    assert endpoint.armed() == (Irq.MSIX, frozenset({0, 3}))
    assert len(open_descriptors()) == held - 2
    with pytest.raises(NotArmedError, match="client 0 has given no eventfd for MSIX 1"):
        endpoint.fire(1)
    client.ask(SetIrqs(IrqSet.NONE | IrqSet.TRIGGER, Irq.MSIX, 0, 0))
    assert endpoint.armed() is None
    assert len(open_descriptors()) == held - 4
    with pytest.raises(NotArmedError, match="vector 0: no client has given any eventfd"):
        endpoint.fire(0)
    assert [event.fds for event in endpoint.witness.since(0, IrqsSet)] == [2, 2, 2, 0, 0]


def test_the_client_can_trigger_interrupts_itself(connect: Connect, eventfds: list[int]) -> None:
    client = connect()
    client.ask(SetIrqs(TRIGGER, Irq.MSIX, 0, 8), *eventfds)
    client.ask(SetIrqs(TRIGGER, Irq.MSIX, 6, 1))
    client.ask(SetIrqs(IrqSet.NONE | IrqSet.TRIGGER, Irq.MSIX, 5, 3))
    assert [signals(eventfd) for eventfd in eventfds] == [0, 0, 0, 0, 0, 1, 0, 1]
    bools = (True, False, True)
    client.ask(SetIrqs(IrqSet.BOOL | IrqSet.TRIGGER, Irq.MSIX, 0, 3, bools))
    assert [signals(eventfd) for eventfd in eventfds] == [1, 0, 1, 0, 0, 0, 0, 0]


def test_an_eventfd_that_is_full_holds_nothing_up(
    endpoint: VfioUserEndpoint, connect: Connect
) -> None:
    client, full = connect(), os.eventfd(0)
    os.eventfd_write(full, (1 << 64) - 2)
    client.ask(SetIrqs(TRIGGER, Irq.MSIX, 0, 1), full)
    endpoint.fire(0)
    client.ask(SetIrqs(IrqSet.NONE | IrqSet.TRIGGER, Irq.MSIX, 0, 1))
    assert os.eventfd_read(full) == (1 << 64) - 2
    os.close(full)


def test_masks_of_message_interrupts_are_the_clients_business(
    endpoint: VfioUserEndpoint, connect: Connect, eventfds: list[int]
) -> None:
    client = connect()
    client.ask(SetIrqs(TRIGGER, Irq.MSIX, 0, 1), eventfds[0])
    client.ask(SetIrqs(IrqSet.NONE | IrqSet.MASK, Irq.MSIX, 0, 1))
    endpoint.fire(0)
    assert signals(eventfds[0]) == 1
    client.ask(SetIrqs(IrqSet.NONE | IrqSet.UNMASK, Irq.MSIX, 0, 1))
    assert signals(eventfds[0]) == 0


def test_intx_masks_itself_until_it_is_unmasked(
    endpoint: VfioUserEndpoint, connect: Connect, eventfds: list[int]
) -> None:
    client = connect()
    client.ask(SetIrqs(TRIGGER, Irq.INTX, 0, 1), eventfds[0])
    endpoint.fire()
    endpoint.fire()
    assert signals(eventfds[0]) == 1
    client.ask(SetIrqs(IrqSet.BOOL | IrqSet.UNMASK, Irq.INTX, 0, 1, (False,)))
    assert signals(eventfds[0]) == 0
    client.ask(UNMASK)
    assert signals(eventfds[0]) == 1
    client.ask(UNMASK)
    assert signals(eventfds[0]) == 0
    client.ask(SetIrqs(IrqSet.NONE | IrqSet.MASK, Irq.INTX, 0, 1))
    endpoint.fire()
    assert signals(eventfds[0]) == 0
    client.ask(UNMASK)
    assert signals(eventfds[0]) == 1


def test_intx_is_unmasked_by_an_eventfd_too(
    endpoint: VfioUserEndpoint, connect: Connect, eventfds: list[int], memory: int
) -> None:
    client = connect()
    held = len(open_descriptors())
    unmasking = SetIrqs(IrqSet.EVENTFD | IrqSet.UNMASK, Irq.INTX, 0, 1)
    masking = SetIrqs(IrqSet.EVENTFD | IrqSet.MASK, Irq.INTX, 0, 1)
    client.ask(SetIrqs(TRIGGER, Irq.INTX, 0, 1), eventfds[0])
    client.ask(unmasking, memory, expect=errno.EINVAL)
    client.ask(masking, eventfds[1], expect=errno.ENOTTY)
    client.ask(unmasking, eventfds[1])
    client.ask(unmasking, eventfds[2])
    for _ in range(3):
        endpoint.fire()
        endpoint.fire()
        assert signals(eventfds[0]) == 1
        os.eventfd_write(eventfds[2], 1)
        until(lambda: signals(eventfds[0]) == 1, "the second signal", 5, pause_s=0.001)
        os.eventfd_write(eventfds[2], 1)
        client.ask(GetInfo())  # it is seen to before a message that comes after it
    client.ask(unmasking)  # no descriptor: it is given up
    client.ask(unmasking, eventfds[3])
    client.ask(SetIrqs(IrqSet.NONE | IrqSet.TRIGGER, Irq.INTX, 0, 0))
    assert len(open_descriptors()) == held


LEVEL = Description(msix=None, intx=1, acknowledge=(0, 0x10))


def test_a_level_is_signalled_after_each_unmasking_until_it_is_acknowledged(
    make: Callable[..., VfioUserEndpoint], connect: Connect, eventfds: list[int]
) -> None:
    endpoint = make(LEVEL)
    client = connect(endpoint)
    client.ask(SetIrqs(TRIGGER, Irq.INTX, 0, 1), eventfds[0])
    endpoint.fire()
    for _ in range(2):
        assert signals(eventfds[0]) == 1
        assert client.config(6, 1)[0] & 0x08
        client.ask(UNMASK)
    assert signals(eventfds[0]) == 1
    client.write(0, 0x10, b"\1\0\0\0")
    assert not client.config(6, 1)[0] & 0x08
    client.ask(UNMASK)
    assert signals(eventfds[0]) == 0
    endpoint.fire()
    assert signals(eventfds[0]) == 1


def test_a_level_that_is_gone_when_it_is_unmasked_is_not_signalled(
    make: Callable[..., VfioUserEndpoint], connect: Connect, eventfds: list[int]
) -> None:
    endpoint = make(LEVEL)
    client = connect(endpoint)
    client.ask(SetIrqs(TRIGGER, Irq.INTX, 0, 1), eventfds[0])
    endpoint.fire()
    endpoint.fire()
    assert signals(eventfds[0]) == 1
    client.write(0, 0x10, b"\1\0\0\0")
    client.ask(UNMASK)
    assert signals(eventfds[0]) == 0


def test_a_level_is_signalled_when_interrupt_disable_is_cleared(
    make: Callable[..., VfioUserEndpoint], connect: Connect, eventfds: list[int]
) -> None:
    endpoint = make(LEVEL)
    client = connect(endpoint)
    client.ask(SetIrqs(TRIGGER, Irq.INTX, 0, 1), eventfds[0])
    client.write(Region.CONFIG, 4, b"\0\4")
    endpoint.fire()
    assert signals(eventfds[0]) == 0
    assert client.config(6, 1)[0] & 0x08
    client.write(Region.CONFIG, 4, b"\0\0")
    assert signals(eventfds[0]) == 1
    client.write(Region.CONFIG, 4, b"\0\0")
    assert signals(eventfds[0]) == 0


def test_an_error_and_the_wish_for_the_device_are_told_by_eventfds_of_their_own(
    endpoint: VfioUserEndpoint, connect: Connect, eventfds: list[int]
) -> None:
    client = connect()
    with pytest.raises(NotArmedError, match="no client has given an eventfd for REQ"):
        endpoint.signal(Irq.REQ)
    client.ask(SetIrqs(TRIGGER, Irq.ERR, 0, 1), eventfds[0])
    client.ask(SetIrqs(TRIGGER, Irq.REQ, 0, 1), eventfds[1])
    assert endpoint.armed() is None
    endpoint.signal(Irq.REQ)
    assert [signals(eventfd) for eventfd in eventfds[:2]] == [0, 1]


# Two clients, as during a CPR.


def test_the_newest_client_that_gave_eventfds_is_interrupted(
    endpoint: VfioUserEndpoint, connect: Connect, eventfds: list[int]
) -> None:
    old = connect()
    old.ask(SetIrqs(TRIGGER, Irq.MSIX, 0, 2), *eventfds[:2])
    new = connect()
    assert endpoint.clients == [0, 1]
    endpoint.fire(0)
    assert signals(eventfds[0]) == 1, "new QEMU has given nothing yet"
    new.ask(SetIrqs(TRIGGER, Irq.MSIX, 0, 1), eventfds[2])
    endpoint.fire(0)
    assert [signals(eventfd) for eventfd in eventfds[:3]] == [0, 0, 1]
    with pytest.raises(NotArmedError, match="client 1 has given no eventfd for MSIX 1"):
        endpoint.fire(1)  # what new QEMU has not taken over does not go to old QEMU
    new.stream.close()
    until(lambda: endpoint.clients == [0], "new QEMU to go", 5, pause_s=0.002)
    endpoint.fire(1)
    assert [signals(eventfd) for eventfd in eventfds[:3]] == [0, 1, 0]


def test_the_devices_state_is_one_and_stays(endpoint: VfioUserEndpoint, connect: Connect) -> None:
    old, new = connect(), connect()
    old.write(0, 0, b"seed")
    old.write(Region.CONFIG, 4, b"\6\0")
    old.stream.close()
    until(lambda: endpoint.clients == [1], "old QEMU to go", 5, pause_s=0.002)
    assert new.ask(RegionRead(0, 0, 4))[16:] == b"seed"
    assert new.config(4, 2) == b"\6\0"
    assert [type(event) for event in endpoint.witness.since(0, Event)] == [
        Connected,
        Connected,
        ConfigWritten,
        Disconnected,
    ]


# DMA through the descriptors that came with the mappings.


def test_memory_is_read_and_written_where_it_is_mapped(
    endpoint: VfioUserEndpoint, connect: Connect, memory: int
) -> None:
    client = connect()
    client.ask(DmaMap(3, 2 * PAGE, 0x10000, PAGE), memory)
    client.ask(DmaMap(3, 8 * PAGE, 0x10000 + PAGE, PAGE), memory)
    data = bytes(range(256)) * 2
    endpoint.dma_write(0x10000 + PAGE - 256, data)  # across both
    assert os.pread(memory, 256, 3 * PAGE - 256) == data[:256]
    assert os.pread(memory, 256, 8 * PAGE) == data[256:]
    os.pwrite(memory, b"guest", 2 * PAGE + 17)
    assert endpoint.dma_read(0x10011, 5) == b"guest"
    assert endpoint.dma_read(0x10000 + PAGE - 256, 512) == data
    client.ask(DmaUnmap(0x10000, PAGE))
    with pytest.raises(DmaError, match=r"no client has mapped 0x1 bytes at 0x10000"):
        endpoint.dma_read(0x10000, 1)
    assert endpoint.dma_read(0x10000 + PAGE, 256) == data[256:]
    assert endpoint.witness.since(0, DmaUnmapped) == [DmaUnmapped(0x10000, PAGE, client=0)]
    assert endpoint.witness.since(0, DmaMapped)[0] == DmaMapped(
        0x10000, PAGE, 3, 2 * PAGE, client=0
    )


def test_a_mapping_may_begin_anywhere_in_a_file(
    endpoint: VfioUserEndpoint, connect: Connect, memory: int
) -> None:
    connect().ask(DmaMap(3, 0x123, 0x10000, 0x100), memory)
    endpoint.dma_write(0x100FC, b"last")
    assert os.pread(memory, 4, 0x21F) == b"last"
    with pytest.raises(DmaError, match="no client has mapped 0x5"):
        endpoint.dma_write(0x100FC, b"above")


def test_memory_that_is_not_mapped_for_it_is_not_accessed(
    endpoint: VfioUserEndpoint, connect: Connect, memory: int
) -> None:
    client = connect()
    client.ask(DmaMap(1, 0, 0x10000, PAGE), memory)
    client.ask(DmaMap(2, PAGE, 0x20000, PAGE), memory)
    assert endpoint.dma_read(0x10000, 4) == bytes(4)
    with pytest.raises(DmaError, match="0x10000 is not mapped for writing"):
        endpoint.dma_write(0x10000, b"a")
    with pytest.raises(DmaError, match="0x20000 is not mapped for reading"):
        endpoint.dma_read(0x20000, 1)


def test_mappings_that_cannot_be_are_refused(connect: Connect, memory: int) -> None:
    client = connect()
    client.ask(DmaMap(3, 0, 0x10000, 2 * PAGE), memory)
    for address, size in ((0x10000, 2 * PAGE), (0x10000 + PAGE, PAGE), (0xF000, 2 * PAGE)):
        client.ask(DmaMap(3, 0, address, size), memory, expect=errno.EEXIST)
    client.ask(DmaMap(3, 0, 0x40000, 17 * PAGE), memory, expect=errno.EINVAL)
    client.ask(DmaMap(3, (1 << 63) - PAGE, 0x40000, PAGE), memory, expect=errno.EINVAL)
    reading = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    client.ask(DmaMap(3, 0, 0x40000, PAGE), reading, expect=errno.EACCES)
    client.ask(DmaMap(1, 0, 0x40000, PAGE), reading)
    os.close(reading)
    for address, size in ((0x10000, PAGE), (0x11000, PAGE), (0x90000, PAGE), (0, 0)):
        client.ask(DmaUnmap(address, size), expect=errno.ENOENT)
    client.ask(DmaUnmap(0, 0, everything=True))
    client.ask(DmaMap(3, 0, 0x10000, 2 * PAGE), memory)


def test_a_file_that_is_shortened_is_an_error_and_not_our_end(
    endpoint: VfioUserEndpoint, connect: Connect, memory: int
) -> None:
    connect().ask(DmaMap(3, 0, 0, 16 * PAGE), memory)
    os.truncate(memory, PAGE)
    with pytest.raises(DmaError, match="the file has been shortened to 0x1000 of 0x4004 bytes"):
        endpoint.dma_read(4 * PAGE, 4)


def test_many_regions_of_one_file_cost_one_descriptor(
    endpoint: VfioUserEndpoint, connect: Connect, memory: int
) -> None:
    client = connect()
    client.ask(DmaMap(3, 0, 0x8000, 0x100), memory)
    before = open_descriptors()
    for n in range(1, 256):  # each elsewhere in the file than in the order of addresses
        client.ask(DmaMap(3, 0x100 * (n ^ 0x55), 0x8000 + 0x100 * n, 0x100), memory)
    assert open_descriptors().keys() == before.keys()
    data = os.urandom(0x10000)
    endpoint.dma_write(0x8000 + 0x100, data[0x100:])
    content = os.pread(memory, 0x10000, 0)
    for n in range(1, 256):
        at = 0x100 * (n ^ 0x55)
        assert content[at : at + 0x100] == data[0x100 * n : 0x100 * n + 0x100]
    assert endpoint.dma_read(0x8000 + 0x100, 0xFF00) == data[0x100:]
    for n in range(256):
        client.ask(DmaUnmap(0x8000 + 0x100 * n, 0x100))
    assert len(open_descriptors()) == len(before) - 1


def test_a_file_may_grow(endpoint: VfioUserEndpoint, connect: Connect, memory: int) -> None:
    client = connect()
    client.ask(DmaMap(3, 0, 0, PAGE), memory)
    endpoint.dma_write(0, b"a")
    os.truncate(memory, 32 * PAGE)
    client.ask(DmaMap(3, 31 * PAGE, PAGE, PAGE), memory)
    endpoint.dma_write(PAGE, b"b")
    assert os.pread(memory, 1, 31 * PAGE) == b"b"


def test_what_is_no_file_is_accessed_by_messages(
    endpoint: VfioUserEndpoint, connect: Connect, eventfds: list[int]
) -> None:
    client = connect()
    client.ask(DmaMap(3, 0, 0, PAGE), eventfds[0])
    remote = Memory(client)
    remote.start()
    endpoint.dma_write(0, b"abc")
    assert bytes(remote.bytes[:3]) == b"abc"


def test_the_newest_client_that_has_it_mapped_is_accessed(
    endpoint: VfioUserEndpoint, connect: Connect, memory: int
) -> None:
    old, new = connect(), connect()
    old.ask(DmaMap(3, 0, 0, 2 * PAGE), memory)
    endpoint.dma_write(0, b"old")
    new.ask(DmaMap(3, 4 * PAGE, 0, PAGE), memory)
    endpoint.dma_write(0, b"new")
    endpoint.dma_write(PAGE, b"old")
    assert endpoint.dma_regions() == {
        0: [DmaMap(3, 0, 0, 2 * PAGE)],
        1: [DmaMap(3, 4 * PAGE, 0, PAGE)],
    }
    assert [os.pread(memory, 3, n * PAGE) for n in (0, 1, 4)] == [b"old", b"old", b"new"]
    new.stream.close()
    until(lambda: endpoint.clients == [0], "new QEMU to go", 5, pause_s=0.002)
    assert endpoint.dma_read(0, 3) == b"old"


# DMA by messages.


class Memory(threading.Thread):
    """A client that serves DMA messages from its own memory, until the connection ends."""

    def __init__(self, client: Client) -> None:
        super().__init__(daemon=True, name="client's memory")
        self.client = client
        self.bytes = bytearray(0x10000)
        self.sizes: list[int] = []
        self.error = 0
        self.mute = False
        self.short = False

    def run(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                try:
                    header, payload = self.client.hear()
                except TimeoutError:
                    continue
                address, count = struct.unpack_from("=QQ", payload)
                self.sizes.append(count)
                if self.mute:
                    continue
                if self.error:
                    self.client.stream.sendall(header.refuse(self.error))
                elif header.command == Command.DMA_READ:
                    data = self.bytes[address : address + count - self.short]
                    self.client.stream.sendall(header.reply(payload[:16] + data))
                else:
                    assert len(payload) == 16 + count
                    self.bytes[address : address + count] = payload[16:]
                    self.client.stream.sendall(header.reply(payload[:16]))


@pytest.fixture
def remote(connect: Connect) -> Memory:
    """A client whose memory has no descriptor."""
    client = connect(max_data_xfer_size=0x1000)
    client.ask(DmaMap(3, 0, 0, 0x10000))
    memory = Memory(client)
    memory.start()
    return memory


def test_memory_without_a_descriptor_is_accessed_by_messages(
    endpoint: VfioUserEndpoint, remote: Memory
) -> None:
    data = os.urandom(0x2800)
    endpoint.dma_write(0x100, data)
    assert remote.bytes[0x100 : 0x100 + 0x2800] == data
    assert endpoint.dma_read(0x100, 0x2800) == data
    assert remote.sizes == 2 * [0x1000, 0x1000, 0x800], "no more at once than the client takes"
    assert endpoint.witness.since(0, DmaMapped) == [DmaMapped(0, 0x10000, 3, None, client=0)]


def test_a_descriptor_can_be_passed_over(
    make: Callable[..., VfioUserEndpoint], connect: Connect, memory: int
) -> None:
    endpoint = make(dma_by_message=True)
    client = connect(endpoint)
    client.ask(DmaMap(3, 0, 0, PAGE), memory)
    remote = Memory(client)
    remote.start()
    endpoint.dma_write(0, b"abc")
    assert bytes(remote.bytes[:3]) == b"abc"
    assert os.pread(memory, 3, 0) == bytes(3)


def test_dma_that_a_client_refuses_or_does_not_answer_is_an_error(
    endpoint: VfioUserEndpoint, remote: Memory
) -> None:
    remote.error = errno.EFAULT
    with pytest.raises(DmaError, match="client 0 refused DMA_READ: Bad address"):
        endpoint.dma_read(0, 4)
    remote.error = 0xFFFFFFFF
    with pytest.raises(DmaError, match="client 0 refused DMA_READ: Invalid argument"):
        endpoint.dma_read(0, 4)
    remote.error, remote.short = 0, True
    with pytest.raises(DmaError, match="client 0: Protocol error: 3 bytes of 4"):
        endpoint.dma_read(0, 4)
    remote.short, remote.mute = False, True
    with pytest.raises(DmaError, match=r"client 0 did not answer DMA_WRITE in 0\.05 s"):
        endpoint.dma_write(0, b"abcd", deadline_s=0.05)
    remote.mute = False
    endpoint.dma_write(0, b"abcd")


def test_dma_to_a_client_that_goes_is_an_error_at_once(
    endpoint: VfioUserEndpoint, remote: Memory
) -> None:
    remote.mute = True
    began = time.monotonic()
    timer = threading.Timer(0.05, endpoint.drop)
    timer.start()
    with pytest.raises(DmaError, match="client 0 has gone"):
        endpoint.dma_read(0, 4)
    assert time.monotonic() - began < 3
    timer.join()


# A device that writes without pause.


def test_a_pattern_is_written_to_the_byte(
    endpoint: VfioUserEndpoint, connect: Connect, memory: int
) -> None:
    connect().ask(DmaMap(3, 0, 0x10000, PAGE), memory)
    os.pwrite(memory, b"\xee" * PAGE, 0)
    writer = endpoint.write_pattern(0x10020, slots=10, rate_hz=5000)
    until(lambda: writer.count > 25, "the ring to be full twice", 5, pause_s=0.002)
    pattern = writer.stop()
    assert pattern == writer.stop()
    assert pattern.stalls == ()
    ring = os.pread(memory, 80, 0x20)
    assert ring == pattern.ring(b"\xee" * 80)
    assert max(struct.unpack("<10Q", ring)) == pattern.count
    assert os.pread(memory, 8, 0x18) + os.pread(memory, 8, 0x70) == b"\xee" * 16


def test_a_pattern_that_is_short_leaves_the_rest_of_the_ring(
    endpoint: VfioUserEndpoint, connect: Connect, memory: int
) -> None:
    connect().ask(DmaMap(3, 0, 0, PAGE), memory)
    writer = endpoint.write_pattern(0, slots=512, rate_hz=200)
    until(lambda: writer.count >= 3, "three entries", 5, pause_s=0.002)
    pattern = writer.stop()
    assert pattern.count < 512
    assert os.pread(memory, PAGE, 0) == pattern.ring(bytes(PAGE))


def test_a_writer_stalls_without_memory_and_goes_on_without_a_gap(
    endpoint: VfioUserEndpoint, connect: Connect, memory: int
) -> None:
    old = connect()
    old.ask(DmaMap(3, 0, 0, PAGE), memory)
    writer = endpoint.write_pattern(0, slots=64, rate_hz=2000)
    until(lambda: writer.count > 5, "some entries", 5, pause_s=0.002)
    old.stream.close()
    until(lambda: endpoint.clients == [], "old QEMU to go", 5, pause_s=0.002)
    stalls = writer.stalls
    until(lambda: writer.stalls > stalls + 1, "the writer to stall", 5, pause_s=0.002)
    stalled = writer.count
    connect().ask(DmaMap(3, 0, 0, PAGE), memory)
    until(lambda: writer.count > stalled + 5, "some more entries", 5, pause_s=0.002)
    pattern = writer.stop()
    assert "no client has mapped 0x8 bytes" in pattern.stalls[-1][1]
    assert os.pread(memory, 512, 0) == pattern.ring(bytes(512))


@pytest.mark.parametrize(("slots", "rate_hz"), [(0, 1.0), (1, 0.0), (1, -1.0)])
def test_a_writer_that_cannot_be_is_refused(
    endpoint: VfioUserEndpoint, slots: int, rate_hz: float
) -> None:
    with pytest.raises(ValueError, match="slots at"):
        endpoint.write_pattern(0, slots, rate_hz)


# What goes wrong with a device, and its end.


def test_a_silent_device_answers_afterwards(endpoint: VfioUserEndpoint, connect: Connect) -> None:
    client = connect()
    with endpoint.silence():
        number = client.say(GetInfo())
        assert select.select([client.stream], [], [], 0.1)[0] == []
    assert client.hear()[0].id == number


def test_a_silent_device_can_be_dropped_and_die(
    endpoint: VfioUserEndpoint, connect: Connect
) -> None:
    for end in (endpoint.drop, endpoint.die):
        client = connect()
        with endpoint.silence():
            client.say(GetInfo())
            end()
            assert client.ended()
            until(lambda: not endpoint.clients, "the client to be forgotten", 5, pause_s=0.002)


def test_connections_can_be_dropped_one_by_one_and_all(
    endpoint: VfioUserEndpoint, connect: Connect
) -> None:
    clients = [connect() for _ in range(3)]
    endpoint.drop(1)
    assert clients[1].ended()
    clients[0].ask(GetInfo())
    endpoint.drop()
    assert clients[0].ended()
    assert clients[2].ended()
    until(lambda: endpoint.clients == [], "all to be forgotten", 5, pause_s=0.002)
    assert {event.reason for event in endpoint.witness.since(0, Disconnected)} == {"it was dropped"}
    connect().ask(GetInfo())


def test_clients_come_by_the_path(endpoint: VfioUserEndpoint, tmp_path: Path) -> None:
    path = tmp_path / "device"
    endpoint.listen(path)
    with pytest.raises(RuntimeError, match=r"listens at .*device already"):
        endpoint.listen(path)
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        for stream in (one, two):
            stream.connect(str(path))
            Client(stream).negotiate()
        assert endpoint.clients == [0, 1]
        endpoint.close()
        assert Client(one).ended()
        assert Client(two).ended()
    assert not path.exists()


def test_a_path_that_cannot_be_is_an_error(endpoint: VfioUserEndpoint, tmp_path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(OSError, match="too long"):
        endpoint.listen(tmp_path / ("x" * 110))
    (tmp_path / "taken").touch()
    with pytest.raises(OSError, match="in use"):
        endpoint.listen(tmp_path / "taken")
    assert open_descriptors() == before
    with pytest.raises(RuntimeError, match="listens nowhere"):
        endpoint.qemu_device("x")


def test_a_device_that_dies_leaves_its_path_and_nobody_who_listens(
    endpoint: VfioUserEndpoint, connect: Connect, tmp_path: Path
) -> None:
    path = tmp_path / "device"
    endpoint.listen(path)
    client = connect()
    endpoint.die()
    assert client.ended()
    assert path.exists()

    def refused() -> bool:
        with socket.socket(socket.AF_UNIX) as stream:
            try:
                stream.connect(str(path))
            except ConnectionRefusedError:
                return True
        return False

    until(refused, "nobody to listen", 5, pause_s=0.002)
    endpoint.close()
    assert not path.exists()


def test_nothing_outlives_its_end(eventfds: list[int], memory: int, tmp_path: Path) -> None:
    before = open_descriptors()
    for _ in range(2):
        endpoint = VfioUserEndpoint(Description(msix=Msix(8)))
        endpoint.listen(tmp_path / "device")
        with endpoint.attach() as one, endpoint.attach() as two, endpoint.silence():
            first = Client(one)
            endpoint.answering.set()
            first.negotiate()
            first.ask(SetIrqs(TRIGGER, Irq.MSIX, 0, 8), *eventfds)
            first.ask(DmaMap(3, 0, 0, PAGE), memory)
            endpoint.write_pattern(0, 8, 1000)
            Client(two).stream.sendall(b"\0\0\0")
            endpoint.answering.clear()
            first.say(GetInfo())
            assert len(open_descriptors()) > len(before) + 8
            endpoint.close()
            assert serving() == []
            assert endpoint.clients == []
        endpoint.close()
    assert open_descriptors() == before


def test_who_comes_after_the_end_is_sent_away(endpoint: VfioUserEndpoint) -> None:
    endpoint.close()
    with endpoint.attach() as stream:
        assert Client(stream).ended()
    with pytest.raises(NotArmedError):
        endpoint.fire(0)


# Whatever is sent, the server answers the next client, and keeps nothing.

PAYLOADS = st.binary(max_size=48) | st.lists(
    st.sampled_from([0, 1, 2, 3, 7, 8, 16, 20, 24, 32, 0x21, 0x24, 0x10000, PAGE, 2**32 - 1]),
    max_size=10,
).map(lambda words: struct.pack(f"={len(words)}I", *words))
MESSAGES = st.tuples(
    st.integers(0, 18),
    PAYLOADS,
    st.integers(0, 3),
    st.sampled_from([0, Flag.NO_REPLY, Flag.REPLY, Flag.ERROR, 2]),
    st.sampled_from([0, 0, 0, 0, 1, -1, -20, 1 << 30]),
)
CORPUS: list[tuple[int, bytes, int, int, int]] = [
    (Command.DEVICE_SET_IRQS, SetIrqs(TRIGGER, Irq.MSIX, 5, 3).pack(), 3, 0, 0),
    (Command.DEVICE_SET_IRQS, SetIrqs(IrqSet.NONE | IrqSet.TRIGGER, 2, 0, 8).pack(), 0, 0, 0),
    (Command.DEVICE_SET_IRQS, SetIrqs(TRIGGER, Irq.REQ, 0, 1).pack(), 1, 0x10, 0),
    (Command.DEVICE_SET_IRQS, SetIrqs(IrqSet.EVENTFD | IrqSet.UNMASK, 0, 0, 1).pack(), 1, 0, 0),
    (Command.DMA_MAP, DmaMap(3, 0, 0x10000, PAGE).pack(), 1, 0, 0),
    (Command.DMA_UNMAP, DmaUnmap(0, 0, everything=True).pack(), 0, 0, 0),
    (Command.REGION_WRITE, RegionWrite(7, 4095, b"\xff").pack(), 0, 0, 0),
    (Command.REGION_READ, RegionRead(8, 0, 0).pack(), 0, 0, 0),
    (Command.DEVICE_RESET, b"", 2, 0, 0),
    (Command.DMA_READ, bytes(16), 0, Flag.REPLY, 0),
    (Command.DEVICE_GET_INFO, b"", 0, 0, 1 << 30),
]


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[VfioUserEndpoint]:
    endpoint = VfioUserEndpoint(Description(msix=Msix(8), msi=Msi(4), intx=1), write_multiple=True)
    yield endpoint
    endpoint.close()


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.booleans(), st.lists(MESSAGES, max_size=8))
@example(True, CORPUS)
@example(True, CORPUS[:7] + CORPUS[:7])
@example(False, CORPUS)
def test_no_client_can_harm_the_server(
    fuzzed: VfioUserEndpoint,
    eventfds: list[int],
    negotiated: bool,
    messages: list[tuple[int, bytes, int, int, int]],
) -> None:
    until(lambda: fuzzed.clients == [], "the last client to be forgotten", 5, pause_s=0.0005)
    before = open_descriptors()
    with fuzzed.attach() as stream, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client = Client(stream)
        if negotiated:
            client.negotiate()
        for command, payload, fds, flags, lie in messages:
            size = max(0, Header.SIZE + len(payload) + lie)
            header = Header(1, command, size, flags).pack()
            socket.send_fds(stream, [header, payload], eventfds[:fds])
        stream.shutdown(socket.SHUT_WR)
        while stream.recv(1 << 16):
            pass
    until(lambda: fuzzed.clients == [], "the client to be forgotten", 5, pause_s=0.0005)
    with fuzzed.attach() as stream:
        good = Client(stream)
        good.negotiate()
        assert good.ask(GetInfo()) == struct.pack("=4I", 16, 3, 9, 5)
    until(lambda: fuzzed.clients == [], "the good client to be forgotten", 5, pause_s=0.0005)
    assert open_descriptors().keys() == before.keys()
