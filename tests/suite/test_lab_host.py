# SPDX-License-Identifier: GPL-2.0-or-later
"""The nested lab host: its devices, and that its loss is seen and made good.

The verbs that it shares with this machine are in test_hosts.py.  One lab host serves all.
"""

from __future__ import annotations

import dataclasses
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import asyncssh
import pytest

from fixtures.bench import POINTS, LabBench, equipment
from fixtures.endpoints import IvshmemDoorbell
from fixtures.guests import Op
from fixtures.guests.pci import MSIX_CAPABILITY
from fixtures.guests.probe import Verb
from fixtures.hosts import (
    CommandError,
    Host,
    HostLostError,
    LabHost,
    LocalHost,
    PciDevice,
    SshHost,
    nested,
)
from fixtures.matrix import Point
from fixtures.rig import Rig
from fixtures.subject import Subject
from fixtures.waiting import until
from images.errors import EnvironmentFault

pytestmark = pytest.mark.xdist_group("lab host")

Login = dict[str, Any]


def test_it_has_what_a_verdict_needs(lab: LabHost) -> None:
    facts = lab.facts()
    assert facts["interrupt remapping"] == "yes"
    assert facts["iommu"] == "dmar0"
    assert facts["kernel"] == lab.images.kernel_version
    assert lab.run("ls /dev/kvm /dev/vfio/vfio; cat /sys/module/kvm_amd/parameters/npt").out


#: At F000:0000: protected mode, flat, with a gate for INT3 that leads to an IRET; INT3; a load from
#: 0xfed00000, the HPET; and isa-debug-exit is written to.
TRAPPED = bytes.fromhex(
    "2e660f011638002e660f011e3e00b801000f01f066ea1c000f00080066b810008ed88ed0bc00700000cca10000d0"
    "feb01066ba0105eef4cf170044000f001f005c000f000000000000000000ffff0000009bcf00ffff00000093cf00"
    "00000000000000000000000000000000000000000000000037000800008e0f00"
)
RESET = bytes.fromhex("ea000000f0")  # a jump there


def test_a_guest_may_access_mmio_for_the_first_time_after_an_interrupt(lab: LabHost) -> None:
    """See images/kernel-svm.patch; Debian's kernel stops it."""
    if "built" not in lab.images.kernel_version:
        pytest.skip("Debian's kernel has no patch")
    code = TRAPPED.ljust(0xFFF0, b"\xf4") + RESET.ljust(16, b"\xf4")
    rom = lab.scratch / "trapped.rom"
    lab.put(rom, code)
    qemu = nested.SYSROOT.qemu(
        *("-machine", "q35,accel=kvm", "-cpu", "host", "-m", "16", "-nodefaults"),
        *("-display", "none", "-bios", str(rom), "-device", "isa-debug-exit"),
    )
    done = lab.run(["timeout", "20", *qemu], check=False)
    assert done.status == (0x10 << 1 | 1), done.err


# Its devices


@pytest.fixture
def device(lab: LabHost) -> PciDevice:
    return lab.device("ivshmem-msix8-bus")


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_each_endpoint_is_found_by_its_name(lab: LabHost, point: Point) -> None:
    config = lab.device(equipment(point)).config()
    assert struct.unpack_from("<HH", config) == IvshmemDoorbell.PCI_ID
    at = config[0x34]
    while config[at] != MSIX_CAPABILITY:
        at = config[at + 1]
    assert (struct.unpack_from("<H", config, at + 2)[0] & 0x7FF) + 1 == point.vectors


def driver_of(device: PciDevice) -> str:
    return device.host.run(f"basename $(readlink {device.sysfs}/driver || echo none)").out.strip()


def test_a_device_is_bound_and_restored(device: PciDevice) -> None:
    device.restore()
    before = driver_of(device)
    device.bind()
    assert driver_of(device) == "vfio-pci"
    assert device.iommu_group.isdigit()
    assert device.host.run(f"test -c /dev/vfio/{device.iommu_group}").status == 0
    assert "bus" in device.reset_methods
    device.bind()
    assert driver_of(device) == "vfio-pci"
    device.restore()
    assert driver_of(device) == "vfio-pci" == before or driver_of(device) == "none"
    device.bind()


def test_a_driver_that_does_not_take_a_device_is_told(device: PciDevice) -> None:
    with pytest.raises(CommandError, match="virtio-pci did not take the device"):
        device.bind("virtio-pci")
    device.bind()


