# SPDX-License-Identifier: GPL-2.0-or-later
"""Something comes in between while new QEMU reads the CPR state, or too late, and nobody minds."""

from __future__ import annotations

from signal import SIGCONT, SIGSTOP

import pytest

from fixtures.bench import Survivor
from fixtures.coverage import SOUND, Coverage
from fixtures.cpr import Transfer
from fixtures.machines import CommandRefusedError

POINTS = Coverage(
    also=("msix:8",),
    mode=("cpr-transfer",),
    irq=("msix:8",),
    **SOUND,
    container=("type1",),
    iommu=("intel-iommu",),
    endpoint=("ivshmem",),
    irqchip=("full",),
    apic=("xapic",),
)


class Meddled(Transfer):
    """New QEMU stands still until what comes in between has come."""

    def meddle(self) -> None:
        raise NotImplementedError

    def _migrate(self) -> None:
        self.new.process.signal(SIGSTOP)
        super()._migrate()
        self.meddle()
        self.new.process.signal(SIGCONT)


class Twice(Meddled):
    def meddle(self) -> None:
        with pytest.raises(CommandRefusedError, match="migration process in progress"):
            self._send()


class CutOff(Meddled):
    def meddle(self) -> None:
        self.old.reconnect()
        self._mark = 0


class Cancelled(Transfer):
    """It is cancelled when it has completed."""

    def _handover(self) -> None:
        super()._handover()
        self.old.monitor.execute("migrate_cancel")
        assert self.old.monitor.execute("query-migrate")["status"] == "completed"


def expect_taken_over(survivor: Survivor, choreography: type[Transfer]) -> None:
    with survivor.rig() as rig:
        rig.begin()
        rig.mask(*rig.vectors[::2])
        rig.fire(*rig.vectors[::2])
        assert rig.take_over(choreography=choreography).old_status == "postmigrate"
        rig.check()
        rig.unmask(*rig.vectors[::2])
        rig.await_delivery(*rig.vectors[::2])
        rig.fire(*rig.vectors)
        rig.check(in_order=False)


def test_another_migration_is_refused_meanwhile(survivor: Survivor) -> None:
    expect_taken_over(survivor, Twice)


def test_the_monitor_of_old_qemu_is_left_and_connected_to_again(survivor: Survivor) -> None:
    expect_taken_over(survivor, CutOff)


def test_it_is_cancelled_when_it_has_completed(survivor: Survivor) -> None:
    expect_taken_over(survivor, Cancelled)
