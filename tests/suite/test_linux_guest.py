# SPDX-License-Identifier: GPL-2.0-or-later
"""The Linux guest, in a real QEMU of this machine: TCG, no VFIO."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.guests.linux import LinuxGuest, Network
from fixtures.guests.probe import GuestError
from fixtures.hosts import LocalHost
from fixtures.linux import COMMAND_LINE
from fixtures.linux.disk import BLOCK_BYTES, COPY_BLOCKS, Copies, Disk
from fixtures.machines import CommandRefusedError, Machine, MachineSpec
from fixtures.machines.machine import MachineDiedError
from fixtures.machines.monitor import MonitorLostError
from fixtures.waiting import DeadlineError, until
from images import assets
from images.cache import Cache
from images.sysroot import Sysroot

#: What a kernel has else in each of its lives.
BOOT = "/proc/sys/kernel/random/boot_id"


@pytest.fixture(scope="module")
def linux(local: LocalHost, packaged: Sysroot, cache: Cache) -> Iterator[LinuxGuest]:
    kernel = assets.lab_kernel(cache)
    if not isinstance(kernel, assets.BuiltKernel):
        pytest.skip("a Linux guest needs a built kernel")
    spec = MachineSpec(
        packaged,
        None,
        local.memory / "linux.ram",
        ram_mb=128,
        accel="tcg",
        cpu="max",
        cpus=2,
        devices=("pcie-root-port,id=port0,chassis=1",),
        linux=(
            local.scratch / "vmlinuz",
            local.scratch / "initrd",
            COMMAND_LINE,
        ),
        agent=True,
    )
    local.put(local.scratch / "vmlinuz", (cache.ensure(kernel) / "vmlinuz").read_bytes())
    local.put(local.scratch / "initrd", (cache.ensure(assets.LinuxGuest()) / "initrd").read_bytes())
    machine = Machine(local, spec, "old QEMU")
    try:
        options, _ = Disk().endpoint.plug("nvme", "pcie.0", Path(local.scratch))
        machine.start(options)
        _ = machine.monitor
        guest = LinuxGuest(machine)
        guest.run("echo 1 > /sys/devices/system/cpu/cpu1/online")
        yield guest
    finally:
        machine.close()
        Path(spec.ram).unlink(missing_ok=True)


def test_the_agent_answers(linux: LinuxGuest) -> None:
    linux.ping()
    linux.sync()


def test_an_agent_that_does_not_answer_in_time_is_named_with_what_it_was_asked(
    linux: LinuxGuest,
) -> None:
    agent = linux.run("pidof qemu-ga").strip()
    stopped = f"sleep 0.3; kill -STOP {agent}; sleep 2; kill -CONT {agent}"
    linux.run(f"({stopped}) > /dev/null 2>&1 < /dev/null &")
    with pytest.raises(
        MonitorLostError,
        match=r"agent in old QEMU: guest-ping: waited 0\.3 s for the agent in old QEMU to answer",
    ):
        ping_often(linux, 10000, deadline_s=0.3)
    linux.sync()


def ping_often(linux: LinuxGuest, times: int, deadline_s: float) -> None:
    for _ in range(times):
        linux.ping(deadline_s)


def test_what_its_clock_is_set_back_by_it_stood_still(linux: LinuxGuest) -> None:
    before = linux.lag()
    linux.run("date -s @$(($(date +%s) - 100))")
    assert linux.lag() - before == pytest.approx(100, abs=2)


def test_a_command_that_the_agent_does_not_know_is_named(linux: LinuxGuest) -> None:
    with pytest.raises(CommandRefusedError, match="the agent in old QEMU refused guest-nothing"):
        linux.ask("guest-nothing")


def test_a_command_runs_to_its_end(linux: LinuxGuest) -> None:
    assert linux.run(["echo", "a  b"]) == "a  b\n"
    assert linux.run("echo a; echo b | tr b c") == "a\nc\n"
    assert linux.run("true") == ""


def test_a_command_that_fails_says_what_and_why(linux: LinuxGuest) -> None:
    with pytest.raises(GuestError, match=r"`cd /nowhere` ended with \d+: .*nowhere"):
        linux.run("cd /nowhere")
    with pytest.raises(CommandRefusedError, match="no-such-program"):
        linux.run(["no-such-program"])


def test_a_command_has_a_deadline(linux: LinuxGuest) -> None:
    with pytest.raises(DeadlineError, match="`sleep 60` in the guest to end"):
        linux.run(["sleep", "60"], deadline_s=0.2)
    assert linux.run("echo on") == "on\n"


def test_a_file_is_read_to_its_end(linux: LinuxGuest) -> None:
    linux.run("seq 1 20000 > /tmp/numbers; : > /tmp/empty")
    assert linux.read("/tmp/numbers").split() == [str(n) for n in range(1, 20001)]
    assert linux.read("/tmp/empty") == ""
    assert linux.read("/proc/version").startswith("Linux version ")
    with pytest.raises(CommandRefusedError, match="nowhere"):
        linux.read("/nowhere")


def test_a_file_is_what_was_written_to_it(linux: LinuxGuest) -> None:
    numbers = "".join(f"{n}\n" for n in range(20000))
    for content in (numbers, "a\n", ""):
        linux.write("/tmp/written", content)
        assert linux.read("/tmp/written") == content
    with pytest.raises(CommandRefusedError, match=r"guest-file-open.*/nowhere/at/all"):
        linux.write("/nowhere/at/all", "a")


def test_no_file_stays_open(linux: LinuxGuest) -> None:
    def open_files() -> list[str]:
        return linux.run("ls -l /proc/$(pidof qemu-ga)/fd | grep -c /tmp/ || true").split()

    linux.write("/tmp/written", "a")
    linux.read("/tmp/written")
    assert open_files() == ["0"]


def test_interrupts_are_counted_by_name_and_cpu(linux: LinuxGuest) -> None:
    before = linux.interrupts("virtio")
    assert before
    linux.run("true")
    after = linux.interrupts("virtio")
    assert set(after) == set(before)
    assert all(len(counts) == 2 for counts in after.values())
    assert sum(map(sum, after.values())) > sum(map(sum, before.values()))
    assert linux.interrupts("nothing of the kind") == {}


@pytest.mark.parametrize("cpu", [1, 0])
def test_interrupts_are_sent_to_a_cpu(linux: LinuxGuest, cpu: int) -> None:
    linux.send_interrupts("virtio", cpu)
    linux.run("true")  # what was on its way has come
    before = linux.interrupts("virtio")
    linux.run("true")
    after = linux.interrupts("virtio")
    grown = [sum(after[name][n] - before[name][n] for name in after) for n in (0, 1)]
    assert grown[cpu] > 0 == grown[1 - cpu]


def test_what_is_repeated_ends_with_its_last_round(linux: LinuxGuest) -> None:
    linux.run("rm -f /run/a /run/b; mkfifo /run/hold")
    linux.repeat("echo a >> /run/a; cat /run/hold; echo z >> /run/a", "echo b >> /run/b")
    until(
        lambda: (
            "a\n" in linux.run("cat /run/a 2> /dev/null; true")
            and len(linux.run("cat /run/b 2> /dev/null; true")) > 10
        ),
        "both to be repeated",
        20,
        pause_s=0.05,
    )
    with pytest.raises(DeadlineError, match="what is repeated in the guest to end"):
        linux.cease(deadline_s=0.2)
    linux.run("echo on > /run/hold")
    linux.cease()
    assert linux.read("/run/a") == "a\nz\n"


def test_copies_that_a_disk_has_are_intact(linux: LinuxGuest) -> None:
    Disk().bring_up(linux)
    copies = Copies(linux)
    copies.moves()
    portions = copies.end()
    assert len(portions) >= 2
    assert all(sent == came for sent, came in portions)
    assert len({sent for sent, _ in portions}) > 1


def test_copies_that_a_disk_has_lost_show(linux: LinuxGuest, local: LocalHost) -> None:
    copies = Copies(linux)
    until(
        lambda: linux.read("/run/sums-0").count("\n") > 1, "two copies in a row", 20, pause_s=0.05
    )
    file = Path(local.scratch) / "nvme.disk"
    file.write_bytes(bytes(file.stat().st_size))
    portions = copies.end()
    lost = {came for sent, came in portions if sent != came}
    assert hashlib.sha256(bytes(COPY_BLOCKS * BLOCK_BYTES)).hexdigest() in lost


def test_the_queues_of_a_disk_interrupt_the_cpu_that_they_belong_to(linux: LinuxGuest) -> None:
    copies = Copies(linux)
    copies.moves()
    counts = linux.interrupts(Disk.data)
    copies.end()
    assert {name: [n > 0 for n in each] for name, each in counts.items()} == {
        "nvme0q1": [True, False],
        "nvme0q2": [False, True],
    }
    assert [Disk().send_to(linux, cpu) for cpu in (0, 1)] == [{"nvme0q1"}, {"nvme0q2"}]


def test_there_is_what_drivers_test_their_devices_with(linux: LinuxGuest) -> None:
    assert linux.run(["ethtool", "--version"]).startswith("ethtool version ")


def test_the_guest_sees_what_is_plugged_in_and_lets_go_of_it(linux: LinuxGuest) -> None:
    device = "virtio-net-pci,id=late,bus=port0,mac=52:54:00:00:00:77"
    assert "eth0" not in linux.networks()
    linux.machine.plug(device)
    until(lambda: "eth0" in linux.networks(), "the guest to see it", 20, pause_s=0.05)
    linux.run("ip addr add 10.0.0.7/24 dev eth0")
    assert linux.networks() == {
        "lo": Network("00:00:00:00:00:00", frozenset({"127.0.0.1/8"})),
        "eth0": Network("52:54:00:00:00:77", frozenset({"10.0.0.7/24"})),
    }
    linux.machine.unplug(device)
    assert "eth0" not in linux.networks()
    assert device not in linux.machine.spec.devices


def test_a_guest_sleeps_and_its_agent_answers_once_it_is_awake(linux: LinuxGuest) -> None:
    boot = linux.read(BOOT)
    for _ in range(2):
        linux.suspend()
        assert linux.machine.status() == "suspended"
        linux.wake()
        linux.ping()
        assert linux.read(BOOT) == boot
    assert linux.run("dmesg | grep -c 'PM: suspend exit'") == "2\n"


def test_a_guest_that_cannot_sleep_says_why(linux: LinuxGuest) -> None:
    linux.run("mount --bind /dev/null /sys/power/state")
    try:
        with pytest.raises(CommandRefusedError, match="refused guest-suspend-ram"):
            linux.suspend()
    finally:
        linux.run("umount /sys/power/state")
    linux.ping()


def test_what_waits_for_an_agent_of_a_guest_that_sleeps_on_is_told_so(linux: LinuxGuest) -> None:
    linux.suspend()
    try:
        with pytest.raises(DeadlineError, match="waited 2 s for the agent in old QEMU to answer"):
            linux.machine.call_agent_again(deadline_s=2)
    finally:
        linux.wake()
    linux.ping()


def test_a_guest_that_was_reset_has_another_agent(linux: LinuxGuest) -> None:
    linux.run("touch /run/before")
    boot = linux.read(BOOT)
    linux.machine.reset()
    assert linux.read(BOOT) != boot
    assert linux.run("ls /run/before 2> /dev/null || echo none") == "none\n"


def test_what_waits_for_a_guest_that_is_stopped_is_told_so(linux: LinuxGuest) -> None:
    linux.run("true")
    linux.machine.monitor.execute("stop")
    try:
        with pytest.raises(MonitorLostError, match="old QEMU is in paused"):
            linux.run("true")
    finally:
        linux.machine.monitor.execute("cont")
    assert linux.run("echo on") == "on\n"


def test_what_waits_for_a_guest_whose_qemu_dies_is_told_so(linux: LinuxGuest) -> None:
    linux.run("true")
    linux.machine.process.kill()
    with pytest.raises(MachineDiedError, match="was killed by signal 9"):
        linux.run("true")