def test_a_device_that_is_not_there_is_told(lab: LabHost) -> None:
    with pytest.raises(CommandError, match="0000:ff:00"):
        PciDevice(lab, "0000:ff:00.0").bind()


def test_no_vector_is_served_before_somebody_asks_for_it(device: PciDevice) -> None:
    assert device.interrupts() == {}


def test_interrupts_are_read_from_the_kernels_table(device: PciDevice) -> None:
    table = (
        "           CPU0       CPU1\n"
        "  0:         33          1   IO-APIC    2-edge      timer\n"
        f" 40:          5         10   IR-PCI-MSIX-{device.address}    0-edge"
        f"      vfio-msix[0]({device.address})\n"
        f" 41:          0          1   IR-PCI-MSIX-{device.address}   63-edge"
        f"      vfio-msix[63]({device.address})\n"
        " 42:          7          7   IR-PCI-MSIX-0000:ff:00.0    0-edge"
        "      vfio-msix[0](0000:ff:00.0)\n"
        "NMI:          0          0   Non-maskable interrupts\n"
    )

    class Told(LocalHost):
        def __init__(self) -> None:
            pass

        def read(self, path: PurePosixPath, _offset: int = 0, _size: int | None = None) -> bytes:
            assert path == PurePosixPath("/proc/interrupts")
            return table.encode()

    assert PciDevice(Told(), device.address).interrupts() == {0: 15, 63: 1}


def test_the_hardware_tells_what_is_written_to_a_device(lab: LabHost, device: PciDevice) -> None:
    _, mark = lab.config_writes(device.address)
    assert lab.config_writes(device.address, mark)[0] == []
    other = lab.device("ivshmem-msix64-bus")
    for target, value in ((device, r"\053"), (other, r"\054")):
        lab.run(f"printf '{value}' | dd of={target.sysfs}/config bs=1 seek=60 conv=notrunc")
    written, _ = lab.config_writes(device.address, mark)
    assert [line for line in written if "@0x3c <- 0x2b" in line]
    assert not [line for line in written if "0x2c" in line], "that was the other device"


# Who may connect, and to whom


def test_a_host_that_shows_another_key_is_not_talked_to(login: Login) -> None:
    stranger = asyncssh.generate_private_key("ssh-ed25519").convert_to_public()
    with pytest.raises(EnvironmentFault, match=r"no SSH connection to root@.*[Hh]ost key"):
        SshHost("a lab host", **{**login, "known_hosts": ([stranger], [], [])})


def test_a_key_that_is_not_admitted_is_told(login: Login) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    with pytest.raises(EnvironmentFault, match=r"no SSH connection to root@.*[Pp]ermission"):
        SshHost("a lab host", **{**login, "client_keys": [key]})


@pytest.fixture
def silent() -> Any:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_host_that_says_nothing_has_a_deadline(login: Login, silent: int) -> None:
    with pytest.raises(EnvironmentFault, match=r"waited 0\.2 s for an SSH connection"):
        SshHost("a lab host", **{**login, "port": silent, "deadline_s": 0.2})


def test_a_port_that_nobody_listens_on_is_told(login: Login) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(EnvironmentFault, match=rf"root@127\.0\.0\.1:{port}: .*[Cc]onne"):
        SshHost("a lab host", **{**login, "port": port})


# Its loss


@pytest.fixture
def again(login: Login) -> Any:
    """A second connection, to be lost."""
    host = SshHost("the lab host again", **login)
    yield host
    host.close()


VERBS: dict[str, Callable[[Host], object]] = {
    "run": lambda host: host.run("true"),
    "spawn": lambda host: host.spawn(["true"], log=PurePosixPath("/tmp/log")),
    "read": lambda host: host.read(PurePosixPath("/proc/version")),
    "read memory": lambda host: host.read(host.memory / "file"),
    "write": lambda host: host.write(host.memory / "file", (0, b"x")),
    "put": lambda host: host.put(host.scratch / "file", b"x"),
    "remove": lambda host: host.remove(host.scratch / "file"),
    "connect": lambda host: host.connect(host.scratch / "socket"),
    "facts": lambda host: host.facts(),
}


