# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU is taken over from many times in a row, and its vectors are used in each generation."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import pytest

from fixtures.bench import LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.cpr import MODES, Cpr, Step
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_flat, expect_same, expect_same_counts
from fixtures.rig import Rig, TakenOver
from fixtures.subject import Subject

POINTS = Coverage(
    container=("type1",),
    irq=("msix:8",),
    **SOUND,
    iommu=("intel-iommu",),
    reset=("bus",),
    irqchip=("full",),
    apic=("xapic",),
    bars=("mmap",),
    endpoint=("ivshmem",),
)

#: In each mode, and in the profile "full".  What cpr-exec leaves open, the next new QEMU inherits.
GENERATIONS, MOST = {"cpr-transfer": 5, "cpr-exec": 10}, 20
#: Masked for three generations, and of these FIRED is pending; then delivered, and so again.
MASKED = (1, 6)
FIRED = 6
CARRIED = 3
#: What a generation may have more than the one before it, in KiB: QEMU's own memory is the same to
#: some pages.  What it has pinned for the device is the same to the byte.
MORE_KIB = 32
#: How much longer a CPR, and an interrupt, may take in the end, on a machine that is busy.
FACTOR, CPR_SLACK_S, DELIVERY_SLACK_S = 3.0, 1.0, 0.05


@dataclass(frozen=True)
class Generation:
    """QEMU after one of the CPRs.

    :ivar mode: of that CPR.
    :ivar cpr_s: how long it took, from ``migrate`` to the guest's going on.
    :ivar blackout_s: for how much of that the guest stood still, where it could be seen: a new QEMU
        that was executed goes on before its monitor can be asked.
    :ivar delivery_s: how long each unmasked vector took then, from the device to the guest.
    :ivar memory: of ``/proc/PID/status``, in KiB: what is its own, and what it has pinned.
    :ivar shared: the files in the host's ``/dev/shm``, and their sizes in KiB.
    """

    taken_over: TakenOver
    mode: str
    cpr_s: float
    blackout_s: float | None
    delivery_s: Sequence[float]
    memory: dict[str, int]
    shared: dict[str, int]


@dataclass(frozen=True)
class Chain:
    """All generations, and how often the pending vector was delivered when it was unmasked."""

    rig: Rig
    generations: Sequence[Generation]

    @property
    def taken_over(self) -> list[TakenOver]:
        return [each.taken_over for each in self.generations]

    def of_a_kind(self) -> list[list[Generation]]:
        """The generations that came by the same mode: what a process inherits depends on that."""
        return [some for mode in MODES if (some := [g for g in self.generations if g.mode == mode])]


@pytest.fixture(scope="module")
def chain(request: pytest.FixtureRequest, bench: LabBench, point: Point, subject: Subject) -> Chain:
    rig = bench.rig(point, request.addfinalizer)
    rig.use_all()
    rig.mask(*MASKED)
    rig.fire(FIRED)
    full = request.config.getoption("profile") == "full"
    generations: list[Generation] = []
    for number in range(MOST if full else GENERATIONS[point.mode]):
        generations.append(generation(rig, mode_of(number, point, subject)))
        if number % CARRIED == CARRIED - 1:
            rig.begin()
            rig.unmask(*MASKED)
            rig.await_delivery(FIRED)
            rig.check()
            rig.mask(*MASKED)
            rig.fire(FIRED)
    return Chain(rig, generations)


def mode_of(number: int, point: Point, subject: Subject) -> type[Cpr]:
    """cpr-transfer takes turns with cpr-exec; cpr-exec also goes on alone, in one process."""
    in_turn = point.mode == "cpr-transfer" and "cpr-exec" in subject.capabilities.modes
    return MODES["cpr-exec" if in_turn and number % 2 else point.mode]


def generation(rig: Rig, mode: type[Cpr]) -> Generation:
    """One more, whose vectors are all looked at."""
    taken_over = rig.take_over(choreography=mode)
    times = taken_over.cpr.times
    rig.begin()
    delivery_s = []
    for vector in rig.vectors:
        if vector not in MASKED:
            began = time.monotonic()
            rig.fire(vector)
            delivery_s.append(time.monotonic() - began)
    rig.check()
    machine = rig.machine
    status = machine.host.read(PurePosixPath(f"/proc/{machine.process.pid}/status")).decode()
    shared = machine.host.run("du -ak /dev/shm").out
    return Generation(
        taken_over,
        mode.mode,
        times[Step.RUNNING] - times[Step.MIGRATE],
        None if (blackout_ms := taken_over.cpr.blackout_ms) is None else blackout_ms / 1e3,
        delivery_s,
        {k: int(v) for k, v in re.findall(r"(RssAnon|VmPin|VmLck):\s+(\d+) kB", status)},
        {name: int(size) for size, name in re.findall(r"(\d+)\s+(\S+)", shared)},
    )


