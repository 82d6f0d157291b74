# SPDX-License-Identifier: GPL-2.0-or-later
"""One of the QEMUs stands still for a while, or gets little of the CPU, and the CPR succeeds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import PurePosixPath
from signal import SIGCONT, SIGSTOP

from fixtures.bench import Survivor
from fixtures.coverage import SOUND, Coverage
from fixtures.cpr import Transfer
from fixtures.hosts import Process
from fixtures.machines.machine import Machine
from fixtures.rig import Rig

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

#: For how long it stands still, in seconds: longer than a CPR takes.
STILL_S = 1.0
#: How much the CPU prefers busy loops (nice(2)): three of four cycles, to one QEMU.
NICE = -5
BUSY = "while :; do :; done"


class Stalled(Transfer):
    """Whoever is to stand still does so while vectors fire.

    :cvar meanwhile: raises vectors; what they come to is seen once the guest is in new QEMU.
    """

    meanwhile: Callable[[], None]

    def stall(self, who: Machine) -> None:
        who.process.signal(SIGSTOP)
        self.meanwhile()
        time.sleep(STILL_S)
        who.process.signal(SIGCONT)


class NewBeforeItReads(Stalled):
    def _migrate(self) -> None:
        self.new.process.signal(SIGSTOP)
        super()._migrate()
        self.stall(self.new)


class OldWhenItHasBeenTold(Stalled):
    def _migrate(self) -> None:
        super()._migrate()
        self.stall(self.old)


class OldBeforeItSends(Stalled):
    @property
    def _incoming(self) -> str:
        return "defer"

    def _handover(self) -> None:
        self.old.process.signal(SIGSTOP)
        self.new.monitor.execute("migrate-incoming", {"uri": self._main})
        self.stall(self.old)
        super()._handover()


class NewBeforeItLoads(Stalled):
    @property
    def _incoming(self) -> str:
        return "defer"

    def _handover(self) -> None:
        self.old.process.signal(SIGSTOP)
        self.new.monitor.execute("migrate-incoming", {"uri": self._main})
        self.new.process.signal(SIGSTOP)
        self.old.process.signal(SIGCONT)
        self.stall(self.new)
        super()._handover()


def expect_taken_over(rig: Rig, choreography: type[Transfer]) -> None:
    """A CPR, and every vector is delivered exactly once, whenever it fired; one in two is masked,
    and delivered when unmasked."""
    masked = rig.vectors[::2]
    rig.begin()
    rig.mask(*masked)
    rig.fire(*masked[::2])

    def meanwhile() -> None:
        rig.model.stop()
        rig.raise_blindly(*rig.vectors)

    both = {"meanwhile": staticmethod(meanwhile)}
    rig.take_over(choreography=type("Meanwhile", (choreography,), both))
    if rig.model.stopped:
        rig.model.cont()
    rig.await_delivery(*rig.model.delivered)
    rig.check(in_order=False)
    rig.begin()
    rig.unmask(*masked)
    rig.await_delivery(*rig.model.delivered)
    rig.fire(*rig.vectors)
    rig.check(in_order=False)


def test_new_qemu_stands_still_before_it_reads_the_cpr_state(survivor: Survivor) -> None:
    with survivor.rig() as rig:
        expect_taken_over(rig, NewBeforeItReads)


def test_old_qemu_stands_still_when_it_has_been_told_to_migrate(survivor: Survivor) -> None:
    with survivor.rig() as rig:
        expect_taken_over(rig, OldWhenItHasBeenTold)


def test_old_qemu_stands_still_before_it_sends_the_devices(survivor: Survivor) -> None:
    with survivor.rig() as rig:
        expect_taken_over(rig, OldBeforeItSends)


def test_new_qemu_stands_still_before_it_loads_the_devices(survivor: Survivor) -> None:
    with survivor.rig() as rig:
        expect_taken_over(rig, NewBeforeItLoads)


def test_the_cpu_is_busy_with_something_that_is_preferred(survivor: Survivor) -> None:
    with survivor.rig() as rig:
        host = rig.machine.host
        began = time.monotonic()
        loop = host.spawn(["sh", "-c", BUSY], log=PurePosixPath("/dev/null"))
        try:
            host.run(f"renice -n {NICE} {loop.pid}")
            expect_taken_over(rig, Transfer)
            took = time.monotonic() - began
            assert cpu_s(rig.machine, loop) > took / 4, "the loop was not preferred"
        finally:
            loop.kill()


def cpu_s(machine: Machine, process: Process) -> float:
    """The CPU time that a process has had (proc(5): utime, in ticks of 10 ms)."""
    stat = machine.host.run(f"cat /proc/{process.pid}/stat").out
    return int(stat.rpartition(")")[2].split()[11]) / 100
