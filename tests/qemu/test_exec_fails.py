# SPDX-License-Identifier: GPL-2.0-or-later
"""The command of a cpr-exec cannot be executed; the guest goes on in old QEMU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import MSIX, SOUND, Coverage
from fixtures.cpr import CprError, Exec
from fixtures.machines.machine import Machine
from fixtures.matrix import Point
from fixtures.oracle.observation import Observation, expect_same, expect_same_counts
from fixtures.rig import Held, Rig, held
from fixtures.waiting import until

POINTS = Coverage(
    mode=("cpr-exec",),
    irq=("msix:8", "msi:8", "intx"),
    **SOUND,
    iommu=("intel-iommu",),
    reset=("bus",),
    apic=("xapic",),
)


class Missing(Machine):
    """A new QEMU that is not there."""

    def command(self, incoming: Sequence[str] = ()) -> list[str]:
        del incoming
        self.argv = ["/no/such/qemu"]
        return self.argv


@dataclass(frozen=True)
class Attempt:
    """A CPR that failed, with what was seen on either side of it."""

    rig: Rig
    refused: CprError
    before: Observation
    after: Observation
    held_before: Held
    held_after: Held


@pytest.fixture(scope="module")
def attempt(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> Attempt:
    rig = bench.rig(point, request.addfinalizer)
    rig.enable()
    rig.program(*rig.vectors)
    rig.unmask(*rig.vectors)
    rig.fire(*rig.vectors)
    if point.irq in MSIX:
        rig.mask(*rig.vectors[::2])
        rig.fire(*rig.vectors[::4])
    rig.check()
    machine = rig.machine
    before, held_before = rig.observe(), held(machine)
    cpr = Exec(machine, Missing(machine.host, machine.spec, "new QEMU"))
    with pytest.raises(CprError) as caught:
        cpr.run()
    # Its notifiers have run by the time that it lets the guest go on.
    machine.alive(
        lambda: until(lambda: machine.status() == "running", "old QEMU to go on", 10, pause_s=0.01)
    )
    return Attempt(rig, caught.value, before, rig.observe(), held_before, held(machine))


def test_the_failure_is_told(attempt: Attempt) -> None:
    assert "execvp /no/such/qemu failed: No such file or directory" in str(attempt.refused)


def test_nothing_is_delivered_by_the_attempt(attempt: Attempt) -> None:
    assert attempt.after.log_count == attempt.before.log_count


def test_masks_and_pending_bits_are_the_same(attempt: Attempt) -> None:
    assert attempt.after.masked == attempt.before.masked
    assert attempt.after.pending == attempt.before.pending


def test_config_space_and_msix_table_are_the_same(attempt: Attempt) -> None:
    expect_same("configuration space", attempt.before.config, attempt.after.config)
    expect_same("the MSI-X table", attempt.before.table, attempt.after.table, 16)


def test_the_device_is_not_reset(attempt: Attempt) -> None:
    assert attempt.after.witness == attempt.before.witness != 0


def test_old_qemu_holds_as_many_descriptors_of_each_kind(attempt: Attempt) -> None:
    expect_same_counts("descriptors", attempt.held_before.counts, attempt.held_after.counts)


@pytest.mark.limits(irq=MSIX)
def test_pending_vectors_are_delivered_once_when_unmasked(attempt: Attempt) -> None:
    rig = attempt.rig
    rig.unmask(*rig.vectors)
    rig.await_delivery(*rig.vectors[::4])
    rig.check(in_order=False)


@pytest.mark.usefixtures("traces")
def test_vectors_bypass_qemu_as_before(attempt: Attempt) -> None:
    assert attempt.rig.delivered_by_qemu() == 0


def test_a_cpr_after_that_succeeds_and_every_vector_fires(attempt: Attempt) -> None:
    rig = attempt.rig
    rig.take_over()
    rig.begin()
    rig.fire(*rig.vectors)
    rig.check()
