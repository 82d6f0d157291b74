# SPDX-License-Identifier: GPL-2.0-or-later
"""Leases: one holder, and everything is put back, however it ends.

The script that takes them runs here, on a tree that looks like /sys.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fixtures.hosts.base import TOKEN
from fixtures.labs import lease
from fixtures.labs.lease import BusyError, Granted
from fixtures.waiting import until
from images.errors import EnvironmentFault

FIRST, SECOND, OTHER = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"
IVSHMEM = "1af4:1110"


class Sys:
    """Two ivshmem devices without a driver, and an igb with one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.leases = root / "leases"
        self.unsafe = root / "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
        self.unsafe.parent.mkdir(parents=True)
        self.unsafe.write_text("N\n")
        for address, vendor, device in (
            (FIRST, "0x1af4", "0x1110"),
            (SECOND, "0x1af4", "0x1110"),
            (OTHER, "0x8086", "0x10c9"),
        ):
            at = self.device(address)
            at.mkdir(parents=True)
            (at / "vendor").write_text(f"{vendor}\n")
            (at / "device").write_text(f"{device}\n")
            (at / "driver_override").write_text("(null)\n")
        for name in ("igb", "vfio-pci"):
            (root / "sys/bus/pci/drivers" / name).mkdir(parents=True)
        self.bind(OTHER, "igb")

    def device(self, address: str) -> Path:
        return self.root / "sys/bus/pci/devices" / address

    def bind(self, address: str, driver: str, override: str = "(null)") -> None:
        link = self.device(address) / "driver"
        link.unlink(missing_ok=True)
        link.symlink_to(self.root / "sys/bus/pci/drivers" / driver)
        (self.device(address) / "driver_override").write_text(f"{override}\n")

    def asked(self, driver: str, file: str) -> str:
        """What was written to a file of a driver, where the kernel would have obeyed."""
        path = self.root / "sys/bus/pci/drivers" / driver / file
        return path.read_text() if path.exists() else ""

    def override(self, address: str) -> str:
        return (self.device(address) / "driver_override").read_text()


