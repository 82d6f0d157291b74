# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the long steps of a build: into a log, watched line by line, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from images.errors import EnvironmentFault

__all__ = ["run"]

#: How much of the log a failure quotes: enough for a compiler's error with its context.
QUOTED_LINES = 15
#: How long make and compilers get to remove their half-written files.
GRACE_S = 10


def run(
    argv: Sequence[str | Path],
    *,
    what: str,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Run ``argv`` at low priority, its output appended to ``log``.

    Whatever ends this function early ends the command with all its children, too; if this
    process is killed, the command is as well, and its children after what they are at.

    :param what: the step, as the failure's text calls it.
    :param on_line: called with each line of output, to follow the progress.
    :raises EnvironmentFault: the command failed; the text quotes the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: list[str] = []
    # Minutes of compiling must not slow down what somebody else does on this machine.
    with (
        log.open("a", buffering=1) as out,  # by lines: people follow it
        subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "nice", "-n", "10", *argv],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                out.write(line)
                tail = [*tail[1 - QUOTED_LINES :], line]
                if on_line:
                    on_line(line)
        except BaseException:
            _end_group(process)
            raise
    if process.returncode:
        raise EnvironmentFault(
            f"{what} failed ({process.returncode}); the whole log is {log}, "
            f"its end:\n{''.join(tail).rstrip()}"
        )


def _end_group(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_S)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
