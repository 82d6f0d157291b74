# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds a small x86_64 QEMU from source: to test it, or with a fault put in to test the tests.

What is left out (default features, user interfaces, tools) plays no part in assigning devices
and in CPR; what remains compiles in minutes, and after a change to one file in seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from images import needs, steps
from images.errors import BadInputError, EnvironmentFault

__all__ = ["CONFIGURE", "build", "unpack_source_package"]

CONFIGURE: tuple[str, ...] = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-kvm",
    "--enable-tcg",
    # The guest's way to this machine's network, for those who test more than interrupts.
    "--enable-slirp",
    # Verdicts read vfio's trace events out of the log.
    "--enable-trace-backends=log",
    "--enable-pixman",
    # Or a missing libfdt would be cloned with git, from a server that CI often cannot reach.
    "--enable-fdt=system",
    # Firmware comes from the distribution's packages (-L).
    "--disable-install-blobs",
    # A warning that a newer compiler invented must not stop a build of an older QEMU.
    "--disable-werror",
    # 30 MB instead of 75 to link, to copy and to pack into an image; a backtrace has names still.
    "--disable-debug-info",
)

#: Debian's "+ds" tarball lacks what upstream's has in binary form (firmware, Python wheels), and
#: these patches teach the build to live without.  The rest of Debian's series changes QEMU or
#: firmware: what we test shall be upstream's.
DS_PATCHES = ("disable-pycotap.patch", "skip-unpack-edk2-blobs.patch")

#: Older than this, QEMU's configure refuses.
OLDEST_MESON = (1, 5)

BINARY = "qemu-system-x86_64"


def unpack_source_package(orig: Path, debian: Path, into: Path) -> Path:
    """Unpack a Debian source package, patched as far as its tarball needs it.

    :param orig: the ``.orig.tar.xz``.
    :param debian: the ``.debian.tar.xz`` that belongs to it.
    :param into: a directory, absent or empty, that becomes the source tree.
    :returns: ``into``.
    :raises BadInputError: one of the files is not what it should be, or ``into`` is in use.
    """
    if into.exists() and any(into.iterdir()):
        raise BadInputError(f"{into} is not empty; a source tree is unpacked into its own place")
    into.mkdir(parents=True, exist_ok=True)
    _do(["tar", "-x", "--strip-components=1", "--no-same-owner", "-C", into, "-f", orig], orig)
    # Debian's directory keeps its name: "debian" beside the sources, as dpkg-source does it.
    _do(["tar", "-x", "--no-same-owner", "-C", into, "-f", debian], debian)
    patches = into / "debian/patches"
    try:
        series = (patches / "series").read_text().split("\n")
    except FileNotFoundError:
        raise BadInputError(f"{debian} has no patches/series; is it a .debian.tar.xz?") from None
    for name in DS_PATCHES:
        # Not in the series: this version's tarball does not need it, or no longer.
        if name in (line.strip() for line in series):
            _do(
                [
                    "patch",
                    "--batch",
                    "--forward",
                    "-p1",
                    "-d",
                    into,
                    "-i",
                    (patches / name).absolute(),
                ],
                debian,
            )
    return into


def build(
    source: Path,
    build_dir: Path,
    *,
    jobs: int,
    log: Path,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Configure (once) and build ``source`` in ``build_dir``; what has not changed is kept.

    :param log: where all output goes; begun anew.
    :param jobs: how many compilers may run at once.
    :param progress: called with short messages.
    :returns: the binary; it has no firmware, see ``-L``.
    :raises BadInputError: ``source`` is not a QEMU source tree.
    :raises EnvironmentFault: something needed is missing, or a step failed.
    """
    say = progress or (lambda _text: None)
    source, build_dir = source.absolute(), build_dir.absolute()
    if not (source / "configure").exists() or not (source / "hw/vfio").is_dir():
        raise BadInputError(f"{source} is not a QEMU source tree")
    needs.require(needs.QEMU, "QEMU")
    log.unlink(missing_ok=True)
    build_dir.mkdir(parents=True, exist_ok=True)
    # Kept beside the result: a build directory configured otherwise, or half, is done again.
    marker = build_dir / "configured.json"
    wanted = json.dumps([str(source), *CONFIGURE])
    if not marker.exists() or marker.read_text() != wanted:
        marker.unlink(missing_ok=True)
        python = _python_with_meson(source, build_dir, log, say)
        say("configuring")
        steps.run(
            [source / "configure", f"--python={python}", *CONFIGURE],
            cwd=build_dir,
            what=f"configuring {source}",
            log=log,
        )
        marker.write_text(wanted)
    say("compiling")

    def follow(line: str) -> None:
        # ninja's own "[12/1500] Compiling ...".
        if match := re.match(r"\[(\d+)/(\d+)\]", line):
            say(f"{match[1]} of {match[2]} steps")

    steps.run(
        ["ninja", "-C", build_dir, f"-j{jobs}", BINARY],
        what=f"building {source}",
        log=log,
        on_line=follow,
    )
    return build_dir / BINARY


def _python_with_meson(
    source: Path, build_dir: Path, log: Path, say: Callable[[str], None]
) -> Path:
    """A Python in whose environment configure finds a meson that it accepts.

    Upstream's tarball brings meson along, Debian's does not, and configure does not fetch it.
    """
    ours = Path(sys.executable)
    if any((source / "python/wheels").glob("meson-*.whl")) or _meson_version() >= OLDEST_MESON:
        return ours
    say("getting meson from PyPI")
    venv = build_dir / "meson-venv"
    steps.run([ours, "-m", "venv", "--clear", venv], what="making a Python environment", log=log)
    steps.run(
        [
            venv / "bin/pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            _meson_requirement(source),
        ],
        what="getting meson from PyPI",
        log=log,
    )
    return venv / "bin/python3"


def _meson_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in re.findall(r"\d+", version("meson"))[:2])
    except PackageNotFoundError:
        return ()


def _meson_requirement(source: Path) -> str:
    # The tree names the version that it was released with.
    with (source / "pythondeps.toml").open("rb") as file:
        pinned = tomllib.load(file).get("meson", {}).get("meson", {}).get("installed")
    return f"meson=={pinned}" if pinned else f"meson>={'.'.join(map(str, OLDEST_MESON))}"


def _do(argv: list[str | Path], culprit: Path) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr or done.stdout).strip()
        if not culprit.exists() or argv[0] == "tar":
            raise BadInputError(f"{culprit} cannot be unpacked: {why}")
        raise EnvironmentFault(f"{culprit}: {argv[0]} failed: {why}")
