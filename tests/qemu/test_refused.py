# SPDX-License-Identifier: GPL-2.0-or-later
"""A CPR that cannot be is refused with an error, and the guest does not notice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest

from fixtures.bench import Survivor
from fixtures.coverage import SOUND, Coverage
from fixtures.machines import CommandRefusedError

POINTS = Coverage(
    also=("msix:8", "iommufd,bars=trap"),
    mode=("cpr-transfer",),
    irq=("msix:8",),
    **SOUND,
    iommu=("intel-iommu",),
    endpoint=("ivshmem",),
    irqchip=("full",),
    apic=("xapic",),
)


def channel(kind: str, path: str = "/nobody", **address: object) -> Mapping[str, object]:
    place = address or {"transport": "socket", "type": "unix", "path": path}
    return {"channel-type": kind, "addr": place}


MAIN, CPR = channel("main"), channel("cpr")


def expect_refused(
    survivor: Survivor,
    *channels: Mapping[str, object],
    mode: str = "cpr-transfer",
    capabilities: Sequence[str] = ("events",),
) -> str:
    """Ask for a CPR that is refused, and see that every vector fires all the while.

    :param capabilities: what else is asked for; QEMU takes these, or it was built without them, or
        the host's kernel has not what they need.
    :returns: why the CPR is refused.
    """

    def switch(on: bool) -> None:
        states = [{"capability": name, "state": on} for name in capabilities]
        monitor.execute("migrate-set-capabilities", {"capabilities": states})

    with survivor.rig() as rig:
        rig.begin()
        monitor, mark = rig.machine.monitor, len(rig.machine.monitor.events)
        monitor.execute("migrate-set-parameters", {"mode": mode})
        try:
            switch(True)
        except CommandRefusedError as lacking:
            if re.search("not supported by host kernel|compiled without", lacking.reason):
                pytest.skip(lacking.reason)
            raise
        with pytest.raises(CommandRefusedError) as refused:
            rig.machine.alive(lambda: monitor.execute("migrate", {"channels": channels}))
        rig.fire(*rig.vectors)
        rig.check()
        assert "STOP" not in [event.name for event in monitor.events[mark:]]
        switch(False)
    return refused.value.reason


def test_without_a_cpr_channel(survivor: Survivor) -> None:
    assert "'cpr' migration channel" in expect_refused(survivor, MAIN)


def test_without_a_main_channel(survivor: Survivor) -> None:
    assert "main" in expect_refused(survivor, CPR)


def test_without_channels(survivor: Survivor) -> None:
    assert "channel" in expect_refused(survivor)


def test_with_two_main_channels(survivor: Survivor) -> None:
    assert "more than one" in expect_refused(survivor, MAIN, MAIN, CPR)


def test_with_two_cpr_channels(survivor: Survivor) -> None:
    assert "more than one" in expect_refused(survivor, MAIN, CPR, CPR)


def test_with_a_file_for_a_main_channel(survivor: Survivor) -> None:
    file = channel("main", transport="file", filename="/nobody", offset=0)
    assert "transport" in expect_refused(survivor, file, CPR)


def test_nobody_listens(survivor: Survivor) -> None:
    assert "/nobody" in expect_refused(survivor, MAIN, CPR)


def test_cpr_exec_without_a_command(survivor: Survivor) -> None:
    assert "cpr-exec-command" in expect_refused(survivor, MAIN, mode="cpr-exec")


def test_with_postcopy(survivor: Survivor) -> None:
    assert "postcopy" in expect_refused(survivor, MAIN, CPR, capabilities=["postcopy-ram"])


def test_with_a_background_snapshot(survivor: Survivor) -> None:
    said = expect_refused(survivor, MAIN, CPR, capabilities=["background-snapshot"])
    assert "snapshot" in said.lower()


def test_with_colo(survivor: Survivor) -> None:
    assert (
        "colo"
        in expect_refused(survivor, MAIN, CPR, capabilities=["return-path", "x-colo"]).lower()
    )
