# SPDX-License-Identifier: GPL-2.0-or-later
"""What a driver does through the probe guest, compared with what QEMU itself says of it."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest

from fixtures.guests import GuestError, MsixFunction, Op, PciFunction, ProbeGuest
from fixtures.guests.pci import find_capability
from fixtures.guests.probe import LOG_SIZE, OPS_MAX, Verb
from fixtures.machines import Machine
from fixtures.waiting import DeadlineError, until

Plugged = Any  # tests/suite/conftest.py

MSI_CAPABILITY, MSIX_CAPABILITY = 0x05, 0x11
#: The local APIC's interrupt command register, and "to myself, fixed, edge".
ICR, TO_SELF = 0xFEE0_0300, 0x44000
X2APIC_ID = 0x802  # not to be read as long as the APIC is in xAPIC mode
GIB = 1 << 30


@pytest.fixture(scope="module")
def there(plugged: Callable[[int], Plugged]) -> Plugged:
    return plugged(64)


@pytest.fixture
def function(there: Plugged) -> MsixFunction:
    return there.function()  # type: ignore[no-any-return]


@pytest.fixture
def a_guest(a_machine: Callable[..., Machine]) -> Callable[..., tuple[Machine, ProbeGuest]]:
    """Makes machines with devices; the guest is ready."""

    def make(*devices: str, options: Sequence[str] = ()) -> tuple[Machine, ProbeGuest]:
        machine = a_machine(*devices)
        machine.start(options)
        guest = ProbeGuest(machine.host, machine.spec.ram, machine.died)
        machine.alive(guest.wait_ready)
        return machine, guest

    return make


def as_qemu_has_it(machine: Machine, slot: int) -> dict[str, Any]:
    """The device in a slot, by the word of ``query-pci``."""
    devices = machine.monitor.execute("query-pci")[0]["devices"]
    return next(device for device in devices if device["slot"] == slot)


def memory(machine: Machine, address: int, words: int) -> list[int]:
    """Guest physical memory, by the word of QEMU's own monitor."""
    listing = machine.monitor.execute(
        "human-monitor-command", {"command-line": f"xp /{words}wx {address:#x}"}
    )
    return [int(word, 16) for word in re.findall(r"(?<!^)0x([0-9a-f]{8})\b", listing)]


# Any function.


def test_configuration_space_is_read_as_it_is(there: Plugged, function: MsixFunction) -> None:
    config = function.config()
    assert len(config) == 256
    assert struct.unpack_from("<HH", config) == there.endpoint.PCI_ID
    ids = as_qemu_has_it(there.machine, there.SLOT)["id"]
    assert struct.unpack_from("<HH", config) == (ids["vendor"], ids["device"])


def test_bars_are_where_qemu_says_and_do_not_overlap(
    there: Plugged, function: MsixFunction
) -> None:
    regions = as_qemu_has_it(there.machine, there.SLOT)["regions"]
    assert {region["bar"]: region["address"] for region in regions} == function.bars
    assert {region["bar"] for region in regions} == {0, 1, 2}
    ranges = sorted((region["address"], region["size"]) for region in regions)
    assert all(address % size == 0 for address, size in ranges)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(ranges))


def test_memory_is_decoded_and_the_function_may_master(function: MsixFunction) -> None:
    assert struct.unpack_from("<H", function.config(), 4)[0] & 0x6 == 0x6


def test_io_bars_are_left_alone(
    a_guest: Callable[..., tuple[Machine, ProbeGuest]],
) -> None:
    machine, guest = a_guest("pci-testdev,addr=5")
    function = PciFunction(guest, 5)
    function.place_bars()
    assert list(function.bars) == [0]
    bars = {region["bar"]: region for region in as_qemu_has_it(machine, 5)["regions"]}
    assert (bars[0]["type"], bars[0]["address"]) == ("memory", function.bars[0])
    assert bars[1]["type"] == "io"
    # Its first byte selects a test; the size of the access that it wants comes after it.
    function.write(0, 0, 0)
    assert function.read(0, 0) & 0xFF00 in (0x0100, 0x0200, 0x0400)


@pytest.mark.parametrize("size", [GIB, 2 * GIB, 4 * GIB, 8 * GIB])
def test_a_bar_that_the_guest_has_no_room_for_is_told(
    a_guest: Callable[..., tuple[Machine, ProbeGuest]], size: int
) -> None:
    backend = f"memory-backend-ram,id=big,size={size},reserve=off"
    _, guest = a_guest("ivshmem-plain,memdev=big,addr=5", options=["-object", backend])
    with pytest.raises(GuestError, match="BAR 2"):
        PciFunction(guest, 5).place_bars()


