# SPDX-License-Identifier: GPL-2.0-or-later
"""The initramfs format, read back as its specification has it (and by cpio, if it is here)."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from images.cpio import Archive

FIELDS = [
    *("ino", "mode", "uid", "gid", "nlink", "mtime", "filesize"),
    *("maj", "min", "rmaj", "rmin", "namesize", "chksum"),
]


def sample() -> bytes:
    archive = Archive()
    archive.directory("dev")
    archive.device("dev/console", 5, 1)
    for size in range(5):  # every padding there is
        archive.file(f"file{'x' * size}", b"#" * size, 0o755)
    return archive.finish()


def read(data: bytes) -> dict[str, tuple[dict[str, int], bytes]]:
    """The members of an archive; fields are named as in buffer-format.rst."""
    members = {}
    at = 0
    while at < len(data):
        assert data[at : at + 6] == b"070701"
        header = data[at + 6 : at + 110]
        fields = {name: int(header[8 * n : 8 * n + 8], 16) for n, name in enumerate(FIELDS)}
        begin = at + 110 + fields["namesize"]
        name = data[at + 110 : begin]
        assert name.endswith(b"\0")
        begin += -begin % 4
        end = begin + fields["filesize"]
        members[name[:-1].decode()] = (fields, data[begin:end])
        at = end + -end % 4
    assert at == len(data)
    return members


def test_members() -> None:
    members = read(sample())
    assert list(members)[-1] == "TRAILER!!!"
    del members["TRAILER!!!"]
    for size in range(5):
        fields, content = members.pop(f"file{'x' * size}")
        assert content == b"#" * size
        assert fields["mode"] == stat.S_IFREG | 0o755
    directory, _ = members.pop("dev")
    assert directory["mode"] == stat.S_IFDIR | 0o755
    console, _ = members.pop("dev/console")
    assert console["mode"] == stat.S_IFCHR | 0o600
    assert (console["rmaj"], console["rmin"]) == (5, 1)
    assert members == {}


def test_no_two_members_are_one_file_and_all_are_roots() -> None:
    # Equal inode numbers would make hard links of them.
    fields = [fields for fields, _ in read(sample()).values()]
    assert len({field["ino"] for field in fields}) == len(fields)
    assert {(field["uid"], field["gid"], field["nlink"]) for field in fields} == {(0, 0, 1)}


def test_equal_input_makes_equal_archives() -> None:
    assert sample() == sample()


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio")
def test_cpio_reads_it(tmp_path: Path) -> None:
    subprocess.run(
        ["cpio", "--extract", "--nonmatching", "dev*"], input=sample(), cwd=tmp_path, check=True
    )
    assert (tmp_path / "filexxx").read_bytes() == b"###"
