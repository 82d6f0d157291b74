# SPDX-License-Identifier: GPL-2.0-or-later
"""The vfio-user protocol as bytes: what is understood, and with which errno the rest is refused."""

from __future__ import annotations

import errno
import json
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fixtures.endpoints.vfio_user.protocol import (
    MAX_MESSAGE,
    MAX_TRANSFER,
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
    RefusedError,
    RegionInfo,
    RegionRead,
    RegionWrite,
    RegionWriteMulti,
    Request,
    Reset,
    SetIrqs,
    Shape,
    Version,
    decode,
    dma_access,
    dma_data,
    message,
    version_reply,
)

#: Two BARs and configuration space; one INTx, four MSI, eight MSI-X.
SHAPE = Shape((0x1000, 0, 0x100, 0, 0, 0, 0, 256, 0), (1, 4, 8, 1, 1), True, write_multiple=True)
PLAIN = Shape((0x1000,) + 8 * (0,), (0, 0, 1, 1, 1), False)

NONE, BOOL, EVENTFD = IrqSet.NONE, IrqSet.BOOL, IrqSet.EVENTFD
MASK, UNMASK, TRIGGER = IrqSet.MASK, IrqSet.UNMASK, IrqSet.TRIGGER


def refused(command: int, payload: bytes, fds: int = 0, shape: Shape = SHAPE) -> int:
    """The errno with which a request is refused."""
    with pytest.raises(RefusedError) as caught:
        decode(command, payload, fds, shape)
    return caught.value.errno


# The layouts, as the specification draws them.


def test_a_header_has_sixteen_bytes() -> None:
    raw = Header(0x1234, Command.DMA_MAP, 48, Flag.NO_REPLY, 0).pack()
    assert raw.hex() == "34120200300000001000000000000000"
    assert Header.unpack(raw) == Header(0x1234, 2, 48, 0x10)


def test_a_reply_echoes_number_and_command() -> None:
    request = Header(7, Command.REGION_READ, 32)
    assert Header.unpack(request.reply(b"abc")[:16]) == Header(7, 9, 19, Flag.REPLY)
    assert request.reply(b"abc")[16:] == b"abc"
    error = Header(7, 9, 16, Flag.REPLY | Flag.ERROR, errno.EINVAL)
    assert Header.unpack(request.refuse(errno.EINVAL)) == error


@pytest.mark.parametrize(
    ("request_", "command", "raw"),
    [
        (
            DmaMap(3, 0x1000, 0x2000, 0x3000),
            2,
            struct.pack("=IIQQQ", 32, 3, 0x1000, 0x2000, 0x3000),
        ),
        (DmaUnmap(0x2000, 0x3000), 3, struct.pack("=IIQQ", 24, 0, 0x2000, 0x3000)),
        (DmaUnmap(0, 0, everything=True), 3, struct.pack("=IIQQ", 24, 2, 0, 0)),
        (GetInfo(), 4, struct.pack("=4I", 16, 0, 0, 0)),
        (GetRegionInfo(7), 5, struct.pack("=4IQQ", 32, 0, 7, 0, 0, 0)),
        (GetRegionIoFds(2), 6, struct.pack("=4I", 16, 0, 2, 0)),
        (GetIrqInfo(2), 7, struct.pack("=4I", 16, 0, 2, 0)),
        (SetIrqs(NONE | TRIGGER, 2), 8, struct.pack("=5I", 20, 0x21, 2, 0, 0)),
        (
            SetIrqs(BOOL | UNMASK, 1, 2, 2, (True, False)),
            8,
            struct.pack("=5I2B", 22, 0x12, 1, 2, 2, 1, 0),
        ),
        (RegionRead(0, 0xFFC, 4), 9, struct.pack("=QII", 0xFFC, 0, 4)),
        (RegionWrite(7, 4, b"\6\0"), 10, struct.pack("=QII", 4, 7, 2) + b"\6\0"),
        (Reset(), 13, b""),
        (
            RegionWriteMulti((RegionWrite(0, 8, b"abcd"), RegionWrite(7, 4, b"\7"))),
            15,
            struct.pack("=QQII8sQII8s", 2, 8, 0, 4, b"abcd", 4, 7, 1, b"\7"),
        ),
    ],
)
def test_requests_are_encoded_and_understood(request_: Request, command: int, raw: bytes) -> None:
    assert request_.pack() == raw
    assert decode(command, raw, 0, SHAPE) == request_


