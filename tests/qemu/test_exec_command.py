# SPDX-License-Identifier: GPL-2.0-or-later
"""The command of a cpr-exec is not a QEMU that can take over; the guest goes on in old QEMU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from fixtures.bench import Survivor
from fixtures.coverage import SOUND, Coverage
from fixtures.cpr import CprError, Exec
from fixtures.machines.machine import Machine
from fixtures.waiting import until

POINTS = Coverage(
    also=("msix:8,cpr-exec",),
    mode=("cpr-exec",),
    irq=("msix:8",),
    **SOUND,
    container=("type1",),
    iommu=("intel-iommu",),
    endpoint=("ivshmem",),
    irqchip=("full",),
    apic=("xapic",),
)


class Other(Machine):
    """A program instead of a QEMU."""

    program: Sequence[str]

    def command(self, incoming: Sequence[str] = ()) -> list[str]:
        del incoming
        self.argv = [*self.program]
        return self.argv


def program(*words: str) -> Callable[[Machine], Machine]:
    """A program instead of the QEMU that is to take over."""

    def instead(old: Machine) -> Machine:
        new = Other(old.host, old.spec, "new QEMU")
        new.program = words
        return new

    return instead


def expect_going_on(survivor: Survivor, successor: Callable[[Machine], Machine]) -> None:
    """Have a cpr-exec go wrong, and look; then do one."""
    with survivor.rig() as rig:
        rig.begin()
        old = rig.machine
        new = successor(old)
        rig.machines.append(new)
        with pytest.raises(CprError):
            Exec(old, new).run()
        old.alive(
            lambda: until(lambda: old.status() == "running", "old QEMU to go on", 10, pause_s=0.01)
        )
        rig.fire(*rig.vectors)
        rig.check()
        rig.take_over()
        rig.begin()
        rig.fire(*rig.vectors)
        rig.check()


def test_it_cannot_be_executed(survivor: Survivor) -> None:
    expect_going_on(survivor, program("/etc/passwd"))


def test_it_ends_at_once(survivor: Survivor) -> None:
    expect_going_on(survivor, program("/bin/false"))


def test_it_has_another_machine_type(survivor: Survivor) -> None:
    expect_going_on(survivor, lambda old: old.successor(machine="pc"))
