# SPDX-License-Identifier: GPL-2.0-or-later
"""The probe guest does what abi.h says, on a packaged QEMU without KVM."""

import mmap
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

from fixtures.guests.probe import GuestError, ProbeGuest, Verb
from fixtures.guests.probe import Op as GuestOp
from fixtures.hosts import LocalHost
from images.probe import SOURCES, ProbeBuildError, build

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")

RAM = 8 << 20
MAILBOX = 0x80000
STARTING, READY, FAULTED = range(3)
CFG_READ, CFG_WRITE, MMIO_READ, MMIO_WRITE = 1, 2, 3, 4
PORT_IN, PORT_OUT, MSR_READ, MSR_WRITE, INTERRUPTS, NOP = 5, 6, 7, 8, 9, 10
X2APIC, LOGICAL, ACKNOWLEDGE, SLEEP = 11, 12, 13, 14
OPS, LOG, CPUS, TIMER, SPURIOUS = 384, 4096, 32, 0xEF, 0xFF
HELD = 0x048

SCRATCH = 0x200000
ICR_LOW, ICR_HIGH = 0xFEE00300, 0xFEE00310
TO_ONE, TO_SELF, TO_ALL = 0x4000, 0x44000, 0x84000  # destination or shorthand; assert, fixed
TO_LOGICAL = 0x4800
X2APIC_ID, X2APIC_ICR = 0x802, 0x830  # #GP as long as the LAPIC is in xAPIC mode
APIC_BASE, BASE_XAPIC, BASE_X2APIC = 0x1B, 0xFEE00900, 0xFEE00D00  # of the first CPU
DEADLINE = 10.0

Op = tuple[int, int, int, int]


class Delivery(NamedTuple):
    tsc: int
    vector: int
    cpu: int
    sequence: int


class Probe:
    """The harness's end of the mailbox.

    Native formats, because struct handles the others byte by byte, and the
    guest would see (or show) halves.
    """

    def __init__(self, process: subprocess.Popen[bytes], ram: mmap.mmap, ram_file: Path) -> None:
        self.process = process
        self.ram = ram
        self.ram_file = ram_file

    def u32(self, offset: int) -> int:
        return int(struct.unpack_from("I", self.ram, MAILBOX + offset)[0])

    def u64(self, offset: int) -> int:
        return int(struct.unpack_from("Q", self.ram, MAILBOX + offset)[0])

    def put(self, offset: int, value: int) -> None:
        struct.pack_into("I", self.ram, MAILBOX + offset, value)

    @property
    def state(self) -> int:
        return self.u32(0x008)

    @property
    def boots(self) -> int:
        return self.u32(0x01C)

    @property
    def loops(self) -> int:
        return self.u64(0x020)

    @property
    def log_count(self) -> int:
        return self.u32(0x040)

    @property
    def cpus(self) -> int:
        return self.u32(0x044)

    def counter(self, vector: int, cpu: int | None = None) -> int:
        """Of one CPU, or of all."""
        return self.u32((0x400 if cpu is None else 0x14000 + 0x400 * cpu) + 4 * vector)

    def delivery(self, number: int) -> Delivery:
        offset = MAILBOX + 0x4000 + 16 * (number % LOG)
        return Delivery(*struct.unpack_from("<QHHI", self.ram, offset))

    def taken(self, first: int, count: int) -> list[tuple[int, int]]:
        """The vector and the CPU of that many deliveries, once all of them are there."""
        self.wait(lambda: self.log_count >= first + count)
        deliveries = [self.delivery(number) for number in range(first, self.log_count)]
        return [(delivery.vector, delivery.cpu) for delivery in deliveries]

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert self.process.poll() is None, "QEMU has exited"
            assert time.monotonic() < deadline, f"the guest hangs in state {self.state}"
            time.sleep(0.0002)

    def post(self, *ops: Op, count: int | None = None) -> int:
        """Hand a batch to the guest; returns its sequence number."""
        for index, (op, width, address, value) in enumerate(ops):
            where = MAILBOX + 0x1000 + 32 * index
            struct.pack_into("<IIQQQ", self.ram, where, op, width, address, value, 0)
        self.put(0x038, len(ops) if count is None else count)
        sequence = self.u32(0x034) + 1
        self.put(0x030, sequence)
        return sequence

    def batch(self, *ops: Op, count: int | None = None) -> tuple[int, list[int]]:
        """The result of the batch, and the operations' values after it."""
        sequence = self.post(*ops, count=count)
        self.wait(lambda: self.u32(0x034) == sequence)
        return self.u32(0x03C), [self.u64(0x1000 + 32 * i + 16) for i in range(len(ops))]

    def run(self, *ops: Op) -> list[int]:
        result, values = self.batch(*ops)
        assert result == 0
        return values

    def read(self, op: int, width: int, address: int) -> int:
        return self.run((op, width, address, ~0 & 0xFFFFFFFFFFFFFFFF))[0]

    def interrupt_self(self, *vectors: int) -> None:
        self.run(*((MMIO_WRITE, 4, ICR_LOW, TO_SELF | vector) for vector in vectors))

    def interrupt(self, cpu: int, vector: int) -> None:
        self.run((MMIO_WRITE, 4, ICR_HIGH, cpu << 24), (MMIO_WRITE, 4, ICR_LOW, TO_ONE | vector))