def test_replies_are_what_the_specification_draws() -> None:
    assert GetInfo.reply(SHAPE) == struct.pack("=4I", 16, 3, 9, 5)
    assert GetInfo.reply(PLAIN) == struct.pack("=4I", 16, 2, 9, 5)
    assert GetRegionInfo(0).reply(SHAPE) == struct.pack("=4IQQ", 32, 3, 0, 0, 0x1000, 0)
    assert RegionInfo.unpack(GetRegionInfo(1).reply(SHAPE)) == RegionInfo(0, 1, 0)
    assert GetRegionIoFds(0).reply() == struct.pack("=4I", 16, 0, 0, 0)
    flags = [IrqInfo.unpack(GetIrqInfo(index).reply(SHAPE)).flags for index in range(5)]
    assert flags == [0x7, 0x9, 0x1, 0x9, 0x9]
    assert GetIrqInfo(2).reply(SHAPE) == struct.pack("=4I", 16, 1, 2, 8)
    assert RegionRead(0, 4, 2).reply(b"ab") == struct.pack("=QII", 4, 0, 2) + b"ab"
    assert RegionRead(0, 4, 0).reply(b"") == b""
    assert RegionWrite(0, 4, b"ab").reply() == struct.pack("=QII", 4, 0, 2)
    assert RegionWriteMulti(2 * (RegionWrite(0, 4, b"ab"),)).reply() == struct.pack("=Q", 2)


def test_dma_messages_are_as_specified_or_as_qemu_10_has_them() -> None:
    assert dma_access(0x1000, 3) == struct.pack("=QQ", 0x1000, 3)
    assert dma_access(0x1000, 3, b"abc") == struct.pack("=QQ", 0x1000, 3) + b"abc"
    assert dma_access(0x1000, 3, b"abc", 12) == struct.pack("=QI", 0x1000, 3) + b"abc" + bytes(4)
    assert dma_data(struct.pack("=QQ", 0x1000, 3) + b"abc", 3) == b"abc"
    assert dma_data(struct.pack("=QI", 0x1000, 3) + b"abc" + bytes(4), 3, 12) == b"abc"
    with pytest.raises(RefusedError, match="2 bytes of 3"):
        dma_data(bytes(16) + b"ab", 3)


# VERSION.


def version(text: str | bytes, major: int = 0, minor: int = 0) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("=HH", major, minor) + data


def test_a_version_carries_capabilities() -> None:
    offered = {"max_msg_fds": 8, "pgsizes": 4096}
    packed = Version(0, 0, offered).pack()
    assert packed[:4] == bytes(4)
    assert json.loads(packed[4:-1]) == {"capabilities": offered}
    assert packed[-1:] == b"\0"
    assert Version.unpack(packed) == Version(0, 0, offered)
    assert Version.unpack(version("", 0, 7)) == Version(0, 7, None)
    assert Version.unpack(version("{}\0")) == Version(0, 0, {})


