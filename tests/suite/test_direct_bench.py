# SPDX-License-Identifier: GPL-2.0-or-later
"""What rigs without a lab host need of this machine."""

from __future__ import annotations

import subprocess
import sys

ASK = """
import resource
from fixtures.direct import _allow_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, {limits})
_allow_descriptors(2048)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 2048 + 200)
"""


def asked(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
    """2048 vectors, in a process with these limits."""
    script = ASK.format(limits=(soft, hard))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_descriptors_for_2048_vectors_are_allowed_where_the_machine_lets_us() -> None:
    assert asked(1024, 4096).stdout == "True\n"


def test_a_machine_that_has_too_few_descriptors_is_told() -> None:
    done = asked(1024, 2048)
    assert "EnvironmentFault: 2048 vectors need" in done.stderr
    assert "this machine allows 2048 (ulimit -Hn)" in done.stderr