class Edu:
    """QEMU's edu device (hw/misc/edu.c), whose interrupt the guest itself raises."""

    CONFIG, BAR = 3 << 11, 0xE0000000
    IDENTIFICATION, INVERTER = BAR, BAR + 4
    STATUS, RAISE, ACKNOWLEDGE = BAR + 0x24, BAR + 0x60, BAR + 0x64
    #: Where q35 has INTA of the devices in slots below 25: hw/isa/lpc_ich9.c, ich9_cc_init().
    INPUT = 20 + 3 % 4
    MEMORY_AND_MASTER = 6

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.msi = probe.read(CFG_READ, 1, self.CONFIG + 0x34)
        while probe.read(CFG_READ, 1, self.CONFIG + self.msi) != 5:
            self.msi = probe.read(CFG_READ, 1, self.CONFIG + self.msi + 1)
            assert self.msi
        probe.run(
            (CFG_WRITE, 4, self.CONFIG + 0x10, self.BAR),
            (CFG_WRITE, 2, self.CONFIG + 4, self.MEMORY_AND_MASTER),
        )

    def use_msi(self, vector: int, address: int = 0xFEE00000) -> None:
        self.probe.run(
            (CFG_WRITE, 4, self.CONFIG + self.msi + 4, address),
            (CFG_WRITE, 4, self.CONFIG + self.msi + 8, 0),
            (CFG_WRITE, 2, self.CONFIG + self.msi + 12, vector),
            (CFG_WRITE, 2, self.CONFIG + self.msi + 2, 0x81),
        )

    def use_intx(self, vector: int, cpu: int) -> None:
        """Level triggered, active low, to a CPU by its APIC ID."""
        entry = 0x10 + 2 * self.INPUT
        self.probe.run(
            (CFG_WRITE, 2, self.CONFIG + self.msi + 2, 0x80),
            (MMIO_WRITE, 4, 0xFEC00000, entry + 1),
            (MMIO_WRITE, 4, 0xFEC00010, cpu << 24),
            (MMIO_WRITE, 4, 0xFEC00000, entry),
            (MMIO_WRITE, 4, 0xFEC00010, 0xA000 | vector),
        )

    def raise_(self) -> None:
        self.probe.run((MMIO_WRITE, 4, self.RAISE, 1))


@pytest.fixture(scope="module")
def rom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "probe.bin"
    build(path)
    return path


@contextmanager
def running(
    qemu: list[str], rom: Path, ram_file: Path, machine: str, *more: str
) -> Iterator[Probe]:
    ram_file.touch()
    os.truncate(ram_file, RAM)
    backend = f"memory-backend-file,id=ram0,size={RAM},share=on,mem-path={ram_file}"
    arguments = ["-machine", f"{machine},accel=tcg,memory-backend=ram0", "-object", backend]
    arguments += ["-bios", str(rom), "-nodefaults", "-display", "none", "-device", "edu,addr=3.0"]
    with (
        ram_file.open("r+b") as file,
        mmap.mmap(file.fileno(), RAM) as ram,
        subprocess.Popen([*qemu, *arguments, *more], stdin=subprocess.DEVNULL) as process,
    ):
        try:
            probe = Probe(process, ram, ram_file)
            probe.wait(lambda: probe.state != STARTING)
            yield probe
        finally:
            process.kill()


