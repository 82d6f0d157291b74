# SPDX-License-Identifier: GPL-2.0-or-later
"""The programmable function: what can be described, its configuration space, its resets."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.endpoints.vfio_user import Bar, Description, Msi, Msix, ResetBy
from fixtures.endpoints.vfio_user.device import Device
from fixtures.endpoints.vfio_user.protocol import Region

CONFIG = Region.CONFIG
BAR0 = 0x10


@pytest.fixture
def make() -> Iterator[Callable[..., Device]]:
    """Makes functions of a description."""
    devices = []

    def make(**description: Any) -> Device:
        devices.append(Device(Description(**description)))
        return devices[-1]

    yield make
    for device in devices:
        device.close()


def capabilities(device: Device) -> dict[int, int]:
    """The list as software finds it: each ID and its offset."""
    found = {}
    assert device.config[0x06] & 0x10
    at = device.config[0x34]
    while at:
        found[device.config[at]] = at
        at = device.config[at + 1]
    return found


def word(device: Device, offset: int) -> int:
    return int(struct.unpack_from("<H", device.config, offset)[0])


def dword(device: Device, offset: int) -> int:
    return int(struct.unpack_from("<I", device.config, offset)[0])


# What can be described.


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        ({"vendor": 0x10000}, "vendor has 16 bits, which 0x10000 does not fit"),
        ({"class_code": -1}, "class_code has 24 bits"),
        ({"intx": 5}, "an interrupt pin is 1 to 4, or 0 for none, not 5"),
        ({"express": False}, "FLR is in the PCI Express Capability"),
        ({"bars": (Bar(6, 0x1000),)}, "no room for BAR 6"),
        ({"bars": (Bar(-1, 0x1000),)}, "no room for BAR -1"),
        ({"bars": (Bar(5, 0x1000, wide=True),)}, "no room for BAR 5"),
        ({"bars": (Bar(0, 0x1000, wide=True), Bar(1, 0x1000))}, "BAR 1 overlaps BAR 0"),
        ({"bars": (Bar(0, 0x1000), Bar(0, 0x1000))}, "BAR 0 overlaps BAR 0"),
        ({"bars": (Bar(0, 8),)}, "BAR 0 has 0x8 bytes, which is no power of two"),
        ({"bars": (Bar(0, 0x1800),)}, "BAR 0 has 0x1800 bytes, which is no power of two"),
        ({"bars": (Bar(0, 1 << 32),)}, "BAR 0 is too large for its address"),
        ({"msix": Msix(0)}, "1 to 2048 entries, not 0"),
        ({"msix": Msix(2049)}, "1 to 2048 entries, not 2049"),
        ({"msix": Msix(8, table_bar=2)}, "the MSI-X table is in BAR 2, which this function has"),
        ({"msix": Msix(8, pba_bar=3)}, "the PBA is in BAR 3"),
        ({"msix": Msix(8, table_offset=4)}, "the MSI-X table is at 0x4, which is not aligned"),
        ({"msix": Msix(8, pba_offset=0x8004)}, "the PBA is at 0x8004, which is not aligned to 8"),
        ({"msix": Msix(8, table_offset=0xFF88)}, "0x80 bytes at 0xff88, which do not fit BAR 1"),
        ({"msix": Msix(8, pba_offset=0x10000)}, "the PBA has 0x8 bytes at 0x10000"),
        ({"msix": Msix(8, pba_offset=0x78)}, "the MSI-X table overlaps the PBA"),
        ({"msix": Msix(2048, pba_offset=0x7FF8)}, "the MSI-X table overlaps the PBA"),
        ({"msix": Msix(8, table_bar=0)}, "the witness register overlaps the MSI-X table"),
        ({"witness": (1, 0x8004)}, "the witness register overlaps the PBA"),
        ({"witness": (0, 0x1000)}, "the witness register has 0x4 bytes at 0x1000"),
        ({"witness": (0, 2)}, "the witness register is at 0x2, which is not aligned to 4"),
        ({"msi": Msi(3)}, "1, 2, 4, 8, 16 or 32 vectors, not 3"),
        ({"msi": Msi(64)}, "1, 2, 4, 8, 16 or 32 vectors, not 64"),
    ],
)
def test_what_no_function_can_be_is_refused(description: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Description(**description)


@pytest.mark.parametrize(
    "description",
    [
        {"msix": None, "bars": (), "witness": None, "express": False, "reset": ResetBy.NONE},
        {"msix": Msix(2048)},
        {"msix": Msix(8, 0, 0, 0, 0x80), "bars": (Bar(0, 0x100),), "witness": (0, 0x88)},
        {"msix": Msix(1, 0, 0xF0, 4, 8), "bars": (Bar(0, 0x100), Bar(4, 16, wide=True))},
        {"bars": tuple(Bar(n, 0x10000) for n in range(6))},
        {"bars": (Bar(0, 1 << 40, wide=True, prefetchable=True),), "msix": None},
        {"reset": ResetBy.PM, "express": False, "msi": Msi(32), "intx": 4},
    ],
)
def test_what_a_function_can_be_is_built(
    make: Callable[..., Device], description: dict[str, Any]
) -> None:
    device = make(**description)
    shape = device.description.shape
    assert [bool(size) for size in shape.regions[:6]] == [
        any(bar.index == n for bar in device.description.bars) for n in range(6)
    ]
    assert len(shape.regions) == 9
    assert len(shape.irqs) == 5


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 2048),
    st.integers(0, 0x20).map(lambda n: n * 0x800),
    st.integers(0, 0x20).map(lambda n: n * 0x800),
    st.sampled_from(list(ResetBy)),
    st.none() | st.builds(Msi, st.sampled_from([1, 2, 8, 32]), st.booleans(), st.booleans()),
)
def test_whatever_is_accepted_has_a_list_of_capabilities_that_ends(
    size: int, table: int, pba: int, reset: ResetBy, msi: Msi | None
) -> None:
    try:
        description = Description(
            msix=Msix(size, table_offset=table, pba_offset=pba), reset=reset, msi=msi
        )
    except ValueError:
        return
    device = Device(description)
    found = capabilities(device)
    assert found.keys() == {0x11, 0x10} | ({5} if msi else set()) | (
        {1} if reset is ResetBy.PM else set()
    )
    assert max(found.values()) < 0x100 - 12
    assert all(at % 4 == 0 for at in found.values())
    device.close()


# Its configuration space.


def test_its_header_is_as_described(make: Callable[..., Device]) -> None:
    device = make(vendor=0x1AF4, device=0x1110, revision=7, class_code=0x020000, intx=1)
    assert word(device, 0x00) == 0x1AF4
    assert word(device, 0x02) == 0x1110
    assert word(device, 0x04) == 0
    assert dword(device, 0x08) == 0x02000007
    assert device.config[0x0E] == 0  # header type
    assert device.config[0x3D] == 1
    assert len(device.config) == 4096
    assert len(make(express=False, reset=ResetBy.NONE).config) == 256


def test_its_capabilities_are_as_described(make: Callable[..., Device]) -> None:
    device = make(
        msix=Msix(2048, 1, 0, 0, 0x800), msi=Msi(32, wide=True, maskable=True), reset=ResetBy.PM
    )
    found = capabilities(device)
    assert found.keys() == {0x01, 0x05, 0x10, 0x11}
    assert struct.unpack_from("<HII", device.config, found[0x11] + 2) == (0x7FF, 1, 0x800)
    assert word(device, found[0x05] + 2) == 0x018A
    assert word(device, found[0x01] + 2) == 3
    assert dword(device, found[0x10] + 4) & 1 << 28 == 0
    assert dword(make(), capabilities(make())[0x10] + 4) & 1 << 28


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("maskable", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32])
def test_msi_can_be_programmed(
    make: Callable[..., Device], count: int, wide: bool, maskable: bool
) -> None:
    device = make(msix=None, msi=Msi(count, wide, maskable))
    at = capabilities(device)[5]
    size = 10 + 4 * wide + 10 * maskable
    device.write(CONFIG, at + 2, b"\xff" * (size - 2))
    log2 = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4, 32: 5}[count]
    assert word(device, at + 2) == 0x71 | log2 << 1 | wide << 7 | maskable << 8
    assert dword(device, at + 4) == 0xFFFFFFFC
    assert word(device, at + (0xC if wide else 8)) == 0xFFFF
    if maskable:
        masks = at + (0x10 if wide else 0xC)
        assert dword(device, masks) == (1 << count) - 1
        assert dword(device, masks + 4) == 0, "pending bits are read-only"


def test_what_is_read_only_stays_as_it_is(make: Callable[..., Device]) -> None:
    device = make(intx=1, msi=Msi(4))
    before = bytes(device.config)
    for at in range(0, 256, 4):
        # But for FLR, which is an action and no register.
        value = 0xFFFF7FFF if at == device.capabilities[0x10] + 8 else 0xFFFFFFFF
        device.write(CONFIG, at, struct.pack("<I", value))
    msix, msi, express = (device.capabilities[name] for name in (0x11, 0x05, 0x10))
    assert word(device, 0x04) == 0x0546  # COMMAND: no I/O Space, as there is no such BAR
    assert word(device, 0x06) == 0x0010  # STATUS
    assert dword(device, BAR0) == 0xFFFFF000
    assert dword(device, BAR0 + 4) == 0xFFFF0000
    assert dword(device, BAR0 + 8) == 0
    assert word(device, msix + 2) == 0xC007
    assert word(device, msi + 2) == 0x01F5
    assert word(device, express + 8) == 0x7FFF
    writable = {0x04, 0x05, 0x0C, 0x3C, *range(BAR0, BAR0 + 8), msix + 3}
    writable |= set(range(msi + 2, msi + 0x14)) | set(range(express + 8, express + 0x2C))
    changed = {at for at in range(4096) if device.config[at] != before[at]}
    assert changed <= writable


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_register_can_be_written_in_parts(make: Callable[..., Device], width: int) -> None:
    device = make(bars=(Bar(0, 0x1000), Bar(1, 0x10000), Bar(2, 1 << 33, wide=True)))
    for at in range(BAR0, BAR0 + 16, width):
        device.write(CONFIG, at, b"\xff" * width)
    assert struct.unpack_from("<4I", device.config, BAR0) == (
        0xFFFFF000,
        0xFFFF0000,
        0x00000004,
        0xFFFFFFFE,
    )


# Its BARs.


def test_its_bars_keep_what_is_written(make: Callable[..., Device]) -> None:
    device = make()
    device.write(0, 0xFFC, b"\x78\x56\x34\x12")
    assert device.read(0, 0xFFC, 4) == b"\x78\x56\x34\x12"
    assert device.read(0, 0xFF8, 4) == bytes(4)


def test_its_table_is_masked_and_its_pba_empty(make: Callable[..., Device]) -> None:
    device = make(msix=Msix(65))
    assert [device.read(1, 16 * n + 12, 4) for n in range(65)] == 65 * [b"\1\0\0\0"]
    assert device.read(1, 0x8000, 16) == bytes(16)


def test_its_pba_shows_what_it_is_told_and_nothing_that_is_written(
    make: Callable[..., Device],
) -> None:
    device = make(msix=Msix(65))
    for vector in (0, 9, 64):
        device.set_pending(vector, True)
    assert device.read(1, 0x8000, 16).hex() == "01020000000000000100000000000000"
    device.write(1, 0x7FFC, b"\xff" * 24)
    assert device.read(1, 0x7FF8, 32).hex() == (
        "00000000ffffffff01020000000000000100000000000000ffffffff00000000"
    )
    device.set_pending(9, False)
    assert device.read(1, 0x8000, 2).hex() == "0100"
    with pytest.raises(ValueError, match="no MSI-X vector 65"):
        device.set_pending(65, True)


# Its resets.


def soil(device: Device) -> None:
    """Leave something everywhere."""
    device.write(0, 0, b"\xfe\xca\xed\x5e")
    device.write(1, 0, b"\0" * 16)
    device.set_pending(3, True)
    device.write(CONFIG, 0x04, b"\x06\x04")
    device.write(CONFIG, BAR0, b"\x00\x00\x00\xfe")
    device.write(CONFIG, device.capabilities[0x11] + 2, b"\x07\x80")


def assert_clean(device: Device) -> None:
    fresh = Device(device.description)
    assert device.config == fresh.config
    for bar in device.description.bars:
        assert device.read(bar.index, 0, bar.size) == fresh.read(bar.index, 0, bar.size)
    fresh.close()


def test_a_reset_clears_everything(make: Callable[..., Device]) -> None:
    device = make()
    soil(device)
    device.reset()
    assert_clean(device)


@pytest.mark.parametrize(("offset", "data"), [(8, b"\x10\xa8"), (9, b"\xa8"), (8, b"\0\x80\0\0")])
def test_flr_clears_everything(make: Callable[..., Device], offset: int, data: bytes) -> None:
    device = make()
    soil(device)
    assert device.write(CONFIG, device.capabilities[0x10] + offset, data) is ResetBy.FLR
    assert_clean(device)


def test_what_is_no_flr_resets_nothing(make: Callable[..., Device]) -> None:
    device = make(reset=ResetBy.PM)
    soil(device)
    assert device.write(CONFIG, device.capabilities[0x10] + 8, b"\xff\xff") is None
    assert device.read(0, 0, 4) == b"\xfe\xca\xed\x5e"


def test_leaving_d3hot_clears_everything_and_entering_it_nothing(
    make: Callable[..., Device],
) -> None:
    device = make(reset=ResetBy.PM, express=False)
    state = device.capabilities[0x01] + 4
    soil(device)
    assert device.write(CONFIG, state, b"\3") is None
    assert device.write(CONFIG, state, b"\3") is None
    assert device.read(0, 0, 4) == b"\xfe\xca\xed\x5e"
    assert device.write(CONFIG, state, b"\0") is ResetBy.PM
    assert_clean(device)
    soil(device)
    assert device.write(CONFIG, state, b"\0") is None
    assert device.read(0, 0, 4) == b"\xfe\xca\xed\x5e"