class Holder:
    """The host's side of a lease."""

    def __init__(
        self, sys: Sys, token: str, *devices: str, guests: int = 1, unsafe: bool = False
    ) -> None:
        command = lease.command(
            token,
            f"holder {token}",
            [(device.partition("=")[0], device.partition("=")[2] or None) for device in devices],
            guests=guests,
            unsafe=unsafe,
        )
        command = command.replace("/sys/", f"{sys.root}/sys/")
        command = command.replace(str(lease.LEASES), str(sys.leases))
        self.process = subprocess.Popen(
            ["sh", "-c", f"exec {command}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout
        self.line = self.process.stdout.readline()

    @property
    def granted(self) -> Granted:
        return lease.granted("rack3", self.line)

    def leave(self) -> None:
        """What happens when the channel closes, in whatever way."""
        assert self.process.stdin
        self.process.stdin.close()
        assert self.process.wait(30) == 0

    def kill(self) -> None:
        """As somebody on the host would, or its kernel."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def sys(tmp_path: Path) -> Sys:
    return Sys(tmp_path)


@pytest.fixture
def hold(sys: Sys) -> Iterator[Callable[..., Holder]]:
    holders = []

    def take(token: str, *devices: str, guests: int = 1, unsafe: bool = False) -> Holder:
        holders.append(Holder(sys, token, *devices, guests=guests, unsafe=unsafe))
        return holders[-1]

    yield take
    for holder in holders:
        assert holder.process.stdin
        holder.process.stdin.close()
        holder.process.wait(30)


def test_a_host_has_one_holder_at_a_time(hold: Callable[..., Holder]) -> None:
    first = hold("a", FIRST)
    assert first.granted == Granted((FIRST,))
    with pytest.raises(BusyError, match="rack3 is in use: holder a"):
        _ = hold("b", FIRST).granted
    first.leave()
    assert hold("c", FIRST).granted == Granted((FIRST,))


def test_as_many_holders_as_are_allowed_share_it(hold: Callable[..., Holder]) -> None:
    assert hold("a", IVSHMEM, guests=2).granted == Granted((FIRST,))
    assert hold("b", IVSHMEM, guests=2).granted == Granted((SECOND,))
    with pytest.raises(BusyError):
        _ = hold("c", OTHER, guests=2).granted


def test_no_device_has_two_holders(hold: Callable[..., Holder]) -> None:
    assert hold("a", FIRST, guests=3).granted == Granted((FIRST,))
    with pytest.raises(EnvironmentFault, match=rf"{FIRST} is not there, or somebody else has it"):
        _ = hold("b", FIRST, guests=3).granted
    assert hold("c", IVSHMEM, OTHER, guests=3).granted == Granted((SECOND, OTHER))


def test_a_device_that_is_not_there(hold: Callable[..., Holder]) -> None:
    with pytest.raises(EnvironmentFault, match=r"device 1234:5678 is not there"):
        _ = hold("a", "1234:5678").granted
    assert hold("b", FIRST).granted, "nothing is held by who was refused"


def test_a_lease_says_who_holds_it(sys: Sys, hold: Callable[..., Holder]) -> None:
    hold("a", FIRST, OTHER)
    assert (sys.leases / "a.lease").read_text() == f"holder a\n{FIRST}\n{OTHER}\n"


def test_what_was_not_touched_is_not_touched(sys: Sys, hold: Callable[..., Holder]) -> None:
    hold("a", FIRST, OTHER).leave()
    assert sys.asked("igb", "bind") == sys.asked("igb", "unbind") == ""
    assert [path.name for path in sys.leases.iterdir()] == ["table"]


@pytest.mark.parametrize("end", [Holder.leave, Holder.kill])
def test_devices_go_back_to_their_drivers_and_overrides(
    sys: Sys, hold: Callable[..., Holder], end: Callable[[Holder], None]
) -> None:
    sys.bind(FIRST, "igb", "igb")
    holder = hold("a", FIRST, OTHER)
    for address in (FIRST, OTHER):
        sys.bind(address, "vfio-pci", "vfio-pci")
    end(holder)
    if end is Holder.kill:  # then the next one does it
        assert sys.asked("igb", "bind") == ""
        hold("b", SECOND)
    assert sys.override(FIRST) == "igb\n"
    assert sys.override(OTHER) == "\n"
    assert sys.asked("vfio-pci", "unbind").split() == [OTHER], "the last of the two"
    assert sys.asked("igb", "bind").split() == [OTHER]
    assert not (sys.leases / "a.restore").exists()


def test_a_device_goes_to_the_driver_that_the_inventory_says(
    sys: Sys, hold: Callable[..., Holder]
) -> None:
    holder = hold("a", f"{OTHER}=e1000e")
    (sys.root / "sys/bus/pci/drivers/e1000e").mkdir()
    sys.bind(OTHER, "vfio-pci", "vfio-pci")
    holder.leave()
    assert sys.asked("e1000e", "bind").split() == [OTHER]


def test_a_device_without_a_driver_has_none_again(sys: Sys, hold: Callable[..., Holder]) -> None:
    holder = hold("a", FIRST)
    sys.bind(FIRST, "vfio-pci", "vfio-pci")
    holder.leave()
    assert sys.asked("vfio-pci", "unbind").split() == [FIRST]
    assert sys.override(FIRST) == "\n"


@pytest.mark.parametrize("end", [Holder.leave, Holder.kill])
def test_options_are_set_back_by_the_last_holder(
    sys: Sys, hold: Callable[..., Holder], end: Callable[[Holder], None]
) -> None:
    first = hold("a", FIRST, guests=2, unsafe=True)
    second = hold("b", SECOND, guests=2, unsafe=True)
    assert sys.unsafe.read_text() == "Y\n"
    end(first)
    assert sys.unsafe.read_text() == "Y\n", "another one relies on it"
    end(second)
    if end is Holder.kill:
        hold("c", SECOND, guests=2)
    assert sys.unsafe.read_text() == "N\n"


def test_options_that_nobody_wants_are_left_alone(sys: Sys, hold: Callable[..., Holder]) -> None:
    hold("a", FIRST)
    assert sys.unsafe.read_text() == "N\n"


@pytest.mark.parametrize("end", [Holder.leave, Holder.kill])
def test_what_uses_the_devices_is_ended_first(
    hold: Callable[..., Holder], end: Callable[[Holder], None]
) -> None:
    token = secrets.token_hex(8)
    holder = hold(token, FIRST)
    user = subprocess.Popen(["sleep", "600"], env={**os.environ, TOKEN: token})
    end(holder)
    assert hold("b", FIRST).granted
    assert user.wait(10) == -signal.SIGKILL


def test_the_holder_notices_that_its_master_is_killed(sys: Sys) -> None:
    """The channel's end is all that it is told, and that comes by itself."""
    reader, writer = os.pipe()
    command = lease.command("a", "holder a", [(FIRST, None)])
    command = command.replace("/sys/", f"{sys.root}/sys/")
    command = command.replace(str(lease.LEASES), str(sys.leases))
    with subprocess.Popen(["sleep", "600"], pass_fds=[writer]) as master:
        os.close(writer)
        process = subprocess.Popen(["sh", "-c", command], stdin=reader, stdout=subprocess.PIPE)
        os.close(reader)
        until((sys.leases / "a.lease").exists, "the lease", 10, pause_s=0.01)
        master.kill()
    assert process.communicate(timeout=30)
    assert not (sys.leases / "a.lease").exists()


def test_no_lease_without_the_means_for_it() -> None:
    with pytest.raises(EnvironmentFault, match=r"takes root, and flock"):
        lease.granted("rack3", "")


def test_the_script_has_no_secrets() -> None:
    """It is on a command line, which all can see there."""
    assert not re.search("key|password", lease.SCRIPT)