def test_capabilities_are_found_by_walking_their_list(
    a_guest: Callable[..., tuple[Machine, ProbeGuest]],
) -> None:
    _, guest = a_guest("pci-testdev,addr=5", "nec-usb-xhci,addr=6,msi=on,msix=on")
    controller = PciFunction(guest, 6)
    config = controller.config()
    for wanted in (MSI_CAPABILITY, MSIX_CAPABILITY):
        at = find_capability(controller.config(), wanted)
        assert at is not None
        assert config[at] == wanted
    assert find_capability(controller.config(), 0x42) is None
    assert find_capability(PciFunction(guest, 5).config(), MSIX_CAPABILITY) is None, (
        "has no list at all"
    )
    assert find_capability(PciFunction(guest, 7).config(), MSIX_CAPABILITY) is None, "is not there"


def a_config(fields: dict[int, int]) -> bytes:
    """A configuration space as no QEMU shows it: bytes by their offset, all else 0."""
    return bytes(fields.get(at, 0) for at in range(256))


def test_a_capability_list_is_believed_only_if_the_status_register_says_so() -> None:
    """6.2.3: there is one if bit 4 of Status is set; 6.7: the two low bits of a pointer are
    to be masked."""
    fields = {0x34: 0x43, 0x40: MSIX_CAPABILITY}
    assert find_capability(a_config({0x06: 0x10, **fields}), MSIX_CAPABILITY) == 0x40
    assert find_capability(a_config(fields), MSIX_CAPABILITY) is None


def test_a_capability_list_that_goes_in_circles_has_an_end() -> None:
    circle = {0x06: 0x10, 0x34: 0x40, 0x40: 0x01, 0x41: 0x50, 0x50: 0x05, 0x51: 0x40}
    assert find_capability(a_config(circle), MSIX_CAPABILITY) is None


@pytest.mark.parametrize("slot", [5, 7], ids=["without", "absent"])
def test_a_function_without_msix_is_told_by_its_slot(
    a_guest: Callable[..., tuple[Machine, ProbeGuest]], slot: int
) -> None:
    _, guest = a_guest("pci-testdev,addr=5")
    with pytest.raises(GuestError, match=rf"slot {slot:#x} has no MSI-X capability"):
        MsixFunction(guest, slot)


# MSI-X.


def test_the_table_has_the_size_that_the_device_was_given(function: MsixFunction) -> None:
    assert function.size == 64


def test_programming_gives_each_vector_its_message_and_leaves_its_mask_bit(
    there: Plugged, function: MsixFunction
) -> None:
    function.set_mask(False, 3)
    function.program(3, 63)
    bar, offset = function._table
    table = function.bars[bar] + offset
    for vector, masked in ((3, 0), (63, 1)):
        wanted = [0xFEE00000, 0, function.idt_vector(vector), masked]
        assert memory(there.machine, table + 16 * vector, 4) == wanted
        values = there.guest.batch(function.table_ops())
        assert values[4 * vector : 4 * vector + 4] == wanted


def test_masks_are_those_of_the_named_vectors(there: Plugged, function: MsixFunction) -> None:
    function.set_mask(False, 0, 31, 32, 63)
    masks = there.guest.batch(function.table_ops())[3::4]
    assert [n for n, mask in enumerate(masks) if not mask & 1] == [0, 31, 32, 63]
    function.set_mask(True, 31)
    masks = there.guest.batch(function.table_ops())[3::4]
    assert [n for n, mask in enumerate(masks) if not mask & 1] == [0, 32, 63]


@pytest.mark.parametrize("enable", [False, True])
@pytest.mark.parametrize("function_mask", [False, True])
def test_message_control_holds_what_was_written(
    function: MsixFunction, enable: bool, function_mask: bool
) -> None:
    function.set_control(enable=enable, function_mask=function_mask)
    at = find_capability(function.config(), MSIX_CAPABILITY)
    assert at is not None
    (control,) = struct.unpack_from("<H", function.config(), at + 2)
    assert (bool(control & 0x8000), bool(control & 0x4000), control & 0x7FF) == (
        enable,
        function_mask,
        63,
    )


