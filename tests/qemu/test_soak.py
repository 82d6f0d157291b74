# SPDX-License-Identifier: GPL-2.0-or-later
"""CPRs in a row, storms, and random sequences, again and again, until the run is told to stop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import LIVE, MESSAGES, SOUND, Coverage
from fixtures.cpr import MODES
from fixtures.matrix import Point
from fixtures.rig import Rig
from fixtures.sequences import sequences
from fixtures.soak import Soak
from fixtures.statemachine import Plan, play
from fixtures.storm import Storm

pytestmark = pytest.mark.soak

POINTS = Coverage(
    "msix:8",
    "msi:8,cpr-exec",
    "intx",
    "msix:64,cpr-exec",
    "iommufd,bars=trap",
    **SOUND,
)

#: CPRs of one guest, of a chain and in a storm.
GENERATIONS, IN_A_STORM = 20, 3


def modes(bench: LabBench, point: Point) -> itertools.cycle[str]:
    """The modes that the QEMU has, in turn, beginning with the point's."""
    known = [mode for mode in LIVE if mode in bench.subject.capabilities.modes]
    return itertools.cycle(sorted(known, key=lambda mode: mode != point.mode))


def test_in_a_chain_of_cprs_each_vector_is_delivered_exactly_once(
    soak: Soak, bench: LabBench, point: Point
) -> None:
    def chain(seed: int) -> None:
        rig, random = soak.rig(), Random(seed)
        rig.use_all()
        for mode in itertools.islice(modes(bench, point), GENERATIONS):
            take_over_with_some_masked(rig, random, mode)
            if soak.is_over:
                return

    def take_over_with_some_masked(rig: Rig, random: Random, mode: str) -> None:
        # Known issue msi-pending-bits-fail-cpr; of INTx, there is nothing else to mask.
        masked = random.sample(rig.vectors, len(rig.vectors) // 2) if point.kind == "msix" else ()
        rig.begin()
        rig.mask(*masked)
        rig.fire(*random.sample(rig.vectors, len(rig.vectors)))
        rig.check()
        rig.take_over(choreography=MODES[mode]).expect_same()
        rig.check()
        rig.unmask(*masked)
        rig.await_delivery(*masked)
        rig.fire(*random.sample(rig.vectors, len(rig.vectors)))
        rig.check(in_order=False)

    soak.repeat(chain)


@pytest.mark.limits(irq=MESSAGES)
def test_in_a_storm_each_vector_is_delivered_exactly_once(
    soak: Soak, bench: LabBench, point: Point
) -> None:
    def storm(_seed: int) -> None:
        rig = soak.rig()
        rig.use_all()
        for mode in itertools.islice(modes(bench, point), IN_A_STORM):
            with Storm(rig):
                cpr = rig.hand_over(choreography=MODES[mode])
            cpr.leave()
            rig.await_delivery(*rig.vectors)
            rig.check(in_order=False)
            if soak.is_over:
                return

    soak.repeat(storm)


@pytest.mark.limits(irq=("msix:8", "msi:8", "intx"))
def test_a_random_sequence_is_as_the_specification_says(
    soak: Soak,
    bench: LabBench,
    point: Point,
    request: pytest.FixtureRequest,
    keep_script: Callable[[str], None],
) -> None:
    steps = request.config.getoption("statemachine_steps")
    scene = sequences(bench, point)
    soak.repeat(lambda seed: play(scene, Plan(steps, 1, seed), soak.stack.callback, keep_script))
