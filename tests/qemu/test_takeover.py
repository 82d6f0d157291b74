# SPDX-License-Identifier: GPL-2.0-or-later
"""Every vector is in use, unmasked, and has fired; then new QEMU takes over."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

import pytest

from fixtures.bench import AtEnd, LabBench
from fixtures.coverage import MOVABLE, MSIX, Coverage
from fixtures.matrix import Point
from fixtures.oracle.observation import expect_same, expect_same_counts
from fixtures.rig import WITNESS, TakenOver

POINTS = Coverage("msix:1", "msix:8", "msix:64", "msix:8+cpr-exec", apart=True, strength=2)


@pytest.fixture(scope="module")
def taken_over(request: pytest.FixtureRequest, bench: LabBench, point: Point) -> TakenOver:
    return set_up(bench, point, request.addfinalizer)


def set_up(bench: LabBench, point: Point, at_end: AtEnd) -> TakenOver:
    rig = bench.rig(point, at_end)
    rig.use_all()
    return rig.take_over()


def eventfds_of(point: Point, vectors: Iterable[int]) -> set[tuple[str, int]]:
    """The eventfds that QEMU must have, by the names of hw/vfio/pci.c."""
    if point.irq == "intx":
        names = ["intx-interrupt"] + ["intx-unmask"] * (point.path == "kvm")
    else:
        names = ["interrupt"] + ["kvm_interrupt"] * (point.path == "kvm")
    return {(name, n) for name in names for n in vectors}


def test_each_vector_was_delivered_exactly_once_before_cpr(taken_over: TakenOver) -> None:
    function = taken_over.rig.function
    counts = [taken_over.before.counters[function.idt_vector(n)] for n in range(function.size)]
    assert counts == [1] * function.size
    assert taken_over.before.log_count == function.size


def test_nothing_is_delivered_by_the_takeover_itself(taken_over: TakenOver) -> None:
    function = taken_over.rig.function
    ours = [function.idt_vector(n) for n in taken_over.rig.vectors]
    before, after = taken_over.before.counters, taken_over.after.counters
    assert [after[n] - before[n] for n in ours] == [0] * function.size
    assert taken_over.after.log_count == taken_over.before.log_count, "a spurious interrupt"


def test_each_vector_is_delivered_exactly_once_and_in_order_after_cpr(
    taken_over: TakenOver,
) -> None:
    rig = taken_over.rig
    rig.fire(*rig.vectors)
    rig.check()


def test_masking_holds_a_vector_back_and_unmasking_delivers_it_after_cpr(
    taken_over: TakenOver,
) -> None:
    rig = taken_over.rig
    rig.mask(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.check()
    rig.unmask(*rig.vectors)
    rig.await_delivery(*rig.vectors)
    rig.check(in_order=False)
    rig.fire(*rig.vectors)
    rig.check(in_order=False)


@pytest.mark.limits(irq=MOVABLE)
def test_a_message_changed_while_masked_is_the_one_delivered_after_cpr(
    taken_over: TakenOver,
) -> None:
    rig = taken_over.rig
    rig.mask(*rig.vectors)
    rig.change_message(*rig.vectors)
    rig.unmask(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.check()


@pytest.mark.usefixtures("traces")
@pytest.mark.limits(path=("kvm",))
def test_unmasked_vectors_bypass_qemu_again(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    mark = rig.machine.trace_mark()
    rig.fire(*rig.vectors)
    rig.check()
    assert rig.handled_by_qemu(mark) == 0


@pytest.mark.usefixtures("traces")
@pytest.mark.limits(path=("qemu",))
def test_qemu_handles_each_interrupt_itself_again(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    mark = rig.machine.trace_mark()
    rig.fire(*rig.vectors)
    rig.check()
    assert rig.handled_by_qemu(mark) == len(rig.vectors)


@pytest.mark.usefixtures("traces")
def test_new_qemu_holds_the_same_eventfds_by_name_and_vector(
    taken_over: TakenOver, point: Point
) -> None:
    before = taken_over.held_before.eventfds
    assert set(before) >= eventfds_of(point, taken_over.rig.vectors)
    assert all(identity >= 0 for identity in before.values())
    assert dict(taken_over.held_after.eventfds) == dict(before)


@pytest.mark.usefixtures("same_build")
def test_new_qemu_holds_as_many_descriptors_of_each_kind(
    taken_over: TakenOver, point: Point
) -> None:
    """None is leaked, and none is missing: eventfds, vfio's, KVM's, memory."""
    wanted = len(eventfds_of(point, taken_over.rig.vectors))
    assert taken_over.held_before.counts["anon_inode:[eventfd]"] >= wanted
    expect_same_counts("descriptors", taken_over.held_before.counts, taken_over.held_after.counts)


def test_config_space_is_the_same(taken_over: TakenOver) -> None:
    expect_same("configuration space", taken_over.before.config, taken_over.after.config)


@pytest.mark.limits(irq=MSIX)
def test_msix_table_is_the_same(taken_over: TakenOver) -> None:
    expect_same("the MSI-X table", taken_over.before.table, taken_over.after.table, 16)


def test_the_guest_keeps_running(taken_over: TakenOver) -> None:
    assert taken_over.after.loops > taken_over.before.loops
    loops = taken_over.rig.guest.look().loops
    assert loops > taken_over.after.loops


@pytest.mark.limits(mode=("cpr-transfer",))
def test_new_qemu_runs_and_old_qemu_is_left_in_postmigrate(taken_over: TakenOver) -> None:
    assert taken_over.old_status == "postmigrate"
    assert taken_over.rig.machine.status() == "running"


@pytest.mark.limits(mode=("cpr-exec",))
def test_new_qemu_runs_as_the_process_that_old_qemu_was(taken_over: TakenOver) -> None:
    old, new = taken_over.rig.machines[-2:]
    assert new.process.pid == old.process.pid
    command = new.host.read(PurePosixPath(f"/proc/{new.process.pid}/cmdline"))
    assert command.decode().removesuffix("\0").split("\0") == new.argv != old.argv
    assert new.status() == "running"


def test_the_device_is_not_reset(taken_over: TakenOver) -> None:
    """By the device's own word: a register that every reset clears still holds its value."""
    assert taken_over.after.witness == taken_over.before.witness != 0