@pytest.fixture(scope="module", params=["q35", "pc"])
def probe(
    request: pytest.FixtureRequest,
    hardware_qemu: list[str],
    rom: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Probe]:
    ram_file = tmp_path_factory.mktemp("probe") / "ram"
    with running(hardware_qemu, rom, ram_file, request.param) as probe:
        yield probe


@pytest.fixture
def doomed_probe(hardware_qemu: list[str], rom: Path, tmp_path: Path) -> Iterator[Probe]:
    """A guest of the test's own, to be killed by it."""
    with running(hardware_qemu, rom, tmp_path / "ram", "q35") as probe:
        yield probe


@pytest.fixture(scope="module")
def two_cpus(
    hardware_qemu: list[str], rom: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Probe]:
    ram_file = tmp_path_factory.mktemp("probe") / "ram"
    with running(hardware_qemu, rom, ram_file, "q35", "-smp", "2") as probe:
        yield probe


@pytest.fixture
def x2apic_probe(hardware_qemu: list[str], rom: Path, tmp_path: Path) -> Iterator[Probe]:
    """A guest of the test's own: two CPUs that have x2APIC mode, and a trace."""
    more = ["-smp", "2", "-cpu", "qemu64,+x2apic"]
    more += ["-d", "trace:memory_region_ops_write", "-D", str(tmp_path / "trace")]
    with running(hardware_qemu, rom, tmp_path / "ram", "q35", *more) as probe:
        yield probe


def test_the_sources_are_there() -> None:
    assert {path.name for path in SOURCES} == {"abi.h", "entry.S", "probe.c", "probe.ld"}
    assert all(path.is_file() for path in SOURCES)


def test_a_build_is_a_rom_that_the_reset_vector_enters(rom: Path) -> None:
    content = rom.read_bytes()
    assert len(content) == 0x10000
    opcode, displacement = struct.unpack_from("<BH", content, 0xFFF0)
    assert opcode == 0xE9  # jmp rel16
    target = (0xFFF3 + displacement) & 0xFFFF
    assert 0xFF00 <= target < 0xFFF0


def test_builds_are_reproducible(rom: Path, tmp_path: Path) -> None:
    build(tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == rom.read_bytes()


def test_a_failed_build_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ProbeBuildError, match=r"no-such-cc .*probe\.c"):
        build(tmp_path / "probe.bin", cc="no-such-cc")
    failing = tmp_path / "failing-cc"
    failing.write_text("#!/bin/sh\necho the reason >&2\nexit 1\n")
    failing.chmod(0o755)
    with pytest.raises(ProbeBuildError, match="the reason"):
        build(tmp_path / "probe.bin", cc=str(failing))
    assert not (tmp_path / "probe.bin").exists()


def test_the_guest_introduces_itself(probe: Probe) -> None:
    assert probe.state == READY
    assert probe.ram[MAILBOX : MAILBOX + 4] == b"VCPR"
    assert probe.u32(0x004) == 7
    assert probe.cpus == 1


def test_the_guest_is_alive_but_idle(probe: Probe) -> None:
    stat = Path(f"/proc/{probe.process.pid}/stat")

    def cpu_seconds() -> float:
        user, system = stat.read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    time.sleep(0.1)
    loops, tsc, ticks, cpu = probe.loops, probe.u64(0x028), probe.counter(TIMER), cpu_seconds()
    time.sleep(1)
    passes, ticked = probe.loops - loops, probe.counter(TIMER) - ticks
    assert probe.u64(0x028) > tsc
    # 25 ticks a second when nobody asks anything, a thousand when somebody just has.
    assert 10 < ticked < 500
    assert 10 < passes < 10 * ticked
    assert cpu_seconds() - cpu < 0.5


