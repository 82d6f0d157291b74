# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes the "newc" cpio format, as the kernel's initramfs wants it.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.  Ours because an
initramfs has a device node, which nobody but root could put into a directory for cpio(1).
"""

from __future__ import annotations

import stat

__all__ = ["Archive"]


class Archive:
    """An archive that grows in memory; everything in it belongs to root, at time zero."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0

    def directory(self, name: str, mode: int = 0o755) -> None:
        self._entry(name, stat.S_IFDIR | mode)

    def device(self, name: str, major: int, minor: int) -> None:
        """A character device."""
        self._entry(name, stat.S_IFCHR | 0o600, rdev=(major, minor))

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._entry(name, stat.S_IFREG | mode, content)

    def finish(self) -> bytes:
        """The whole archive; call it once."""
        self._entry("TRAILER!!!", 0)
        return bytes(self._out)

    def _entry(
        self, name: str, mode: int, content: bytes = b"", rdev: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *rdev, len(encoded), 0)
        self._out += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self._out += content
        self._pad()

    def _pad(self) -> None:
        self._out += bytes(-len(self._out) % 4)