@pytest.fixture
def rig(chain: Chain) -> Rig:
    return chain.rig


def test_nothing_is_delivered_by_any_takeover(chain: Chain) -> None:
    delivered = [each.after.log_count - each.before.log_count for each in chain.taken_over]
    assert delivered == [0] * len(delivered)


def test_masks_and_pending_bits_are_the_same_in_each_generation(chain: Chain) -> None:
    """Carried through three generations before they are delivered, and through three more."""
    after = [each.after for each in chain.taken_over]
    assert [each.masked for each in after] == [set(MASKED)] * len(after)
    assert [each.pending for each in after] == [{FIRED}] * len(after)


def test_config_space_and_msix_table_are_those_of_the_first_qemu(chain: Chain) -> None:
    first = chain.taken_over[0].before
    for each in chain.taken_over:
        expect_same("configuration space", first.config, each.after.config)
        expect_same("the MSI-X table", first.table, each.after.table, 16)


def test_the_device_is_never_reset(chain: Chain) -> None:
    taken_over = chain.taken_over
    assert {each.after.witness for each in taken_over} == {taken_over[0].before.witness} != {0}


@pytest.mark.usefixtures("traces")
def test_the_eventfds_are_those_of_the_first_qemu(chain: Chain) -> None:
    taken_over = chain.taken_over
    first = dict(taken_over[0].held_before.eventfds)
    assert first
    assert [dict(each.held_after.eventfds) for each in taken_over] == [first] * len(taken_over)


@pytest.mark.usefixtures("traces")
def test_what_is_preserved_is_there_by_the_same_names_in_each_generation(chain: Chain) -> None:
    """The device, what it belongs to, its eventfds, and memory that is no file."""
    held = chain.taken_over[0].held_before
    first = dict(held.preserved)
    assert len(first) > len(held.eventfds)
    assert "nothing" not in first.values()
    others = [first.items() ^ each.held_after.preserved.items() for each in chain.taken_over]
    assert others == [set()] * len(others)


@pytest.mark.usefixtures("same_build")
def test_new_qemu_holds_as_many_descriptors_of_each_kind_as_the_first(chain: Chain) -> None:
    """What a cpr-exec leaves open goes with its process: the last cpr-transfer has none of it."""
    first, last = chain.taken_over[0], chain.of_a_kind()[0][-1].taken_over
    expect_same_counts("descriptors", first.held_before.counts, last.held_after.counts)


@pytest.mark.usefixtures("same_build")
def test_new_qemu_holds_as_many_descriptors_of_each_kind_in_each_generation(chain: Chain) -> None:
    for first, *others in chain.of_a_kind():
        for each in others:
            held = each.taken_over.held_after
            expect_same_counts("descriptors", first.taken_over.held_after.counts, held.counts)


def test_its_memory_does_not_grow(chain: Chain) -> None:
    for some in chain.of_a_kind():
        own = [each.memory["RssAnon"] for each in some]
        expect_flat("QEMU's own memory in KiB", own, slack=MORE_KIB * len(own))


def test_as_much_memory_is_pinned_in_each_generation(chain: Chain) -> None:
    pinned = {(each.memory["VmPin"], each.memory["VmLck"]) for each in chain.generations}
    assert len(pinned) == 1
    assert pinned != {(0, 0)}


def test_no_more_of_the_hosts_shared_memory_is_used(chain: Chain) -> None:
    first = chain.generations[0].shared
    assert first
    assert [each.shared for each in chain.generations] == [first] * len(chain.generations)


def test_a_takeover_does_not_take_longer_in_the_end(chain: Chain) -> None:
    for some in chain.of_a_kind():
        times = [each.cpr_s for each in some]
        expect_flat("the time of a CPR in s", times, factor=FACTOR, slack=CPR_SLACK_S)


def test_a_blackout_is_not_longer_in_the_end(chain: Chain) -> None:
    for some in chain.of_a_kind():
        times = [each.blackout_s for each in some if each.blackout_s is not None]
        assert times or some[0].mode == "cpr-exec"
        if times:
            expect_flat("a blackout in s", times, factor=FACTOR, slack=CPR_SLACK_S)


def test_an_interrupt_does_not_take_longer_in_the_end(chain: Chain) -> None:
    times = [each for some in chain.generations for each in some.delivery_s]
    expect_flat("the time of a delivery in s", times, factor=FACTOR, slack=DELIVERY_SLACK_S)


def test_the_pending_vector_is_delivered_once_when_unmasked(rig: Rig) -> None:
    rig.begin()
    rig.unmask(*MASKED)
    rig.await_delivery(FIRED)
    rig.check()


@pytest.mark.usefixtures("traces")
def test_unmasked_vectors_bypass_qemu_again(rig: Rig) -> None:
    assert rig.delivered_by_qemu() == 0