def test_widths_of_memory_accesses(probe: Probe) -> None:
    probe.run(
        (MMIO_WRITE, 4, SCRATCH, 0x44332211),
        (MMIO_WRITE, 4, SCRATCH + 4, 0x88776655),
        (MMIO_WRITE, 1, SCRATCH + 1, 0xFFFFFFAA),
        (MMIO_WRITE, 2, SCRATCH + 4, 0xFFFFBBCC),
    )
    assert probe.ram[SCRATCH : SCRATCH + 8] == bytes.fromhex("11aa3344 ccbb7788")
    assert [probe.read(MMIO_READ, width, SCRATCH + 1) for width in (1, 2, 4)] == [
        0xAA,
        0x33AA,
        0xCC4433AA,
    ]


def test_widths_of_port_accesses(probe: Probe) -> None:
    probe.run((PORT_OUT, 4, 0xCF8, 0x80001800))
    assert probe.read(PORT_IN, 4, 0xCF8) == 0x80001800
    assert probe.read(PORT_IN, 4, 0xCFC) == 0x11E81234
    assert probe.read(PORT_IN, 2, 0xCFE) == 0x11E8
    assert probe.read(PORT_IN, 1, 0xCFD) == 0x12


def test_widths_of_configuration_accesses(probe: Probe) -> None:
    edu = 3 << 11
    assert probe.read(CFG_READ, 4, edu) == 0x11E81234
    assert probe.read(CFG_READ, 2, edu + 2) == 0x11E8
    assert [probe.read(CFG_READ, 1, edu + i) for i in range(4)] == [0x34, 0x12, 0xE8, 0x11]
    assert probe.read(CFG_READ, 4, 31 << 11 | 7 << 8 | 0xFC) in (0, 0xFFFFFFFF)
    bar = edu + 0x10
    probe.run((CFG_WRITE, 4, bar, 0), (CFG_WRITE, 2, bar + 2, 0x1230))
    probe.run((CFG_WRITE, 1, bar + 3, 0xC0))
    assert probe.read(CFG_READ, 4, bar) == 0xC0300000


def test_msrs(probe: Probe) -> None:
    assert probe.read(MSR_READ, 0, APIC_BASE) == BASE_XAPIC
    sysenter_eip = 0x176
    probe.run((MSR_WRITE, 0, sysenter_eip, 0x12345678))
    assert probe.read(MSR_READ, 0, sysenter_eip) == 0x12345678
    pat = 0x277
    probe.run((MSR_WRITE, 0, pat, 0x0007040600070406))
    assert probe.read(MSR_READ, 0, pat) == 0x0007040600070406


@pytest.mark.parametrize(
    "refused",
    [
        (0, 4, 0, 0),
        (15, 4, 0, 0),
        (SLEEP, 8, 0xB004, 0),
        (SLEEP, 2, 0x10000, 0),
        (MMIO_READ, 0, SCRATCH, 0),
        (MMIO_READ, 3, SCRATCH, 0),
        (MMIO_WRITE, 8, SCRATCH, 0),
        (MMIO_READ, 4, 1 << 32, 0),
        (PORT_IN, 1, 0x10000, 0),
        (CFG_READ, 1, 1 << 24, 0),
        (CFG_READ, 2, 3, 0),
        (MSR_READ, 0, 1 << 32, 0),
        (X2APIC, 0, 0, 0),  # QEMU's default CPU has none
        (ACKNOWLEDGE, 0, SCRATCH, 0x1F << 32),
        (ACKNOWLEDGE, 0, SCRATCH, 0x100 << 32),
        (ACKNOWLEDGE, 0, SCRATCH + 2, 0x55 << 32),
        (ACKNOWLEDGE, 0, 1 << 32, 0x55 << 32),
    ],
)
def test_a_refused_operation_ends_its_batch(probe: Probe, refused: Op) -> None:
    mark = (MMIO_WRITE, 4, SCRATCH, 1)
    probe.run((MMIO_WRITE, 4, SCRATCH, 0), (MMIO_WRITE, 4, SCRATCH + 4, 0))
    result, _ = probe.batch(mark, refused, (MMIO_WRITE, 4, SCRATCH + 4, 1))
    assert result == 2
    assert [probe.read(MMIO_READ, 4, SCRATCH + i) for i in (0, 4)] == [1, 0]
    assert probe.state == READY