def test_registers_of_the_device_can_be_written_after_cpr(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    register = rig.endpoint.witness_register
    rig.function.write(*register, ~WITNESS & 0xFFFFFFFF)
    assert rig.function.read(*register) == ~WITNESS & 0xFFFFFFFF


@pytest.mark.usefixtures("traces")
def test_new_qemu_does_not_ask_for_a_reset(taken_over: TakenOver) -> None:
    assert {
        event for event, traced in taken_over.asked.items() if traced and "reset" in event
    } == set()


def test_the_command_register_is_not_written(taken_over: TakenOver) -> None:
    """By the hardware's word, which has the writes from when vfio took the device."""
    account, _ = taken_over.rig.device.config_writes()
    assert any(" @0x4 " in line for line in account)
    assert [line for line in taken_over.config_writes if " @0x4 " in line] == []


@pytest.mark.usefixtures("traces")
def test_new_qemu_does_not_write_the_command_register(taken_over: TakenOver) -> None:
    writes = taken_over.asked["vfio_pci_write_config"]
    assert [write for write in writes if ", @0x4," in write] == []


def test_they_can_be_disabled_and_enabled_again_after_cpr(taken_over: TakenOver) -> None:
    rig = taken_over.rig
    rig.mask(*rig.vectors)
    rig.disable()
    rig.enable()
    some = sorted({rig.vectors[0], rig.vectors[len(rig.vectors) // 2], rig.vectors[-1]})
    rig.program(*some)
    rig.unmask(*some)
    rig.fire(*some)
    rig.check()
