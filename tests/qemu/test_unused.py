# SPDX-License-Identifier: GPL-2.0-or-later
"""Half of the vectors have never been used; then new QEMU takes over."""

from __future__ import annotations

import pytest

from fixtures.bench import Bench
from fixtures.rig import TakenOver


@pytest.fixture(scope="module", params=(8, 64), ids=lambda n: f"{n}-vectors")
def taken_over(request: pytest.FixtureRequest, bench: Bench) -> TakenOver:
    rig = bench.rig(request.param, request.addfinalizer)
    rig.enable()
    used = rig.vectors[::2]
    rig.program(*used)
    rig.unmask(*used)
    rig.fire(*used)
    rig.check()
    return rig.take_over()


@pytest.mark.usefixtures("traces")
def test_unused_vectors_have_no_eventfd_in_either_qemu(taken_over: TakenOver) -> None:
    vectors = {n for name, n in taken_over.eventfds_before if name == "interrupt"}
    assert vectors == set(taken_over.rig.vectors[::2])
    assert dict(taken_over.eventfds_after) == dict(taken_over.eventfds_before)


def test_an_unused_vector_can_be_enabled_after_cpr_and_fires(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    for vector in rig.vectors[1::2]:
        rig.program(vector)
        rig.unmask(vector)
        rig.fire(vector)
    rig.check()


def test_used_vectors_fire_beside_them(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.fire(*rig.vectors[::2])
    rig.check()