def test_the_length_of_a_batch(probe: Probe) -> None:
    assert probe.batch() == (0, [])
    values = probe.run(*((MMIO_READ, 2, SCRATCH, 1 << 40) for _ in range(OPS - 1)), (NOP, 0, 0, 7))
    assert values[-1] == 7
    assert all(value < 1 << 16 for value in values[:-1])
    assert probe.batch(count=OPS + 1)[0] == OPS + 1


def test_every_vector_is_taken_once_and_told_apart(probe: Probe) -> None:
    vectors = [vector for vector in range(0x20, SPURIOUS) if vector != TIMER]
    before = [probe.counter(vector) for vector in vectors]
    first = probe.log_count
    probe.interrupt_self(*vectors)
    assert [probe.counter(vector) for vector in vectors] == [count + 1 for count in before]
    assert probe.log_count == first + len(vectors)
    deliveries = [probe.delivery(first + i) for i in range(len(vectors))]
    assert [delivery.vector for delivery in deliveries] == vectors
    assert [delivery.sequence for delivery in deliveries] == [*range(first, first + len(vectors))]
    assert {delivery.cpu for delivery in deliveries} == {0}
    assert deliveries == sorted(deliveries)  # by time
    assert all(probe.counter(vector) == 0 for vector in range(0x20))


def test_the_log_wraps_and_its_count_does_not(probe: Probe) -> None:
    first = probe.log_count
    batch, rounds = [0x51] * 300, LOG // 300 + 1
    for _ in range(rounds):
        probe.interrupt_self(*batch)
    count = rounds * len(batch)
    assert probe.log_count == first + count
    numbers = range(first + count - LOG, first + count)
    assert [probe.delivery(number)[1:] for number in numbers] == [(0x51, 0, n) for n in numbers]


def test_an_interrupt_waits_while_interrupts_are_off(probe: Probe) -> None:
    probe.run((INTERRUPTS, 0, 0, 0))
    count, ticks, loops = probe.counter(0x52), probe.counter(TIMER), probe.loops
    probe.interrupt_self(0x52, 0x52)
    probe.wait(lambda: probe.loops > loops + 100)
    assert (probe.counter(0x52), probe.counter(TIMER)) == (count, ticks)
    probe.run((INTERRUPTS, 0, 0, 1))
    assert probe.counter(0x52) == count + 1  # the LAPIC holds one of a vector
    probe.wait(lambda: probe.counter(TIMER) > ticks + 2)


def test_an_msi_from_a_device(probe: Probe) -> None:
    edu, vector = Edu(probe), 0x61
    edu.use_msi(vector)
    assert probe.read(MMIO_READ, 4, edu.IDENTIFICATION) == 0x010000ED
    probe.run((MMIO_WRITE, 4, edu.INVERTER, 0x12345678))
    assert probe.read(MMIO_READ, 4, edu.INVERTER) == 0xEDCBA987
    first, before = probe.log_count, probe.counter(vector)
    for _ in range(3):
        probe.run((MMIO_WRITE, 4, edu.RAISE, 1), (MMIO_WRITE, 4, edu.ACKNOWLEDGE, 1))
    assert probe.counter(vector) == before + 3
    assert [probe.delivery(first + i).vector for i in range(3)] == [vector] * 3
    assert probe.log_count == first + 3


def test_a_vector_is_acknowledged_when_taken_until_that_is_ended(probe: Probe) -> None:
    def after(vector: int) -> int:
        probe.run((MMIO_WRITE, 4, SCRATCH, 0))
        probe.interrupt_self(vector)
        return probe.read(MMIO_READ, 4, SCRATCH)

    probe.run((ACKNOWLEDGE, 0, SCRATCH, 0x55 << 32 | 0x89ABCDEF))
    assert [after(0x55), after(0x56), after(0x55)] == [0x89ABCDEF, 0, 0x89ABCDEF]
    probe.run((ACKNOWLEDGE, 0, 0, 0x55 << 32 | 1))
    assert after(0x55) == 0


