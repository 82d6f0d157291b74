# SPDX-License-Identifier: GPL-2.0-or-later
"""What the verdict tests share."""

from __future__ import annotations

import pytest

from fixtures.bench import LabBench, Survivor
from fixtures.endpoints.vfio_user import VfioUserEndpoint
from fixtures.matrix import Point
from fixtures.rig import Rig
from fixtures.subject import Subject


@pytest.fixture(autouse=True)
def _each_behaviour_counts_for_itself(request: pytest.FixtureRequest) -> None:
    """Deliveries are counted from the start of each test: one failure does not cause more.

    So a test that is to see what its scene has raised gets that by a fixture of another name.
    """
    if "taken_over" in request.fixturenames:
        request.getfixturevalue("taken_over").rig.begin()
    elif "rig" in request.fixturenames:
        request.getfixturevalue("rig").begin()


@pytest.fixture
def endpoint(rig: Rig) -> VfioUserEndpoint:
    """The server behind the device of a rig that was set up without a lab host."""
    assert isinstance(rig.endpoint, VfioUserEndpoint)
    return rig.endpoint


@pytest.fixture(scope="module")
def survivor(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Survivor:
    """What to try on that a QEMU may not survive."""
    return Survivor(bench, point, request.addfinalizer)


@pytest.fixture
def same_build(subject: Subject) -> None:
    """Old QEMU and new QEMU are of one build, which holds the same things in the same way."""
    if subject.successor:
        pytest.skip("another build of QEMU holds other descriptors of its own")


@pytest.fixture
def traces(subject: Subject) -> None:
    """QEMU's own account of what it did; without it, its silence would prove nothing."""
    if not subject.capabilities.log_trace:
        pytest.skip("this QEMU writes no traces to its log (--enable-trace-backends=log)")
