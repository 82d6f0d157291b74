# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree of files that brings its own libraries, and how a program in it is started.

A sysroot never needs chroot or root: programs are run through the tree's own dynamic loader.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from images.errors import BadInputError

__all__ = ["FIRMWARE", "LIBRARIES", "LOADER", "QEMU_BINARY", "Sysroot", "shared_objects"]

QEMU_BINARY = PurePosixPath("usr/bin/qemu-system-x86_64")
LOADER = PurePosixPath("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "usr/lib", "usr/lib/x86_64-linux-gnu/pulseaudio")
FIRMWARE = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")


@dataclass(frozen=True)
class Sysroot:
    """A sysroot as seen from the machine on which its programs will run."""

    root: PurePath

    def program(self, path: str | PurePosixPath, *args: str) -> list[str]:
        """The command line that runs the program at ``path`` below the root."""
        libraries = ":".join(str(self.root / name) for name in LIBRARIES)
        return [str(self.root / LOADER), "--library-path", libraries, str(self.root / path), *args]

    def qemu(self, *args: str) -> list[str]:
        """The command line of the tree's QEMU, told where the tree's firmware is."""
        firmware = [word for name in FIRMWARE for word in ("-L", str(self.root / name))]
        return [*self.program(QEMU_BINARY), *firmware, *args]


def shared_objects(binary: Path) -> Iterable[Path]:
    """The shared objects ``binary`` needs, its loader included, as this machine resolves them.

    :raises BadInputError: a library is missing here, or the file is not a dynamic executable
        for this machine.
    """
    done = subprocess.run(
        ["ldd", binary], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise BadInputError(
            f"{binary}: not a program this machine can run "
            f"(ldd: {reason[0].strip() if reason else 'failed'})"
        )
    missing = [line.split()[0] for line in done.stdout.splitlines() if "not found" in line]
    if missing:
        raise BadInputError(
            f"{binary}: its libraries {', '.join(missing)} are not on this machine; "
            "if it belongs to another root tree, name that with --qemu-sysroot DIR"
        )
    # "name => path (address)", or "path (address)" for the loader and what is needed by path.
    found = re.findall(r"^\t(?:.* => )?(/.*) \(0x\w+\)$", done.stdout, re.MULTILINE)
    return [Path(path) for path in found]