@pytest.mark.parametrize("count", [2, CPUS])
def test_all_cpus_are_up_when_the_guest_is_ready(
    hardware_qemu: list[str], rom: Path, tmp_path: Path, count: int
) -> None:
    with running(hardware_qemu, rom, tmp_path / "ram", "q35", "-smp", str(count)) as probe:
        assert (probe.state, probe.cpus) == (READY, count)
        first = probe.log_count
        probe.run((MMIO_WRITE, 4, ICR_LOW, TO_ALL | 0x57))
        assert sorted(probe.taken(first, count)) == [(0x57, cpu) for cpu in range(count)]


def test_an_interrupt_that_is_held_stays_in_service(two_cpus: Probe) -> None:
    first, held, same, lower, higher = two_cpus.log_count, 0x51, 0x52, 0x41, 0x61
    two_cpus.put(HELD, held)
    two_cpus.interrupt(1, held)
    assert two_cpus.taken(first, 1) == [(held, 1)]
    for vector in (same, lower, higher):
        two_cpus.interrupt(1, vector)
    assert two_cpus.taken(first, 2) == [(held, 1), (higher, 1)]
    two_cpus.put(HELD, 0)
    assert two_cpus.taken(first, 4) == [(held, 1), (higher, 1), (same, 1), (lower, 1)]


def test_each_delivery_names_the_cpu_that_took_it(two_cpus: Probe) -> None:
    first = two_cpus.log_count
    for number, cpu in enumerate([1, 0, 1, 1, 0]):
        two_cpus.interrupt(cpu, 0x58)
        assert two_cpus.taken(first + number, 1) == [(0x58, cpu)]


def test_interrupts_are_counted_for_each_cpu_and_for_all(two_cpus: Probe) -> None:
    first = two_cpus.log_count
    for cpu in (1, 0, 1):
        two_cpus.interrupt(cpu, 0x5E)
    two_cpus.taken(first, 3)
    assert [two_cpus.counter(0x5E, cpu) for cpu in (None, 0, 1)] == [3, 1, 2]


def test_cpus_that_are_interrupted_at_once_lose_nothing(two_cpus: Probe) -> None:
    vectors, rounds = range(0x20, TIMER), 20
    before = [two_cpus.counter(vector) for vector in vectors]
    for _ in range(rounds):
        first = two_cpus.log_count
        # A LAPIC holds one of a vector: each comes once, until both CPUs have taken all.
        two_cpus.run(*((MMIO_WRITE, 4, ICR_LOW, TO_ALL | vector) for vector in vectors))
        taken = two_cpus.taken(first, 2 * len(vectors))
        assert sorted(taken) == [(vector, cpu) for vector in vectors for cpu in (0, 1)]
        numbers = range(first, first + len(taken))
        assert [two_cpus.delivery(number).sequence for number in numbers] == list(numbers)
    assert [two_cpus.counter(vector) for vector in vectors] == [
        count + 2 * rounds for count in before
    ]


def test_interrupts_can_be_off_on_the_first_cpu_only(two_cpus: Probe) -> None:
    first = two_cpus.log_count
    two_cpus.run((INTERRUPTS, 0, 0, 0), (MMIO_WRITE, 4, ICR_LOW, TO_ALL | 0x59))
    assert two_cpus.taken(first, 1) == [(0x59, 1)]
    two_cpus.run((INTERRUPTS, 0, 0, 1))
    assert two_cpus.taken(first, 2) == [(0x59, 1), (0x59, 0)]


@pytest.mark.parametrize(
    ("address", "cpus"),
    [
        pytest.param(0xFEE00000, [0], id="physical-0"),
        pytest.param(0xFEE01000, [1], id="physical-1"),
        pytest.param(0xFEE01004, [0], id="logical-1"),
        pytest.param(0xFEE02004, [1], id="logical-2"),
        pytest.param(0xFEE03004, [0, 1], id="logical-3"),
    ],
)
def test_an_msi_goes_to_the_cpus_it_names(two_cpus: Probe, address: int, cpus: list[int]) -> None:
    two_cpus.run((LOGICAL, 0, 0, 0))
    edu = Edu(two_cpus)
    edu.use_msi(0x62, address)
    for _ in range(3):
        first = two_cpus.log_count
        edu.raise_()
        assert sorted(two_cpus.taken(first, len(cpus))) == [(0x62, cpu) for cpu in cpus]