def test_the_client_says_how_much_it_takes_at_once() -> None:
    assert Version.unpack(version("")).max_transfer == MAX_TRANSFER
    asked = version('{"capabilities": {"max_data_xfer_size": 4096}}\0')
    assert Version.unpack(asked).max_transfer == 4096


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0\0",
        version("{}\0", major=1),
        version("{}"),  # no NUL
        version("\0"),
        version("{\0"),
        version(b"\xff\xfe\0"),
        version("[" * 10000 + "\0"),
        version("[]\0"),
        version('{"capabilities": []}\0'),
        version('{"capabilities": {"max_msg_fds": "8"}}\0'),
        version('{"capabilities": {"max_msg_fds": true}}\0'),
        version('{"capabilities": {"max_msg_fds": -1}}\0'),
        version('{"capabilities": {"max_msg_fds": 1025}}\0'),
        version('{"capabilities": {"max_data_xfer_size": 1.5}}\0'),
        version('{"capabilities": {"twin_socket": 1}}\0'),
        version('{"capabilities": {"twin_socket": {"supported": 1}}}\0'),
        version('{"capabilities": {"migration": {"pgsize": "4k"}}}\0'),
    ],
)
def test_a_version_that_cannot_be_used_is_refused(payload: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        Version.unpack(payload)
    assert caught.value.errno == errno.EINVAL


OFFER = {"max_msg_fds": 8, "max_data_xfer_size": MAX_TRANSFER, "write_multiple": True}


def test_the_reply_offers_a_subset_of_what_was_proposed() -> None:
    request = Version(0, 3, {"max_msg_fds": 16, "write_multiple": True, "pgsizes": 4096})
    reply = Version.unpack(version_reply(request, 1000, OFFER))
    assert reply == Version(0, 0, {"max_msg_fds": 8, "write_multiple": True})


@pytest.mark.parametrize("proposed", [{}, {"write_multiple": False}, {"write_multiple": 1}])
def test_what_the_client_cannot_do_is_not_offered(proposed: dict[str, object]) -> None:
    reply = Version.unpack(version_reply(Version(0, 0, proposed), 1000, OFFER))
    assert reply.capabilities == {}


@pytest.mark.parametrize("room", range(4, 120))
def test_the_reply_is_no_longer_than_the_request(room: int) -> None:
    request = Version(0, 0, OFFER)
    reply = version_reply(request, room, OFFER)
    assert len(reply) <= room
    Version.unpack(reply)


# What is refused, in the order of libvfio-user's functions.


@pytest.mark.parametrize(
    "header",
    [
        Header(0, Command.DEVICE_GET_INFO, 32, Flag.REPLY),
        Header(0, Command.DEVICE_GET_INFO, 32, 0xF),
        Header(0, Command.DEVICE_GET_INFO, 15),
        Header(0, Command.DEVICE_GET_INFO, 16),
        Header(0, Command.REGION_WRITE, MAX_MESSAGE + 1),
    ],
)
def test_a_header_that_is_no_commands_is_refused(header: Header) -> None:
    with pytest.raises(RefusedError) as caught:
        header.check()
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("flags", [0, Flag.NO_REPLY, Flag.ERROR, 0x40])
def test_a_commands_header_is_accepted(flags: int) -> None:
    Header(0, Command.DEVICE_GET_INFO, 32, flags).check()
    Header(0, Command.DEVICE_RESET, 16, flags).check()
    Header(0, Command.REGION_WRITE, MAX_MESSAGE, flags).check()


@pytest.mark.parametrize(
    "command", [0, Command.VERSION, Command.DMA_READ, Command.DMA_WRITE, 14, 16, 17, 18, 0xFFFF]
)
def test_what_is_no_command_of_a_client_is_refused(command: int) -> None:
    assert refused(command, bytes(64)) == errno.EINVAL


@pytest.mark.parametrize("command", [2, 3, 4, 5, 6, 7, 8, 9, 10, 15])
def test_a_payload_that_is_cut_off_is_refused(command: int) -> None:
    whole = {
        2: DmaMap(3, 0, 0, 0x1000),
        3: DmaUnmap(0, 0x1000),
        4: GetInfo(),
        5: GetRegionInfo(0),
        6: GetRegionIoFds(0),
        7: GetIrqInfo(0),
        8: SetIrqs(NONE | TRIGGER, 2),
        9: RegionRead(0, 0, 4),
        10: RegionWrite(0, 0, b"abcd"),
        15: RegionWriteMulti((RegionWrite(0, 0, b"abcd"),)),
    }[command].pack()
    decode(command, whole, 0, SHAPE)
    for size in range(len(whole)):
        assert refused(command, whole[:size]) == errno.EINVAL


@pytest.mark.parametrize("command", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("argsz", [0, 15])
def test_an_argsz_that_is_too_small_is_refused(command: int, argsz: int) -> None:
    rest = {2: bytes(24) + struct.pack("=Q", 4096), 8: struct.pack("=4I", 0x21, 2, 0, 0)}
    payload = struct.pack("=I", argsz) + rest.get(command, bytes(28))
    assert refused(command, payload) == errno.EINVAL


@pytest.mark.parametrize("command", [3, 6])
def test_an_argsz_that_is_too_large_is_refused(command: int) -> None:
    # A bitmap or a list of that size would have to be made.
    payload = struct.pack("=I", MAX_TRANSFER + 1) + bytes(20)
    assert refused(command, payload) == errno.EINVAL


@pytest.mark.parametrize(
    ("request_", "fds", "number"),
    [
        (DmaMap(0x10, 0, 0, 0x1000), 0, errno.EINVAL),
        (DmaMap(0x7, 0, 0, 0x1000), 0, errno.EINVAL),  # to be mapped, but without a descriptor
        (DmaMap(0xB, 0, 0, 0x1000), 0, errno.EINVAL),
        (DmaMap(3, 0, 0, 0), 1, errno.EINVAL),
        (DmaMap(3, 0, (1 << 64) - 0x1000, 0x1001), 1, errno.EINVAL),
        (DmaMap(3, 0, 0, (8 << 40) + 1), 1, errno.ENOSPC),
    ],
)
def test_a_dma_region_that_cannot_be_is_refused(request_: DmaMap, fds: int, number: int) -> None:
    assert refused(Command.DMA_MAP, request_.pack(), fds) == number


def test_a_dma_region_may_end_where_addresses_end() -> None:
    last = DmaMap(7, 0, (1 << 64) - 0x1000, 0x1000)
    assert decode(Command.DMA_MAP, last.pack(), 1, SHAPE) == last


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack("=IIQQ", 24, 1, 0, 0x1000),  # with a dirty bitmap
        struct.pack("=IIQQ", 24, 4, 0, 0x1000),
        struct.pack("=IIQQ", 24, 2, 0, 0x1000),  # all, but a size
        struct.pack("=IIQQ", 24, 2, 0x1000, 0),
    ],
)
def test_an_unmapping_that_cannot_be_is_refused(payload: bytes) -> None:
    assert refused(Command.DMA_UNMAP, payload) == errno.EINVAL