def test_pending_bits_are_read_from_the_pba(there: Plugged, function: MsixFunction) -> None:
    function.set_control(enable=True, function_mask=False)
    for vector in (0, 31, 32, 63):
        there.endpoint.fire(vector)
    until(lambda: len(function.pending()) == 4, "the pending bits", 20)
    assert function.pending() == {0, 31, 32, 63}
    bar, offset = function._pba
    assert memory(there.machine, function.bars[bar] + offset, 2) == [0x8000_0001] * 2


def test_a_vector_that_moves_is_delivered_where_it_moved_to(
    there: Plugged, function: MsixFunction
) -> None:
    old = function.idt_vector(5)
    function.move(5)
    new = function.idt_vector(5)
    assert new not in {old, *(function.idt_vector(n) for n in range(64) if n != 5)}
    function.program(5)
    function.set_control(enable=True, function_mask=False)
    function.set_mask(False, 5)
    before = there.guest.look().counters
    there.endpoint.fire(5)
    until(lambda: there.guest.count(new) > before[new], "the vector", 20)
    assert there.guest.count(old) == before[old]


@pytest.mark.parametrize("vector", [-1, 64])
def test_a_vector_that_the_table_does_not_have_is_refused(
    function: MsixFunction, vector: int
) -> None:
    with pytest.raises(ValueError, match=f"the table has 64 entries; there is no {vector}"):
        function.set_mask(True, vector)


# The guest behind it all.


def test_a_batch_may_be_longer_than_the_mailbox(there: Plugged) -> None:
    scratch = 0x200000
    count = 2 * OPS_MAX + 1
    there.guest.batch([Op(Verb.WRITE, scratch + 4 * n, n) for n in range(count)])
    assert there.guest.batch([Op(Verb.READ, scratch + 4 * n) for n in range(count)]) == list(
        range(count)
    )
    assert there.guest.batch([]) == []


def test_a_refused_operation_is_named_and_the_guest_goes_on(there: Plugged) -> None:
    bad = Op(Verb.PORT_IN, 0x10000)
    with pytest.raises(GuestError, match=re.escape(f"the guest refused {bad}")):
        there.guest.batch([Op(Verb.NOP), bad, Op(Verb.NOP)])
    there.guest.batch([Op(Verb.NOP)])


def test_interrupts_are_logged_in_order_and_one_too_many_for_the_log_is_told(
    there: Plugged,
) -> None:
    since = there.guest.look().log_count
    assert there.guest.log(since, there.guest.look().log_count) == []
    there.guest.batch([Op(Verb.WRITE, ICR, TO_SELF | vector) for vector in (0xD2, 0xD1, 0xD2)])
    deliveries = there.guest.log(since, there.guest.look().log_count)
    assert [delivery.vector for delivery in deliveries] == [0xD2, 0xD1, 0xD2]
    assert [d.tsc for d in deliveries] == sorted(d.tsc for d in deliveries)
    there.guest.batch([Op(Verb.WRITE, ICR, TO_SELF | 0xD3)] * (LOG_SIZE - 3))
    deliveries = there.guest.log(since, there.guest.look().log_count)  # wraps around
    assert [d.vector for d in deliveries] == [0xD2, 0xD1, 0xD2, *[0xD3] * (LOG_SIZE - 3)]
    there.guest.batch([Op(Verb.WRITE, ICR, TO_SELF | 0xD3)])
    with pytest.raises(GuestError, match=f"{LOG_SIZE + 1} interrupts came"):
        there.guest.log(since, there.guest.look().log_count)


def test_an_exception_in_the_guest_is_told(
    a_guest: Callable[..., tuple[Machine, ProbeGuest]],
) -> None:
    _, guest = a_guest()
    with pytest.raises(GuestError, match=r"exception 13 .*MSR_READ"):
        guest.batch([Op(Verb.MSR_READ, X2APIC_ID)])


def test_a_dead_qemu_is_not_waited_for(
    a_guest: Callable[..., tuple[Machine, ProbeGuest]],
) -> None:
    machine, guest = a_guest()
    machine.process.kill()
    with pytest.raises(DeadlineError, match=r"is in vain: was killed by signal 9"):
        guest.batch([Op(Verb.NOP)])


def test_a_guest_that_does_not_start_has_a_deadline(a_machine: Callable[..., Machine]) -> None:
    machine = a_machine()
    machine.start(["-S"])
    guest = ProbeGuest(machine.host, machine.spec.ram, machine.died)
    with pytest.raises(DeadlineError, match=r"waited 0\.3 s for the probe guest to start"):
        guest.wait_ready(0.3)