def assert_once_per_raise(probe: Probe, cpu: int) -> None:
    """A level interrupt to a CPU that acknowledges it is taken once each time it is raised."""
    edu, vector, lower = Edu(probe), 0x71, 0x31
    edu.use_intx(vector, cpu)
    probe.run((ACKNOWLEDGE, 0, edu.ACKNOWLEDGE, vector << 32 | 0xFFFFFFFF))
    first = probe.log_count
    for number in range(10):
        edu.raise_()
        assert probe.taken(first + number, 1) == [(vector, cpu)]
        assert probe.read(MMIO_READ, 4, edu.STATUS) == 0
    # What has a lower priority is taken last: until then one too many would have come.
    edu.use_msi(lower, 0xFEE00000 | cpu << 12)
    edu.raise_()
    assert probe.taken(first, 11) == [(vector, cpu)] * 10 + [(lower, cpu)]
    probe.run((ACKNOWLEDGE, 0, 0, vector << 32))


@pytest.mark.parametrize("cpu", [0, 1])
def test_a_level_interrupt_is_taken_once_per_raise(two_cpus: Probe, cpu: int) -> None:
    assert_once_per_raise(two_cpus, cpu)


def test_all_cpus_change_to_x2apic_mode_while_interrupts_come(x2apic_probe: Probe) -> None:
    probe = x2apic_probe
    first = probe.log_count
    before, after = range(0x30, 0x60), range(0x60, 0x90)
    probe.run(
        *((MMIO_WRITE, 4, ICR_LOW, TO_ALL | vector) for vector in before),
        (X2APIC, 0, 0, 0),
        *((MSR_WRITE, 0, X2APIC_ICR, TO_ALL | vector) for vector in after),
    )
    taken = probe.taken(first, 2 * 0x60)
    assert sorted(taken) == [(v, cpu) for v in (*before, *after) for cpu in (0, 1)]
    assert probe.read(MSR_READ, 0, APIC_BASE) == BASE_X2APIC


def test_interrupts_come_and_end_in_x2apic_mode(x2apic_probe: Probe, tmp_path: Path) -> None:
    probe, trace = x2apic_probe, tmp_path / "trace"
    # The second and the third have nothing to do: logical IDs are there, 1 << APIC ID.
    probe.run((X2APIC, 0, 0, 0), (X2APIC, 0, 0, 0), (LOGICAL, 0, 0, 0))
    written = trace.stat().st_size
    edu = Edu(probe)
    for address, cpu in (0xFEE00000, 0), (0xFEE01000, 1), (0xFEE01004, 0), (0xFEE02004, 1):
        edu.use_msi(0x63, address)
        for _ in range(3):
            first = probe.log_count
            edu.raise_()
            assert probe.taken(first, 1) == [(0x63, cpu)]
    for cpu in (0, 1):
        assert_once_per_raise(probe, cpu)
    ticks = probe.counter(TIMER)
    probe.wait(lambda: probe.counter(TIMER) > ticks + 20)
    # In this mode KVM has no LAPIC in memory any more.  TCG has: only its trace tells.
    later = trace.read_text()[written:]
    assert "name 'edu-mmio'" in later
    assert not re.findall("addr 0xfee00(?:0[^0]|[^0]).*'apic-msi'", later)


def test_a_reset_ends_x2apic_mode_and_acknowledgements(x2apic_probe: Probe) -> None:
    probe = x2apic_probe
    probe.run((X2APIC, 0, 0, 0), (ACKNOWLEDGE, 0, SCRATCH, 0x5B << 32 | 1))
    probe.post((PORT_OUT, 1, 0xCF9, 6))
    probe.wait(lambda: probe.u32(0x030) == 0 and probe.state == READY)
    assert probe.cpus == 2
    assert probe.read(MSR_READ, 0, APIC_BASE) == BASE_XAPIC
    probe.run((MMIO_WRITE, 4, SCRATCH, 0))
    for number, cpu in enumerate([0, 1, 0, 1]):
        probe.interrupt(cpu, 0x5B)
        assert probe.taken(number, 1) == [(0x5B, cpu)]
    assert probe.read(MMIO_READ, 4, SCRATCH) == 0


