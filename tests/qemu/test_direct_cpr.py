# SPDX-License-Identifier: GPL-2.0-or-later
"""The device is a vfio-user server; a CPR is refused while the guest runs, or preserves it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fixtures.cpr import CprError
from fixtures.direct import DirectBench, described
from fixtures.endpoints.vfio_user import Irq, VfioUserEndpoint
from fixtures.endpoints.vfio_user.witness import ConfigWritten, WasReset
from fixtures.oracle.observation import Observation, expect_same
from fixtures.rig import Rig
from fixtures.waiting import until


@dataclass(frozen=True)
class Attempt:
    """A CPR, and what came of it.

    :ivar mark: where the endpoint's account was before it.
    :ivar before: what the guest saw of the function before it.
    :ivar after: the same afterwards, in whichever QEMU the guest is in then.
    :ivar refused: why there was none.
    """

    rig: Rig
    endpoint: VfioUserEndpoint
    mark: int
    before: Observation
    after: Observation
    refused: CprError | None


@pytest.fixture(scope="module", params=(8,), ids=lambda n: f"{n}-vectors")
def attempt(request: pytest.FixtureRequest, direct_bench: DirectBench) -> Attempt:
    rig = direct_bench.rig(described(request.param), request.addfinalizer)
    rig.enable()
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.check()
    before = rig.observe()
    endpoint = rig.endpoint
    assert isinstance(endpoint, VfioUserEndpoint)
    mark, refused = endpoint.witness.mark(), None
    try:
        rig.take_over()
    except CprError as error:
        refused = error
    # Until the server has seen old QEMU go, it knows of the vectors that were old QEMU's.
    until(lambda: len(endpoint.clients) == 1, "the other QEMU to be gone", 10, pause_s=0.005)
    return Attempt(rig, endpoint, mark, before, rig.observe(), refused)


def test_cpr_is_refused_before_the_guest_stops_or_the_device_is_carried_over(
    attempt: Attempt,
) -> None:
    assert attempt.rig.machine.status() == "running"
    if attempt.refused:
        stopped = attempt.rig.machines[0].monitor.seen("STOP")
        assert not stopped, f"refused too late, the guest had been stopped: {attempt.refused}"
    else:
        armed = attempt.endpoint.armed()
        assert armed == (Irq.MSIX, frozenset(attempt.rig.vectors)), (
            f"not refused, and of the device's vectors the server knows of {armed}"
        )


def test_config_space_is_the_same(attempt: Attempt) -> None:
    expect_same("configuration space", attempt.before.config, attempt.after.config)


def test_msix_table_is_the_same(attempt: Attempt) -> None:
    expect_same("the MSI-X table", attempt.before.table, attempt.after.table, 16)


def test_the_device_is_not_reset(attempt: Attempt) -> None:
    assert attempt.endpoint.witness.since(attempt.mark, WasReset) == []


def test_configuration_space_is_not_written(attempt: Attempt) -> None:
    assert attempt.endpoint.witness.since(attempt.mark, ConfigWritten) == []


def test_every_vector_fires(attempt: Attempt) -> None:
    rig = attempt.rig
    rig.begin()
    rig.fire(*rig.vectors)
    rig.check()
