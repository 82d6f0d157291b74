# SPDX-License-Identifier: GPL-2.0-or-later
"""What a build from source needs on this machine, and the one command that installs it.

Asked before a build begins: a missing header would otherwise be a compiler's complaint, minutes
into a log.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from images.errors import EnvironmentFault

__all__ = ["KERNEL", "QEMU", "Need", "install", "install_command", "missing", "require"]


@dataclass(frozen=True)
class Need:
    """One thing a build needs: what it is called, whether it is here, what Debian calls it."""

    name: str
    check: Callable[[], bool]
    package: str


def _program(name: str, package: str) -> Need:
    return Need(name, lambda: shutil.which(name) is not None, package)


def _succeeds(argv: list[str]) -> bool:
    if shutil.which(argv[0]) is None:
        return False
    return (
        subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ).returncode
        == 0
    )


def _header(name: str, package: str) -> Need:
    # The compiler is asked, as it alone knows where it looks.
    return Need(
        name,
        functools.partial(_succeeds, ["gcc", "-E", "-include", name, "-x", "c", "/dev/null"]),
        package,
    )


def _library(name: str, package: str) -> Need:
    return Need(name, functools.partial(_succeeds, ["pkg-config", "--exists", name]), package)


#: gcc alone does not bring the headers of the C library.
_COMPILER = (_program("gcc", "gcc"), _header("stdlib.h", "libc6-dev"))

KERNEL: tuple[Need, ...] = (
    *_COMPILER,
    _program("make", "make"),
    _program("flex", "flex"),
    _program("bison", "bison"),
    _program("bc", "bc"),
    _program("patch", "patch"),
    _program("perl", "perl"),
    _program("tar", "tar"),
    _program("xz", "xz-utils"),
    # The image is packed with it: see CONFIG_KERNEL_LZ4.
    _program("lz4", "lz4"),
    # objtool: on x86_64 it is built whatever the configuration.
    _header("gelf.h", "libelf-dev"),
)

QEMU: tuple[Need, ...] = (
    *_COMPILER,
    _program("ninja", "ninja-build"),
    _program("pkg-config", "pkg-config"),
    _program("patch", "patch"),
    _program("tar", "tar"),
    _program("xz", "xz-utils"),
    # Compiles device trees of other machines, which Debian's tarball has in source form only.
    _program("dtc", "device-tree-compiler"),
    # configure makes a venv of its own out of the Python that runs us.
    Need(
        "python3 ensurepip",
        lambda: importlib.util.find_spec("ensurepip") is not None,
        "python3-venv",
    ),
    _library("glib-2.0", "libglib2.0-dev"),
    _library("pixman-1", "libpixman-1-dev"),
    _library("slirp", "libslirp-dev"),
    # The microvm machine's; without it configure leaves out x86_64 altogether.
    _header("libfdt.h", "libfdt-dev"),
)


def missing(needs: Iterable[Need]) -> list[Need]:
    """Those of ``needs`` that this machine lacks."""
    return [need for need in needs if not need.check()]


def install_command(needs: Iterable[Need]) -> list[str]:
    """The command that installs ``needs`` on Debian, each package named once."""
    packages = dict.fromkeys(need.package for need in needs)
    return ["apt-get", "install", "-y", "--no-install-recommends", *packages]


def install(needs: Iterable[Need]) -> None:
    """Install what is missing.

    :raises EnvironmentFault: we are not root, or it cannot be installed.
    """
    lacking = missing(needs)
    if not lacking:
        return
    command = install_command(lacking)
    if os.geteuid():
        raise EnvironmentFault(f"only root can do this: {' '.join(command)}")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for argv in (command, ["apt-get", "update"], command):  # the lists may be old, or none
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environ
        )
        if argv is command and done.returncode == 0:
            return
    why = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
    raise EnvironmentFault(f"{' '.join(command)}: {''.join(why)}")


def require(needs: Iterable[Need], what: str) -> None:
    """Make sure that ``what`` can be built.

    :raises EnvironmentFault: something is missing; the text has the command that installs it.
    """
    if lacking := missing(needs):
        raise EnvironmentFault(
            f"building {what} needs {', '.join(need.name for need in lacking)}, which this "
            f"machine lacks; as root: {' '.join(install_command(lacking))}"
        )