def test_an_exception_on_another_cpu_stops_the_first(x2apic_probe: Probe) -> None:
    probe = x2apic_probe
    probe.interrupt(1, 0x1A)
    probe.wait(lambda: probe.state == FAULTED)
    assert (probe.u32(0x00C), probe.counter(0x1A)) == (0x1A, 1)

    def stopped() -> bool:
        loops = probe.loops
        time.sleep(0.05)  # five ticks, when idle
        return probe.loops == loops

    probe.wait(stopped)


def test_the_harness_reads_what_the_guest_says_of_its_cpus(
    two_cpus: Probe, local: LocalHost
) -> None:
    guest = ProbeGuest(local, PurePosixPath(two_cpus.ram_file))
    guest.wait_ready()
    before = guest.look()
    assert (before.cpus, before.boots) == (2, 1)
    two_cpus.ram[SCRATCH : SCRATCH + 4] = bytes(4)
    guest.batch(
        [
            GuestOp(Verb.LOGICAL),
            GuestOp(Verb.ACKNOWLEDGE, SCRATCH, 0x5A << 32 | 0x1234),
            GuestOp(Verb.WRITE, ICR_HIGH, 2 << 24),
            GuestOp(Verb.WRITE, ICR_LOW, TO_LOGICAL | 0x5A),
        ]
    )
    two_cpus.wait(lambda: guest.look().log_count > before.log_count)
    (delivery,) = guest.log(before.log_count, before.log_count + 1)
    assert (delivery.vector, delivery.cpu) == (0x5A, 1)
    end = GuestOp(Verb.ACKNOWLEDGE, 0, 0x5A << 32)
    assert guest.batch([GuestOp(Verb.READ, SCRATCH), end])[0] == 0x1234
    with pytest.raises(GuestError, match="X2APIC"):
        guest.batch([GuestOp(Verb.X2APIC)])


def test_half_a_sequence_number_is_not_a_request(probe: Probe) -> None:
    done = probe.u32(0x034)
    for other in (done - 1, done + 2, done ^ 0x100):
        probe.put(0x030, other & 0xFFFFFFFF)
        later = probe.loops + 10
        probe.wait(lambda later=later: probe.loops > later)
        assert probe.u32(0x034) == done
    assert probe.batch((NOP, 0, 0, 0))[0] == 0


def test_the_guest_starts_anew_after_a_reset(doomed_probe: Probe) -> None:
    doomed_probe.interrupt_self(0x53)
    doomed_probe.run((INTERRUPTS, 0, 0, 0))
    assert doomed_probe.boots == 1
    doomed_probe.post((PORT_OUT, 1, 0xCF9, 6))
    doomed_probe.wait(lambda: doomed_probe.u32(0x030) == 0 and doomed_probe.state == READY)
    assert doomed_probe.boots == 2
    assert (doomed_probe.counter(0x53), doomed_probe.counter(0x53, 0)) == (0, 0)
    assert doomed_probe.log_count == 0
    doomed_probe.interrupt_self(0x54)
    assert doomed_probe.delivery(0)[1:] == (0x54, 0, 0)


def test_an_exception_is_recorded_and_stops_the_guest(doomed_probe: Probe) -> None:
    doomed_probe.post((MSR_READ, 0, X2APIC_ID, 0))
    doomed_probe.wait(lambda: doomed_probe.state == FAULTED)
    vector, error, eip = (doomed_probe.u32(offset) for offset in (0x00C, 0x010, 0x014))
    assert (vector, error) == (13, 0)
    assert doomed_probe.ram[eip : eip + 2] == b"\x0f\x32"  # rdmsr
    assert doomed_probe.u32(0x034) == 0
    loops = doomed_probe.loops
    time.sleep(0.02)
    assert doomed_probe.loops == loops


def test_an_interrupt_on_an_exception_vector_is_a_fault(doomed_probe: Probe) -> None:
    doomed_probe.post((MMIO_WRITE, 4, ICR_LOW, TO_SELF | 0x1A))
    doomed_probe.wait(lambda: doomed_probe.state == FAULTED)
    assert (doomed_probe.u32(0x00C), doomed_probe.counter(0x1A)) == (0x1A, 1)
