# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab host that stays, and what is done on it as on any host of a lab."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.hosts.base import TOKEN
from fixtures.hosts.ssh import SshHost
from fixtures.labs import inventory
from fixtures.labs.keeper import Keeper
from fixtures.labs.lease import LEASES, BusyError
from fixtures.labs.machine import LabMachine
from fixtures.waiting import until
from images import assets
from images.cache import Cache
from images.errors import EnvironmentFault, SuiteError

ROOT = Path(__file__).parents[2]
CHEAP = "test_takeover and msix:8 and config_space and not exec"
DEVICE = "ivshmem-msix8-bus"

pytestmark = pytest.mark.xdist_group("labs")  # the lab host is one for all


class Lab:
    """An inventory, and the commands that are about it."""

    def __init__(self, cache: Cache, place: Path) -> None:
        self.place = place
        self.path = place / "lab.toml"
        self.path.write_text("# What people wrote.\n")
        self._cache = ["--cache", str(cache.root)]

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", *arguments, *self._cache]

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            cwd=self.place,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=400,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def labhost(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("fixtures.labs.labhost", *arguments, check=check)

    @property
    def host(self) -> inventory.Host:
        return inventory.load(self.path)[0]


def everything_of(directory: Path) -> list[int]:
    """The processes of the run that a directory belongs to."""
    mark = f"{TOKEN}={directory.name.removeprefix('vfio-cpr-')}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


@pytest.fixture(scope="module")
def lab(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(cache, tmp_path_factory.mktemp("lab"))
    lab.labhost("up", "lab0", "--equip", "msix:8", "--equip", "igb", "--tag", "fast")
    yield lab
    lab.labhost("down", "lab0", check=False)


def test_it_is_in_the_inventory_beside_what_people_wrote(lab: Lab) -> None:
    assert lab.path.read_text().startswith("# What people wrote.\n")
    assert lab.host.name == "lab0"
    assert lab.host.tags == ("nested", "fast")
    assert [device.name for device in lab.host.device] == [DEVICE, "igb"]
    assert " up" in lab.labhost("list").stdout


def test_its_secrets_and_its_socket_are_for_us_alone(lab: Lab) -> None:
    assert lab.host.keeper
    assert lab.host.key.stat().st_mode & 0o777 == 0o600
    assert lab.host.keeper.parent.stat().st_mode & 0o777 == 0o700


def test_another_one_of_that_name_is_refused(lab: Lab) -> None:
    done = lab.labhost("up", "lab0", check=False)
    assert done.returncode == 2
    assert "host lab0 is there already" in done.stderr


def test_its_keeper_says_what_is_wrong_and_goes_on(lab: Lab) -> None:
    assert lab.host.keeper
    keeper = Keeper(lab.host.keeper)
    for endpoint, vector in (("nothing", 0), (DEVICE, 8)):
        with pytest.raises(SuiteError, match="the keeper of the lab host"):
            keeper.fire(endpoint, vector)
    keeper.settle()
    keeper.close()


def test_a_verdict_on_it(lab: Lab) -> None:
    done = lab.run("fixtures.verify", "--inventory", "lab.toml", "-q", "-k", CHEAP)
    assert "GOOD: 1 ok" in done.stdout
    assert re.search(r"^host +lab0$", done.stdout, re.M)


@pytest.fixture
def linux(cache: Cache) -> str:
    """The name of a test with a Linux guest."""
    kernel = assets.lab_kernel(cache)
    if not isinstance(kernel, assets.BuiltKernel):
        pytest.skip("a Linux guest needs a built kernel")
    return "nothing_has_befallen and igb and transfer and not igbvf"


def test_a_guest_has_traffic_through_a_device(lab: Lab, linux: str) -> None:
    quick = "--inventory", "lab.toml", "--profile", "quick", "-q"
    both = "--group", "tests/qemu/test_takeover.py[msix:8]", "--group", "tests/qemu/test_linux.py"
    done = lab.run("fixtures.verify", *quick, *both, "-k", f"config_space or ({linux})")
    assert "GOOD: 2 ok" in done.stdout, "one bench gives the host to the other"
    with contextlib.closing(LabMachine(lab.host, [])) as machine:
        assert "10.77." not in machine.run("ip addr").out


def test_traffic_that_does_not_come_is_no_pass(lab: Lab, linux: str) -> None:
    # Of a machine that is not ours alone, whose interfaces stay where they are.
    head, *devices = lab.path.read_text().split("[[host.device]]")
    (device,) = (each for each in devices if "traffic" in each)
    other = re.sub(r"keeper = .*\n", "", head) + "[[host.device]]" + device
    other = re.sub(r'peer = "\w+"', 'peer = "lo"', other)
    (lab.place / "nowhere.toml").write_text(other)
    quick = "--inventory", "nowhere.toml", "--profile", "quick", "-q"
    done = lab.run("fixtures.verify", *quick, "-k", linux, check=False)
    assert done.returncode == 1
    assert "the guest to receive data" in done.stdout


def test_what_fires_a_device_may_be_any_command(lab: Lab) -> None:
    fire = lab.command("fixtures.labs.labhost", "fire", "lab0", DEVICE, "{vector}")
    words = ", ".join(f"'{word}'" for word in [*fire, "--inventory", str(lab.path)])
    text = lab.path.read_text()
    other = re.sub(r"(?s)\[host\.device\.fire\].*", f"fire = {{ command = [{words}] }}\n", text)
    (lab.place / "command.toml").write_text(other)
    done = lab.run("fixtures.verify", "--inventory", "command.toml", "-q", "-k", CHEAP, check=False)
    assert "GOOD: 1 ok" in done.stdout, done.stdout


def test_a_device_that_does_not_fire_is_no_pass(lab: Lab) -> None:
    text = lab.path.read_text()
    other = re.sub(
        r"(?s)\[host\.device\.fire\].*", "fire = { command = ['true', '{vector}'] }\n", text
    )
    (lab.place / "silent.toml").write_text(other)
    done = lab.run("fixtures.verify", "--inventory", "silent.toml", "-q", "-k", CHEAP, check=False)
    assert done.returncode == 1
    assert "vectors [0] were raised and are not delivered" in done.stdout


def test_a_command_that_cannot_raise_a_vector_is_no_failure_of_qemu(lab: Lab) -> None:
    text = lab.path.read_text()
    other = re.sub(
        r"(?s)\[host\.device\.fire\].*",
        "fire = { command = ['false', '{vector}'], on = 'host' }\n",
        text,
    )
    (lab.place / "broken.toml").write_text(other)
    done = lab.run("fixtures.verify", "--inventory", "broken.toml", "-q", "-k", CHEAP, check=False)
    assert done.returncode == 3
    assert "vector 0 could not be raised" in done.stdout


def test_a_host_with_another_key_is_not_spoken_to(lab: Lab) -> None:
    text = lab.path.read_text()
    known = Path(tomllib.loads(text)["host"][0]["known_hosts"]).read_text()
    (lab.place / "other_hosts").write_text(known[:-20] + "A" * 6 + known[-14:])
    (lab.place / "other.toml").write_text(
        re.sub(r'known_hosts = ".*"', 'known_hosts = "other_hosts"', text)
    )
    with pytest.raises(EnvironmentFault, match="Host key is not trusted"):
        LabMachine(inventory.load(lab.place / "other.toml")[0], [])


def test_who_comes_second_is_told_who_was_first(lab: Lab) -> None:
    machine = LabMachine(lab.host, [DEVICE])
    try:
        with pytest.raises(BusyError, match=rf"lab0 is in use: .*process {os.getpid()}"):
            LabMachine(lab.host, [DEVICE])
    finally:
        machine.close()
    LabMachine(lab.host, [DEVICE]).close()


def test_a_killed_run_gives_everything_back(lab: Lab) -> None:
    run = subprocess.Popen(
        lab.command("fixtures.verify", "--inventory", "lab.toml", "-q", "-k", "test_takeover"),
        cwd=lab.place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    watcher = SshHost(
        "lab0 again",
        host=lab.host.address,
        port=lab.host.port,
        username="root",
        client_keys=[str(lab.host.key)],
        known_hosts=str(lab.host.known_hosts),
    )
    driver = f"readlink /sys/bus/pci/devices/{lab.host.device[0].address}/driver"
    try:
        until(
            lambda: "vfio-pci" in watcher.run(driver, check=False).out,
            "the device to be assigned",
            120,
            pause_s=0.2,
            but=lambda: "the run has ended" if run.poll() is not None else None,
        )
        os.killpg(run.pid, signal.SIGKILL)
        until(
            lambda: not watcher.run(f"ls {LEASES} | grep -v table", check=False).out,
            "the lease to go",
            60,
            pause_s=0.2,
        )
        assert watcher.run(driver, check=False).out == ""
        assert watcher.run("pgrep -f qemu-system", check=False).out == ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        watcher.close()


def test_what_a_killed_keeper_had_is_gone_and_the_list_says_so(lab: Lab) -> None:
    assert lab.host.keeper
    directory = lab.host.keeper.parent
    (lab_qemu,) = (pid for pid in everything_of(directory) if b"vmlinuz" in command_of(pid))
    os.kill(int(Path(f"/proc/{lab_qemu}/stat").read_text().rpartition(")")[2].split()[1]), 9)
    until(lambda: not everything_of(directory), "its processes to end", 60, pause_s=0.1)
    until(lambda: not directory.exists(), "its directory to go", 60, pause_s=0.1)
    assert "gone (`ci/labhost down lab0`" in lab.labhost("list").stdout
    done = lab.run("fixtures.verify", "--inventory", "lab.toml", "-q", "-k", CHEAP, check=False)
    assert done.returncode == 3
    assert "no keeper of a lab host" in done.stdout
    assert "lab0 is down" in lab.labhost("down", "lab0").stdout
    assert lab.path.read_text().strip() == "# What people wrote."
    assert lab.labhost("list").stdout == ""


def test_a_lab_host_whose_qemu_ends_leaves_its_last_words_until_it_is_taken_off(lab: Lab) -> None:
    lab.labhost("up", "lab1", "--equip", "msix:8")
    assert lab.host.keeper
    directory = lab.host.keeper.parent
    (lab_qemu,) = (pid for pid in everything_of(directory) if b"vmlinuz" in command_of(pid))
    os.kill(lab_qemu, signal.SIGKILL)
    until(lambda: not directory.exists(), "its directory to go", 60, pause_s=0.1)
    words = Path(lab.labhost("list").stdout.rpartition("its last words: ")[2].strip())
    assert "its QEMU ended with -9" in words.read_text()
    assert "lab host: up" in words.read_text()
    lab.labhost("down", "lab1")
    assert not words.exists()


def command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
