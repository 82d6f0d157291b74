# SPDX-License-Identifier: GPL-2.0-or-later
"""The root of every error this project raises on purpose.

An error carries the exit code that a command ends with when nobody handles it, so that the
meaning of an exit code is written down once:

====  =========================================================
0     good: something was verified and all of it held
1     the QEMU under test failed a verdict
2     bad usage or bad input: no such file, not a QEMU, ...
3     could not verify: no network, no space, a QEMU without CPR
130   interrupted
====  =========================================================
"""

from __future__ import annotations

__all__ = ["BadInputError", "EnvironmentFault", "SuiteError"]


class SuiteError(Exception):
    """Root of this project's errors; the text is one for people, complete in itself."""

    exit_code = 3


class BadInputError(SuiteError):
    """What the user handed in cannot be used; nothing was tried with it yet."""

    exit_code = 2


class EnvironmentFault(SuiteError):
    """This machine, or the archive behind it, cannot provide what a verdict needs."""

    exit_code = 3