def test_every_verb_says_that_the_connection_is_lost(again: SshHost) -> None:
    again.put(again.memory / "file", b"open already")
    again.read(again.memory / "file")
    again._connection.abort()
    for name, verb in VERBS.items():
        with pytest.raises(Exception, match=r".") as caught:
            verb(again)
        assert isinstance(caught.value, HostLostError), f"{name}: {caught.value!r}"
        assert str(caught.value).startswith("the lab host again: ")


def test_a_command_whose_host_is_lost_has_not_ended_by_itself(again: SshHost) -> None:
    with pytest.raises(HostLostError, match=r"the lab host again: `kill .*"):
        again.run("kill -9 $PPID; sleep 600", check=False)


def test_a_program_on_a_lost_host_is_not_waited_for(again: SshHost) -> None:
    process = again.spawn(["sleep", "600"], log=again.scratch / "log")
    again._connection.abort()
    assert process.wait(10) != 0


def test_descriptors_do_not_go_over_ssh(lab: LabHost) -> None:
    with pytest.raises(ValueError, match="over SSH"):
        lab.spawn(["true"], log=lab.scratch / "log", pass_fds=[0])


def test_a_lab_host_that_hangs_is_lost_at_the_deadline(lab: LabHost) -> None:
    lab.process.signal(signal.SIGSTOP)
    try:
        with pytest.raises(HostLostError, match=r"`echo well`.*waited 0\.3 s"):
            lab.run("echo well", deadline_s=0.3)
    finally:
        lab.process.signal(signal.SIGCONT)
    assert lab.run("echo well").out == "well\n"


# Its memory


@pytest.fixture(params=["type1", "iommufd"])
def rig(request: pytest.FixtureRequest, lab_bench: LabBench) -> Rig:
    bars = {"type1": "mmap", "iommufd": "trap"}[request.param]
    point = Point(container=request.param, bars=bars)
    if reason := lab_bench.lacks(point):
        pytest.skip(reason)
    return lab_bench.rig(point, request.addfinalizer)


#: In guest RAM, where the probe guest has nothing, across the end of a page.
PLACE, CONTENT = 0x60FFA, b"0123456789"


def test_what_is_written_to_shared_guest_ram_is_read_from_its_file(rig: Rig, lab: LabHost) -> None:
    ram = rig.machine.spec.ram
    lab.write(ram, (PLACE, CONTENT))
    assert SshHost.read(lab, ram, PLACE, len(CONTENT)) == CONTENT


def test_what_is_written_to_the_file_of_shared_guest_ram_is_read(rig: Rig, lab: LabHost) -> None:
    ram = rig.machine.spec.ram
    SshHost.write(lab, ram, (PLACE, CONTENT[::-1]))
    assert lab.read(ram, PLACE, len(CONTENT)) == CONTENT[::-1]


