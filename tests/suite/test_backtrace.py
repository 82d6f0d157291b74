# SPDX-License-Identifier: GPL-2.0-or-later
"""What is said of a QEMU that has crashed."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from fixtures.evidence import backtrace
from fixtures.guests import ProbeGuest
from fixtures.machines import Machine
from images.sysroot import Sysroot

NEEDS_GDB = pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb")
SMALL, LARGE = 0x1000, 3 * backtrace.ENOUGH


@pytest.fixture
def core() -> bytes:
    """A core file with a small and a large piece of memory, each full of its own number."""
    table, places = b"", [(0x2000, LARGE), (0x1000, SMALL)]
    for offset, size in places:
        table += struct.pack("<IIQQQQQQ", 1, 4, offset, 0, 0, size, size, 1)
    header = b"\x7fELF".ljust(32, b"\0") + struct.pack("<Q", 64)
    header = (header.ljust(56, b"\0") + struct.pack("<H", len(places))).ljust(64, b"\0")
    return (header + table).ljust(0x1000, b"\0") + b"\1" * SMALL + b"\2" * LARGE


def test_small_pieces_of_a_core_file_are_fetched_and_the_ends_of_large_ones(
    core: bytes, tmp_path: Path
) -> None:
    asked = 0

    def read(offset: int, size: int) -> bytes:
        nonlocal asked
        asked += size
        return core[offset : offset + size]

    backtrace.fetch(read, tmp_path / "core")
    copy = (tmp_path / "core").read_bytes()
    begins = 0x2000 + LARGE - backtrace.ENOUGH
    assert copy[: 0x1000 + SMALL] == core[: 0x1000 + SMALL]
    assert copy[0x2000:begins] == bytes(LARGE - backtrace.ENOUGH)
    assert copy[begins:] == core[begins:]
    assert asked < backtrace.ENOUGH + SMALL + 0x1000


def test_a_core_file_that_was_cut_is_fetched_as_far_as_it_goes(core: bytes, tmp_path: Path) -> None:
    cut = core[:0x1800]
    backtrace.fetch(lambda offset, size: cut[offset : offset + size], tmp_path / "core")
    copy = (tmp_path / "core").read_bytes()
    assert copy == cut + bytes(len(core) - len(cut))


def test_the_top_is_that_of_the_thread_that_crashed() -> None:
    frames = [f"#{n}  0x00 in f{n} ()" for n in range(12)]
    text = "\n".join(["#0 0x00 in ?? ()", backtrace.CRASHED, *frames, "", "Thread 1", *frames])
    assert backtrace.top(text) == "\n".join(frames[: backtrace.TOP])
    assert backtrace.top("none: gdb is not on this machine\n") == "none: gdb is not on this machine"


def test_where_no_core_file_is_kept_that_is_said(a_machine: Callable[..., Machine]) -> None:
    machine = a_machine()
    machine.start()
    machine.process.kill()
    assert backtrace.backtrace(machine, machine.spec.qemu) == (
        "none: this machine keeps no core files for us"
    )


@NEEDS_GDB
def test_the_functions_of_qemu_are_named_and_the_core_file_is_gone(
    a_machine: Callable[..., Machine],
    packaged: Sysroot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine, core = a_machine(), tmp_path / "core"
    machine.start()
    machine.alive(ProbeGuest(machine.host, machine.spec.ram, machine.died).wait_ready)
    subprocess.run(
        ["gdb", "-nx", "-batch", "-p", str(machine.process.pid), "-ex", f"gcore {core}"],
        check=True,
        capture_output=True,
    )
    monkeypatch.setattr(type(machine.host), "core", lambda _host, _pid: PurePosixPath(core))
    text = backtrace.backtrace(machine, packaged)
    assert "in qemu_main_loop ()" in backtrace.top(text, 20), text
    assert not core.exists()


@NEEDS_GDB
def test_a_file_that_is_no_core_file_is_no_backtrace(
    a_machine: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, core = a_machine(), tmp_path / "core"
    machine.start()
    core.write_bytes(b"?")
    monkeypatch.setattr(type(machine.host), "core", lambda _host, _pid: PurePosixPath(core))
    assert backtrace.backtrace(machine, machine.spec.qemu).startswith("none: ")
    assert not core.exists()
