# SPDX-License-Identifier: GPL-2.0-or-later
"""Trees that bring their own libraries: how programs start in them, and whose files they are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from images.assets import CustomQemu
from images.errors import BadInputError
from images.sysroot import LIBRARIES, LOADER, QEMU_BINARY, Sysroot, shared_objects

TRUE = Path("/bin/true")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree in which "QEMU" is a program that only succeeds with the tree's own libc."""
    tree = tmp_path / "a tree"
    (tree / LIBRARIES[0]).mkdir(parents=True)
    for path in shared_objects(TRUE):
        shutil.copy(path, tree / LIBRARIES[0])
    (tree / QEMU_BINARY).parent.mkdir()
    shutil.copy(TRUE, tree / QEMU_BINARY)
    return tree


def compile_program(into: Path, *, static: bool = False) -> Path:
    """A program that needs ``libown.so`` from its own directory, or nothing at all."""
    (into / "own.c").write_text("int own(void) { return 0; }")
    (into / "main.c").write_text("int own(void); int main(void) { return own(); }")
    gcc = ["gcc", "-o", into / "program", into / "main.c"]
    if static:
        subprocess.run([*gcc, "-static", into / "own.c"], check=True)
    else:
        library = into / "libown.so"
        subprocess.run(["gcc", "-shared", "-o", library, into / "own.c"], check=True)
        subprocess.run([*gcc, library, f"-Wl,-rpath,{into}"], check=True)
    return into / "program"


def test_programs_run_with_the_trees_libraries(tree: Path) -> None:
    command = Sysroot(tree).program(QEMU_BINARY)
    listing = subprocess.run(
        [command[0], "--list", *command[1:]], check=True, capture_output=True, text=True
    ).stdout
    assert f"libc.so.6 => {tree}/usr/lib/x86_64-linux-gnu/libc.so.6" in listing
    assert subprocess.run(command).returncode == 0


def test_qemu_is_told_where_its_firmware_is() -> None:
    root = "/run/sysroot/b"
    command = Sysroot(PurePosixPath(root)).qemu("-version")
    assert command[0] == f"{root}/{LOADER}"
    assert command[-8:] == [
        f"{root}/{QEMU_BINARY}",
        *("-L", f"{root}/usr/share/qemu"),
        *("-L", f"{root}/usr/share/seabios"),
        *("-L", f"{root}/usr/lib/ipxe/qemu"),
        "-version",
    ]


def test_shared_objects_include_the_loader() -> None:
    names = {path.name for path in shared_objects(TRUE)}
    assert {"libc.so.6", LOADER.name} <= names
    assert all(path.is_file() for path in shared_objects(TRUE))


@needs_gcc
def test_shared_objects_in_odd_places(tmp_path: Path) -> None:
    place = tmp_path / "a place"
    place.mkdir()
    assert place / "libown.so" in shared_objects(compile_program(place))


@needs_gcc
def test_a_library_that_is_not_here_is_named(tmp_path: Path) -> None:
    program = compile_program(tmp_path)
    (tmp_path / "libown.so").unlink()
    with pytest.raises(BadInputError, match=r"libown.so are not on this machine.*--qemu-sysroot"):
        shared_objects(program)


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF and no more"])
def test_what_is_no_program_is_bad_input(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "qemu").write_bytes(content)
    (tmp_path / "qemu").chmod(0o755)
    with pytest.raises(BadInputError, match=r"not a program this machine can run") as caught:
        shared_objects(tmp_path / "qemu")
    assert "\n" not in str(caught.value)


@needs_gcc
def test_a_static_program_has_no_shared_objects_to_take(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="not a program this machine can run"):
        shared_objects(compile_program(tmp_path, static=True))


def test_a_custom_qemu_must_be_a_file(tmp_path: Path) -> None:
    for path in (tmp_path / "qemu", tmp_path):
        with pytest.raises(BadInputError, match=f"^{path}: no such file$"):
            CustomQemu(path)


def test_a_custom_sysroot_must_have_a_loader(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"--qemu-sysroot .*: no usr/lib/.* below it"):
        CustomQemu(TRUE, tmp_path)


def test_a_custom_sysroot_gives_its_libraries(tree: Path) -> None:
    (tree / "usr/lib/x86_64-linux-gnu/pulseaudio").mkdir()
    (tree / "usr/lib/x86_64-linux-gnu/pulseaudio/libpulsecommon.so").touch()
    names = {name for _, name in CustomQemu(tree / QEMU_BINARY, tree)._libraries()}
    assert {str(LOADER), "usr/lib/x86_64-linux-gnu/pulseaudio/libpulsecommon.so"} <= names