def test_an_index_beyond_the_last_is_refused() -> None:
    assert refused(Command.DEVICE_GET_REGION_INFO, GetRegionInfo(9).pack()) == errno.EINVAL
    assert refused(Command.DEVICE_GET_IRQ_INFO, GetIrqInfo(5).pack()) == errno.EINVAL
    assert refused(Command.DEVICE_GET_REGION_IO_FDS, GetRegionIoFds(9).pack()) == errno.EINVAL


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack("=4I", 16, 1, 0, 0),
        struct.pack("=4I", 16, 0, 0, 1),
        struct.pack("=4I", 16, 0, 1, 0),  # there is no such region
    ],
)
def test_a_question_for_io_descriptors_that_cannot_be_is_refused(payload: bytes) -> None:
    assert refused(Command.DEVICE_GET_REGION_IO_FDS, payload) == errno.EINVAL


@pytest.mark.parametrize(
    ("request_", "fds"),
    [
        (SetIrqs(NONE | BOOL | TRIGGER, 2, 0, 1), 0),
        (SetIrqs(TRIGGER, 2, 0, 1), 0),
        (SetIrqs(NONE | TRIGGER | MASK, 2, 0, 1), 0),
        (SetIrqs(NONE, 2, 0, 1), 0),
        (SetIrqs(NONE | TRIGGER, 5, 0, 1), 0),
        (SetIrqs(NONE | TRIGGER, 2, 8, 1), 0),
        (SetIrqs(NONE | TRIGGER, 2, 8, 0), 0),
        (SetIrqs(NONE | TRIGGER, 2, 7, 2), 0),
        (SetIrqs(NONE | TRIGGER, 2, 1, 0xFFFFFFFF), 0),
        (SetIrqs(NONE | TRIGGER, 2, 1, 0), 0),  # none, from the second on
        (SetIrqs(NONE | MASK, 2, 0, 0), 0),
        (SetIrqs(EVENTFD | TRIGGER, 2, 0, 0), 0),
        (SetIrqs(BOOL | TRIGGER, 2, 0, 2, (True,)), 0),
        (SetIrqs(BOOL | TRIGGER, 2, 0, 2, (True, True, True)), 0),
        (SetIrqs(BOOL | TRIGGER, 2, 0, 0), 0),
        (SetIrqs(NONE | MASK, 3, 0, 1), 0),
        (SetIrqs(NONE | UNMASK, 4, 0, 1), 0),
        (SetIrqs(NONE | TRIGGER, 3, 0, 2), 0),
        (SetIrqs(NONE | TRIGGER, 2, 0, 1), 1),
        (SetIrqs(EVENTFD | TRIGGER, 2, 0, 2), 1),
        (SetIrqs(EVENTFD | TRIGGER, 2, 0, 2), 3),
    ],
)
def test_an_interrupt_set_up_that_cannot_be_is_refused(request_: SetIrqs, fds: int) -> None:
    assert refused(Command.DEVICE_SET_IRQS, request_.pack(), fds) == errno.EINVAL


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("data", [NONE, BOOL, EVENTFD])
@pytest.mark.parametrize("action", [MASK, UNMASK, TRIGGER])
def test_every_form_of_set_irqs_is_understood(index: int, data: IrqSet, action: IrqSet) -> None:
    request = SetIrqs(data | action, index, 0, 1, (True,) if data is BOOL else ())
    if index >= 3 and action is not TRIGGER:
        assert refused(Command.DEVICE_SET_IRQS, request.pack()) == errno.EINVAL
        return
    understood = decode(Command.DEVICE_SET_IRQS, request.pack(), 0, SHAPE)
    assert isinstance(understood, SetIrqs)
    assert understood == request
    assert (understood.data, understood.action) == (data, action)
    if data is EVENTFD:
        assert decode(Command.DEVICE_SET_IRQS, request.pack(), 1, SHAPE) == request


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [
        (9, 0, 4),
        (1, 0, 4),  # there is no such region
        (0, 0x1000, 1),
        (0, 0xFFD, 4),
        (0, (1 << 64) - 1, 4),
        (7, 256, 1),
        (0, 0, MAX_TRANSFER + 1),
    ],
)
def test_an_access_beyond_a_region_is_refused(region: int, offset: int, count: int) -> None:
    read = struct.pack("=QII", offset, region, count)
    assert refused(Command.REGION_READ, read) == errno.EINVAL
    assert refused(Command.REGION_WRITE, read + bytes(min(count, 64))) == errno.EINVAL