def test_shared_guest_ram_is_read_without_the_host(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.take_over()  # it is the same afterwards
    loops = rig.guest.look().loops
    monkeypatch.setattr(nested, "SIGN_OF_LIFE_S", 60)
    monkeypatch.setattr(SshHost, "_verb", None)
    assert rig.guest.look().loops >= loops
    until(lambda: rig.guest.look().loops > loops, "the guest to go on", 10)


def test_a_hanging_host_is_lost_also_to_those_who_read_its_memory(
    rig: Rig, lab: LabHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nested, "SIGN_DEADLINE_S", 0.3)
    began = time.monotonic()
    lab.process.signal(signal.SIGSTOP)
    threads = Path(f"/proc/{lab.process.pid}/task")
    until(
        lambda: all(") T " in stat.read_text() for stat in threads.glob("*/stat")),
        "all of the lab host to stop",
        10,
    )
    try:
        with pytest.raises(HostLostError, match=r"a sign of life: waited 0\.3 s"):
            rig.guest.batch([Op(Verb.NOP)])
    finally:
        lab.process.signal(signal.SIGCONT)
    assert time.monotonic() - began < 10
    assert lab.run("echo well").out == "well\n"


# Its IOMMU


@pytest.mark.parametrize(
    ("iommu", "remaps"), [("intel-iommu", "yes"), ("amd-iommu", "yes"), ("virtio-iommu", "no")]
)
def test_each_iommu_isolates_a_served_device_and_says_whether_it_remaps(
    subject: Subject, iommu: str, remaps: str
) -> None:
    points = [Point.parse(f"msix:8,vfio-user,{iommu}")]
    bench = LabBench(subject, points)
    try:
        lab = bench.lab_with(iommu)
        assert lab.facts()["interrupt remapping"] == remaps
        device = lab.device(equipment(points[0]))
        device.bind()
        assert device.iommu_group.isdigit()
        assert lab.run(f"ls {device.sysfs}/iommu_group/devices").out.split() == [device.address]
    finally:
        bench.close()


# A lab host that does not come up


@pytest.fixture
def hosts_made(monkeypatch: pytest.MonkeyPatch) -> list[LocalHost]:
    """This machine, as often as a lab host makes it a host of its own."""
    made: list[LocalHost] = []

    def make() -> LocalHost:
        made.append(LocalHost())
        return made[-1]

    monkeypatch.setattr(nested, "LocalHost", make)
    return made


def test_a_lab_host_whose_qemu_does_not_start_is_told_in_qemus_words(
    subject: Subject,
    hosts_made: list[LocalHost],
    local: LocalHost,
    left_of: Callable[[Host, str], str],
) -> None:
    images = dataclasses.replace(subject.images, kernel=Path("/no/such/vmlinuz"))
    with pytest.raises(EnvironmentFault, match=r"(?s)did not come up: .*/no/such/vmlinuz"):
        LabHost(images, {"msix1": IvshmemDoorbell(1)})
    assert left_of(local, hosts_made[0].token) == ""


def test_a_lab_host_that_does_not_come_up_in_time_shows_its_console(
    subject: Subject,
    hosts_made: list[LocalHost],
    local: LocalHost,
    left_of: Callable[[Host, str], str],
) -> None:
    with pytest.raises(EnvironmentFault, match=r"(?s)did not come up: waited 0\.5 s .*console"):
        LabHost(subject.images, {}, boot_deadline_s=0.5)
    assert left_of(local, hosts_made[0].token) == ""


def test_a_lab_host_that_does_not_come_up_is_booted_once_more_and_that_is_told(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    boots: list[str] = []

    def fail(_self: LabHost, *_: object, iommu: str) -> None:
        boots.append(iommu)
        raise EnvironmentFault("the lab host did not come up: the timer is late")

    monkeypatch.setattr(LabHost, "__init__", fail)
    bench = LabBench(subject)
    with pytest.raises(EnvironmentFault, match="the timer is late"):
        bench.lab_with("amd-iommu")
    assert boots == ["amd-iommu"] * 2
    assert bench.incidents == [
        "a lab host was booted once more: the lab host did not come up: the timer is late"
    ]


# Last, as it costs a boot.


@pytest.fixture
def late_sshd(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The next lab host's sshd does not listen yet when it is first asked."""
    asked: list[str] = []
    connect = SshHost.__init__

    def refused_once(self: SshHost, name: str, **options: Any) -> None:
        asked.append(name)
        if len(asked) == 1:
            raise EnvironmentFault(f"{name}: reset") from ConnectionResetError()
        connect(self, name, **options)

    monkeypatch.setattr(SshHost, "__init__", refused_once)
    return asked


def test_the_memory_of_a_process_that_crashed_is_where_the_host_says(lab: LabHost) -> None:
    process = lab.spawn(["sleep", "100"], log=lab.scratch / "sleep.log")
    process.signal(11)
    assert process.wait(20) == -11
    core = lab.core(process.pid)
    assert lab.read(core, 0, 4) == b"\x7fELF"
    lab.remove(core)


def test_a_lab_host_that_dies_is_lost_and_the_bench_gives_another(
    lab: LabHost,
    lab_bench: LabBench,
    local: LocalHost,
    left_of: Callable[[Host, str], str],
    late_sshd: list[str],
) -> None:
    lab_bench.incidents.clear()
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    assert lab_bench.lost() is None
    lab.process.kill()
    with pytest.raises(HostLostError):
        lab.run("echo well", deadline_s=20)
    assert str(lab_bench.lost()).startswith("lab host (intel-iommu): ")
    other = lab_bench.lab
    assert other is not lab
    assert len(late_sshd) == 2
    assert lab_bench.incidents == ["a lab host was restarted: it did not answer before a test"]
    until(lambda: left_of(local, lab.local.token) == "", "the guardian", 20, pause_s=0.02)
    assert other.run("echo well").out == "well\n"
    assert lab_bench.lab is other, "it is kept while it is well"
    after = {path.name for path in Path("/proc/self/fd").iterdir()}
    assert len(after - before) < max(point.vectors for point in POINTS), (
        "the first one's eventfds are given back"
    )
