# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds the lab host's kernel from Debian's source tarball and our configuration fragment.

The result depends on source, fragment and compiler only: not on who built it, when, or where.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from images import needs, steps
from images.errors import BadInputError, EnvironmentFault

__all__ = ["REQUIRES", "FragmentError", "build", "demands", "unmet"]

#: What has to be on this machine, and the Debian package that brings it.
REQUIRES: dict[str, str] = {need.name: need.package for need in needs.KERNEL}

#: How many compiled files lie between two reports.
REPORT_EVERY = 25


class FragmentError(BadInputError):
    """The configuration is not what the fragment demands; ``symbols`` are those that differ."""

    def __init__(self, symbols: list[str]) -> None:
        self.symbols = symbols
        super().__init__(
            "the kernel cannot be configured as asked; a dependency is missing or "
            f"the symbol is gone: {', '.join(symbols)}"
        )


def demands(text: str) -> dict[str, str]:
    """The symbols that a fragment or a .config speaks of, "n" for "is not set"."""
    found = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"(CONFIG_\w+)=(.*)", line.strip()):
            found[match[1]] = match[2]
        elif match := re.fullmatch(r"# (CONFIG_\w+) is not set", line.strip()):
            found[match[1]] = "n"
    return found


def unmet(fragment: str, config: str) -> list[str]:
    """What ``fragment`` demands and ``config`` does not have, as texts for people."""
    # Kconfig leaves out a symbol whose dependencies are off: it says nothing and means "n".
    actual = demands(config)
    return [
        f"{symbol}={value} (is {actual.get(symbol, 'n')})"
        for symbol, value in demands(fragment).items()
        if actual.get(symbol, "n") != value
    ]


def build(
    source_tar: Path,
    fragment: Path,
    into: Path,
    *,
    patches: Sequence[Path] = (),
    log: Path,
    jobs: int,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Build ``into/bzImage`` and its full configuration, ``into/config``.

    The source is unpacked beside ``into`` (about 2 GB) and removed again, also on failure.

    :param patches: what is changed in the source first.
    :param log: where all output goes; begun anew.
    :param jobs: how many compilers may run at once.
    :param progress: called with short messages.
    :raises FragmentError: a symbol of the fragment did not end up as demanded.
    :raises EnvironmentFault: something needed is missing, or a step failed.
    """
    say = progress or (lambda _text: None)
    needs.require(needs.KERNEL, "the kernel")
    into = into.absolute()
    if re.search(r"[\s:]", str(into.parent)):
        raise EnvironmentFault(
            f"a kernel cannot be built below {str(into.parent)!r}: its "
            "makefiles take no path with a space or a colon"
        )
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix="kernel-source-") as scratch:
        source = Path(scratch)
        say("unpacking the source")
        steps.run(
            [
                "tar",
                "-x",
                "--strip-components=1",
                "--no-same-owner",
                "-f",
                source_tar.absolute(),
                "-C",
                source,
            ],
            what=f"unpacking {source_tar}",
            log=log,
        )

        for patch in patches:
            steps.run(
                ["patch", "--batch", "--forward", "-p1", "-d", source, "-i", patch.absolute()],
                what=f"applying {patch.name} to the kernel",
                log=log,
            )

        env = _environment()
        say("configuring")
        # One pass over the fragment with everything else off.  tinyconfig would come in two,
        # its own choices (smallest allocator, slowest decompressor) winning over ours.
        steps.run(
            ["make", "-C", source, "allnoconfig"],
            what="configuring the kernel",
            log=log,
            env={**env, "KCONFIG_ALLCONFIG": str(fragment.absolute())},
        )
        config = source / ".config"
        if differing := unmet(fragment.read_text(), config.read_text()):
            raise FragmentError(differing)

        say("compiling")
        steps.run(
            ["make", "-C", source, f"-j{jobs}", "bzImage"],
            what="building the kernel",
            log=log,
            env=env,
            on_line=_Counter(say),
        )

        into.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config, into / "config")
        # The image comes last and at once: whoever finds it finds a finished build.
        shutil.copyfile(source / "arch/x86/boot/bzImage", into / "bzImage.new")
        (into / "bzImage.new").replace(into / "bzImage")
        say("cleaning up")


class _Counter:
    """Turns make's lines into "compiled n files"; nobody knows of how many."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._compiled = 0

    def __call__(self, line: str) -> None:
        if line.startswith("  CC "):
            self._compiled += 1
            if self._compiled % REPORT_EVERY == 0:
                self._say(f"compiled {self._compiled} files")
        elif re.match(r"  LD +vmlinux", line):
            self._say("linking")


def _environment() -> dict[str, str]:
    """Nothing of the caller's (ARCH, KCFLAGS, MAKEFLAGS, ...) may reach the build."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C",
        "ARCH": "x86_64",
        "KBUILD_BUILD_TIMESTAMP": "1970-01-01 00:00:00 UTC",
        "KBUILD_BUILD_USER": "vfio-cpr-suite",
        "KBUILD_BUILD_HOST": "lab",
        "KBUILD_BUILD_VERSION": "1",
        # Set and empty: do not ask the git repository that the scratch directory may lie in.
        "LOCALVERSION": "",
    }
