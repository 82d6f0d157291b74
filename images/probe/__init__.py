# SPDX-License-Identifier: GPL-2.0-or-later
"""The probe guest: a bare-metal 64 KiB ROM for ``-bios``; abi.h is its contract."""

import shlex
import subprocess
import tempfile
from pathlib import Path

_HERE = Path(__file__).parent
_SIZE = 0x10000

SOURCES: tuple[Path, ...] = tuple(
    _HERE / name for name in ("abi.h", "entry.S", "probe.c", "probe.ld")
)

# The compiler must not count on anything that no one has set up: a C library,
# a loader, an FPU, or a stack protector's canary.
_FLAGS = (
    *("-m32", "-march=i686", "-mgeneral-regs-only", "-std=gnu11", "-Os", "-Wall", "-Wextra"),
    *("-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-fno-strict-aliasing"),
    *("-fno-tree-loop-distribute-patterns", "-Wl,--oformat=binary", "-Wl,--build-id=none"),
)


class ProbeBuildError(RuntimeError):
    """The compiler was not there, failed, or made something other than a ROM."""


def build(output: Path, cc: str = "gcc") -> None:
    """Compile the probe guest and write its ROM to *output*."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix="probe-") as directory:
        rom = Path(directory, "probe.bin")
        inputs = [str(_HERE / name) for name in ("entry.S", "probe.c")]
        command = [cc, *_FLAGS, f"-Wl,-T,{_HERE / 'probe.ld'}", *inputs, "-o", str(rom)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except OSError as error:
            raise ProbeBuildError(f"{shlex.join(command)}: {error}") from error
        except subprocess.CalledProcessError as error:
            raise ProbeBuildError(f"{shlex.join(command)}:\n{error.stderr}") from error
        content = rom.read_bytes()
    if len(content) != _SIZE:
        raise ProbeBuildError(f"{shlex.join(command)}: made {len(content)} bytes, not {_SIZE}")
    output.write_bytes(content)
