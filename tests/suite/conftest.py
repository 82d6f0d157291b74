# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of our own code share: hosts, and QEMUs of this machine under TCG."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import asyncssh
import pytest

from fixtures.bench import LabBench
from fixtures.endpoints import IvshmemDoorbell
from fixtures.guests import MsixFunction, ProbeGuest
from fixtures.hosts import Host, LabHost, LocalHost, SshHost
from fixtures.hosts.base import TOKEN
from fixtures.machines import Machine, MachineSpec
from fixtures.subject import Subject
from images.assets import PackagedQemu, Probe
from images.cache import Cache
from images.sysroot import Sysroot

#: Both kinds of host.  A lab host is worth sharing: one worker gets all tests that use it.
ON_LAB = pytest.mark.xdist_group("lab host")
HOSTS = ["this machine", pytest.param("a lab host", marks=ON_LAB)]


@pytest.fixture(scope="session", autouse=True)
def heeded_signals() -> None:
    """What tests start is ended by Ctrl-C and the like, also where we were told to ignore them:
    as what runs in the background or under nohup is."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def local() -> Iterator[LocalHost]:
    """This machine."""
    host = LocalHost()
    yield host
    host.close()


@pytest.fixture(scope="session")
def lab_bench(subject: Subject) -> Iterator[LabBench]:
    """A bench of our own: the verdict's one must not see what is done here to a lab host."""
    bench = LabBench(subject)
    yield bench
    bench.close()


@pytest.fixture
def lab(lab_bench: LabBench) -> LabHost:
    """A lab host; the same for all tests as long as it is well."""
    return lab_bench.lab


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Host:
    """A host of each kind."""
    name = {"this machine": "local", "a lab host": "lab"}[request.param]
    return request.getfixturevalue(name)  # type: ignore[no-any-return]


@pytest.fixture
def login(lab: LabHost) -> dict[str, Any]:
    """How to connect to the lab host once more, as the arguments of `SshHost`."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    public = key.export_public_key().decode().strip()
    lab.run(f"echo '{public}' >> /run/ssh/authorized_keys")
    theirs = asyncssh.read_private_key(Path(lab.local.scratch) / "host_key")
    address, port = lab._connection.get_extra_info("peername")[:2]
    return {
        "host": address,
        "port": port,
        "username": "root",
        "client_keys": [key],
        "known_hosts": ([theirs.convert_to_public()], [], []),
        "deadline_s": 60.0,
    }


@pytest.fixture
def second(host: Host, request: pytest.FixtureRequest) -> Iterator[Host]:
    """A second run's access to the same host, to be ended in any way."""
    if isinstance(host, LocalHost):
        other: Host = LocalHost()
    else:
        other = SshHost("the lab host again", **request.getfixturevalue("login"))
    yield other
    other.close()


@pytest.fixture
def left_of() -> Callable[[Host, str], str]:
    """What a host still has of the run with a token: processes and directories."""

    def look(host: Host, token: str) -> str:
        return host.run(
            f"grep -ls {TOKEN}={token} /proc/[0-9]*/environ; "
            f"ls -d /tmp/vfio-cpr-{token} /dev/shm/vfio-cpr-{token} 2> /dev/null",
            check=False,
        ).out

    return look


@pytest.fixture(scope="session")
def packaged(cache: Cache) -> Sysroot:
    """The packaged QEMU, on this machine."""
    return Sysroot(cache.ensure(PackagedQemu()) / "tree")


@pytest.fixture(scope="module")
def a_machine(
    local: LocalHost, packaged: Sysroot, cache: Cache
) -> Iterator[Callable[..., Machine]]:
    """Makes machines on this machine: TCG, the probe guest, no device but those named."""
    rom = PurePosixPath(cache.ensure(Probe()) / "probe.bin")
    machines = []

    def make(*devices: str) -> Machine:
        ram = local.memory / f"{secrets.token_hex(4)}.ram"
        spec = MachineSpec(packaged, rom, ram, devices=devices, accel="tcg", cpu="max", ram_mb=8)
        machines.append(Machine(local, spec, "old QEMU"))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()
        Path(machine.spec.ram).unlink(missing_ok=True)


#: Old QEMU, and its guest.
OldQemu = tuple[Machine, ProbeGuest]


@pytest.fixture
def old(a_machine: Callable[..., Machine]) -> OldQemu:
    """Old QEMU, and its guest, which runs."""
    machine = a_machine()
    machine.start()
    guest = ProbeGuest(machine.host, machine.spec.ram, machine.died)
    machine.alive(guest.wait_ready)
    return machine, guest


@dataclass
class Plugged:
    """A machine whose guest sees an ivshmem endpoint of ours: in QEMU itself, without VFIO."""

    machine: Machine
    endpoint: IvshmemDoorbell
    guest: ProbeGuest
    SLOT = 4

    def function(self) -> MsixFunction:
        """The endpoint as the guest's driver finds it: disabled, all masked, none pending."""
        function = MsixFunction(self.guest, self.SLOT)
        everything = range(function.size)
        function.program(*everything)
        function.set_control(enable=True, function_mask=False)
        function.set_mask(False, *everything)
        function.set_mask(True, *everything)
        function.set_control(enable=False, function_mask=False)
        return function


@pytest.fixture(scope="module")
def plugged(a_machine: Callable[..., Machine]) -> Iterator[Callable[..., Plugged]]:
    """Makes machines with an endpoint of so many vectors, and devices; the guest is ready."""
    endpoints = []

    def make(vectors: int, *devices: str) -> Plugged:
        machine = a_machine(*devices)
        endpoint = IvshmemDoorbell(vectors)
        endpoints.append(endpoint)
        with endpoint.attach() as stream:
            machine.argv = machine.spec.qemu.qemu(
                *machine.spec.arguments(),
                *("-qmp", f"unix:{machine.qmp_path},server=on,wait=off"),
                *endpoint.qemu_args("msix", stream.fileno(), f"pcie.0,addr={Plugged.SLOT}"),
            )
            machine._process = machine.host.spawn(
                machine.argv, log=machine.log_path, pass_fds=[stream.fileno()]
            )
        guest = ProbeGuest(machine.host, machine.spec.ram, machine.died)
        machine.alive(guest.wait_ready)
        return Plugged(machine, endpoint, guest)

    yield make
    for endpoint in endpoints:
        endpoint.close()
