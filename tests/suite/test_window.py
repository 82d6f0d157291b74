# SPDX-License-Identifier: GPL-2.0-or-later
"""A file in the memory of another machine, found by its pages."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

import pytest

from fixtures.hosts.window import FRAME, PAGE, PRESENT, NotResidentError, Window, mapping

MAPS = """\
55d0c0000000-55d0c0002000 r--p 00000000 00:1f 7    /run/qemu
7f0000000000-7f0000003000 rw-s 00000000 00:1a 12   /dev/shm/a run/1.ram
7f0000100000-7f0000101000 rw-s 00001000 00:1a 13   /dev/shm/part.ram
7f0000200000-7f0000201000 rw-p 00000000 00:00 0
"""
#: Where the file's three pages lie: neither in order nor side by side.
FRAMES = (5, 2, 7)


def pagemap(*entries: int) -> bytes:
    return struct.pack(f"<{len(entries)}Q", *entries)


@pytest.fixture
def ram() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 8 * PAGE) as ram:
        yield ram


@pytest.fixture
def window(ram: mmap.mmap) -> Window:
    # Bit 61, that it is a file's, and bit 56, that it is mapped once, are no part of its place.
    return Window(ram, pagemap(*(PRESENT | 1 << 61 | 1 << 56 | frame for frame in FRAMES)))


def test_the_mapping_of_a_file_is_found_by_its_path() -> None:
    assert mapping(MAPS, "/dev/shm/a run/1.ram") == (0x7F0000000000, 3 * PAGE)


@pytest.mark.parametrize("path", ["/dev/shm/2.ram", "/dev/shm/part.ram", ""])
def test_what_is_not_mapped_from_its_beginning_is_not_found(path: str) -> None:
    with pytest.raises(NotResidentError, match="is not mapped"):
        mapping(MAPS, path)


def test_what_is_written_lies_in_the_files_pages(ram: mmap.mmap, window: Window) -> None:
    window.write(PAGE - 2, b"abcd")
    assert ram[6 * PAGE - 2 : 6 * PAGE] == b"ab", "the end of the first page"
    assert ram[2 * PAGE : 2 * PAGE + 2] == b"cd", "the beginning of the second"
    assert ram[: 2 * PAGE] == bytes(2 * PAGE)
    assert window.read(PAGE - 3, 6) == b"\0abcd\0"


def test_all_of_it_can_be_read_at_once(ram: mmap.mmap, window: Window) -> None:
    for frame in FRAMES:
        ram[frame * PAGE : (frame + 1) * PAGE] = bytes([frame]) * PAGE
    assert window.read(0, 3 * PAGE) == b"".join(bytes([frame]) * PAGE for frame in FRAMES)


def test_nothing_is_read_beyond_its_end(window: Window) -> None:
    window.write(3 * PAGE - 1, b"x")
    assert window.read(3 * PAGE - 1, 100) == b"x"
    assert window.read(3 * PAGE, 1) == b""


@pytest.mark.parametrize("entry", [0, 3, PRESENT], ids=["swapped", "not there", "kept secret"])
def test_a_page_without_a_place_is_told(ram: mmap.mmap, entry: int) -> None:
    with pytest.raises(NotResidentError):
        Window(ram, pagemap(PRESENT | 1, entry))


def test_bits_that_are_no_part_of_a_frame_are_left_out() -> None:
    assert FRAME == 0x7F_FFFF_FFFF_FFFF