def test_a_write_of_another_size_than_its_data_is_refused() -> None:
    for size in (3, 5):
        payload = struct.pack("=QII", 0, 0, 4) + bytes(size)
        assert refused(Command.REGION_WRITE, payload) == errno.EINVAL


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack("=Q", 1),
        struct.pack("=Q", 1 << 61) + bytes(24),
        struct.pack("=QQII8s", 2, 0, 0, 4, b""),
        struct.pack("=QQII8s", 0, 0, 0, 4, b""),
        struct.pack("=QQII8s", 1, 0, 0, 9, b""),
        struct.pack("=QQII8s", 1, 0xFFD, 0, 4, b""),
    ],
)
def test_many_writes_that_cannot_be_are_refused(payload: bytes) -> None:
    assert refused(Command.REGION_WRITE_MULTI, payload) == errno.EINVAL


def test_what_was_not_negotiated_is_refused() -> None:
    many = RegionWriteMulti((RegionWrite(0, 0, b"a"),)).pack()
    assert refused(Command.REGION_WRITE_MULTI, many, shape=PLAIN) == errno.EINVAL


def test_a_device_that_cannot_be_reset_says_so() -> None:
    assert refused(Command.DEVICE_RESET, b"", shape=PLAIN) == errno.EINVAL


# Whatever comes, it is understood or refused.

WORDS = st.sampled_from([0, 1, 2, 4, 7, 8, 9, 16, 20, 32, 0x21, 0x24, 0x1000, 2**31, 2**32 - 1])
STRUCTURED = st.lists(WORDS, max_size=12).map(lambda words: struct.pack(f"={len(words)}I", *words))
CORPUS = [
    (8, struct.pack("=5I", 20, 0x24, 2, 0, 8), 8),
    (8, struct.pack("=5I", 20, 0x22, 2, 0xFFFFFFFF, 2), 0),
    (9, struct.pack("=QII", (1 << 64) - 1, 0, 1), 0),
    (10, struct.pack("=QII", 0, 0, 0), 0),
    (15, struct.pack("=Q", (1 << 64) - 1), 0),
    (2, struct.pack("=IIQQQ", 32, 3, (1 << 64) - 1, (1 << 64) - 1, (1 << 64) - 1), 1),
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(0, 20),
    st.binary(max_size=64) | STRUCTURED,
    st.integers(0, 20),
)
@example(*CORPUS[0])
@example(*CORPUS[1])
@example(*CORPUS[2])
@example(*CORPUS[3])
@example(*CORPUS[4])
@example(*CORPUS[5])
def test_any_payload_is_understood_or_refused(command: int, payload: bytes, fds: int) -> None:
    try:
        request = decode(command, payload, fds, SHAPE)
    except RefusedError:
        return
    # What is understood is in the device's bounds, and means the same when said again.
    again = decode(command, request.pack(), fds, SHAPE)
    assert again == request
    if isinstance(request, RegionRead):
        assert request.offset + request.count <= SHAPE.regions[request.region]
    if isinstance(request, SetIrqs):
        assert request.interrupts.stop <= SHAPE.irqs[request.index]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*OFFER, "capabilities", "twin_socket", "supported", "migration"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(JSON, st.integers(0, 3), st.integers(0, 300))
def test_any_version_is_understood_or_refused(data: object, minor: int, room: int) -> None:
    text = json.dumps({"capabilities": data}).encode() + b"\0"
    try:
        understood = Version.unpack(version(text, 0, minor))
    except RefusedError:
        return
    assert understood.max_transfer >= 0
    reply = version_reply(understood, room, OFFER)
    assert len(reply) <= max(room, 4)
    assert Version.unpack(reply).minor <= minor


def test_a_message_is_its_header_and_its_payload() -> None:
    assert message(3, 9, b"ab") == Header(3, 9, 18).pack() + b"ab"
