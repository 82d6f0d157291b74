# SPDX-License-Identifier: GPL-2.0-or-later
"""The device is a vfio-user server; a cpr-reboot is refused while the guest runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fixtures.cpr import CprError, Reboot, Step
from fixtures.direct import DirectBench, described
from fixtures.rig import Rig


@dataclass(frozen=True)
class Attempt:
    """A CPR of a guest that does not sleep, and why there was none."""

    rig: Rig
    refused: CprError | None


@pytest.fixture(scope="module", params=(8,), ids=lambda n: f"{n}-vectors")
def attempt(request: pytest.FixtureRequest, direct_bench: DirectBench) -> Attempt:
    rig = direct_bench.rig(described(request.param), request.addfinalizer, pba=False)
    rig.use_all()
    refused = None
    try:
        Reboot(rig.machine).save()
    except CprError as error:
        refused = error
    return Attempt(rig, refused)


def test_it_is_refused_before_the_guest_stops(attempt: Attempt) -> None:
    assert attempt.refused, "not refused: old QEMU has written the guest's state, and ended"
    assert attempt.refused.step is Step.MIGRATE
    assert not attempt.rig.machine.monitor.seen("STOP")


def test_the_guest_goes_on_and_every_vector_fires(attempt: Attempt) -> None:
    rig = attempt.rig
    rig.begin()
    rig.fire(*rig.vectors)
    rig.check()
