# SPDX-License-Identifier: GPL-2.0-or-later
"""What a driver does through the probe guest, compared with what QEMU itself says of it."""

from __future__ import annotations

import re
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest

from fixtures.endpoints.vfio_user import Description, Irq, Msi, NotArmedError, VfioUserEndpoint
from fixtures.guests import GuestError, MsixFunction, Op, PciFunction, ProbeGuest
from fixtures.guests.pci import (
    MSI_CAPABILITY,
    MSIX_CAPABILITY,
    WHOLE,
    InterruptFunction,
    IntxFunction,
    MsiFunction,
    Target,
    find_capability,
)
from fixtures.guests.probe import LOG_SIZE, OPS_MAX, TIMER_VECTOR, Verb
from fixtures.hosts import LocalHost
from fixtures.machines import Machine
from fixtures.rig import Kind, Rig, intx, msi
from fixtures.waiting import DeadlineError, until

Plugged = Any  # tests/suite/conftest.py

SLOT = 4
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
def test_a_function_that_does_not_interrupt_so_is_told_by_its_slot(
    a_guest: Callable[..., tuple[Machine, ProbeGuest]], slot: int
) -> None:
    _, guest = a_guest("pci-testdev,addr=5")
    with pytest.raises(GuestError, match=rf"slot {slot:#x} has no MSI-X capability"):
        MsixFunction(guest, slot)
    with pytest.raises(GuestError, match=rf"slot {slot:#x} has no MSI capability"):
        MsiFunction(guest, slot)


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
    words = there.guest.batch(function.mask_ops())
    assert function.masked(words) == set(range(64)) - {0, 32, 63}


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


@pytest.mark.parametrize(("size", "cpus"), [(1, 1), (95, 1), (150, 2), (191, 2), (2048, 22)])
def test_each_vector_has_two_places_of_its_own(size: int, cpus: int) -> None:
    function = MsixFunction.__new__(MsixFunction)
    function.size, function._moved = size, set()
    function.targets = tuple(Target(cpu) for cpu in range(cpus))
    everything = range(size)
    first = {function.place(n) for n in everything}
    function.move(*everything)
    second = {function.place(n) for n in everything}
    assert len(first | second) == 2 * size
    assert {place.cpu for place in first | second} == set(range(min(cpus, 2 * size)))
    assert {place.idt_vector for place in first | second} <= set(range(0x30, TIMER_VECTOR))


def test_functions_that_share_a_guest_have_places_and_registers_of_their_own() -> None:
    parts = [WHOLE.part(n, 3) for n in range(3)]
    assert len({n for part in parts for n in part.idt_vectors}) == 3 * 63
    assert all(a.window.stop <= b.window.start for a, b in pairwise(parts))
    function, places = MsixFunction.__new__(MsixFunction), []
    for function.room in parts:
        function.size, function._moved = 31, set()
        places += [function.place(n) for n in range(31)]
        function.move(*range(31))
        places += [function.place(n) for n in range(31)]
    assert len(set(places)) == len(places)
    function.size = 63
    with pytest.raises(ValueError, match="vector 1 has no place among 63"):
        function.place(1)


def test_more_vectors_than_there_are_places_are_refused() -> None:
    function = MsixFunction.__new__(MsixFunction)
    function.size, function._moved = 192, set()
    function.place(190)
    with pytest.raises(ValueError, match="vector 191 has no place among 191"):
        function.place(191)
    with pytest.raises(ValueError, match="192 vectors have no other places to go to"):
        function.move(0)


@pytest.mark.parametrize("vector", [-1, 64])
def test_a_vector_that_the_table_does_not_have_is_refused(
    function: MsixFunction, vector: int
) -> None:
    with pytest.raises(ValueError, match=f"uses 64 vectors; there is no {vector}"):
        function.set_mask(True, vector)


# MSI and INTx, by a rig for each: what is seen is what the model says.


class Served:
    """The device's host, which here there is none of."""

    def interrupts(self) -> dict[int, int]:
        return {}

    def settle(self) -> None:
        pass

    def config_writes(self, _offset: int = 0) -> tuple[list[str], int]:
        return [], 0


@pytest.fixture(scope="module")
def rig_with(
    local: LocalHost, a_machine: Callable[..., Machine]
) -> Iterator[Callable[[Description, Kind], Rig]]:
    """Makes rigs with a function like this, which is in use."""
    endpoints = []

    def make(description: Description, kind: Kind) -> Rig:
        endpoint = VfioUserEndpoint(description)
        endpoints.append(endpoint)
        endpoint.listen(local.scratch / f"{secrets.token_hex(4)}.sock")
        machine = a_machine(endpoint.qemu_device("dut", addr=f"{SLOT:x}"))
        rig = Rig(machine, SLOT, endpoint, Served(), kind)
        rig.power_on()
        rig.program(*rig.vectors)
        rig.enable()
        return rig

    yield make
    for endpoint in endpoints:
        endpoint.close()


SHAPES = {
    f"{count}-vectors-{'64' if wide else '32'}-bit{'' if maskable else '-without-masks'}": Msi(
        count, wide, maskable
    )
    for count, wide, maskable in (
        (1, True, True),
        (1, False, False),
        (2, False, True),
        (2, True, False),
        (32, True, True),
        (32, False, True),
        (32, True, False),
        (32, False, False),
    )
}


@pytest.fixture(scope="module", params=SHAPES)
def any_msi(request: pytest.FixtureRequest, rig_with: Callable[..., Rig]) -> Rig:
    return rig_with(Description(msix=None, msi=SHAPES[request.param]), msi())


@pytest.fixture
def rig(any_msi: Rig) -> Rig:
    """A function with MSI, enabled and unmasked."""
    if any_msi.function.can_mask:
        any_msi.unmask(*any_msi.vectors)
    any_msi.begin()
    return any_msi


with_masks, without_masks = (
    pytest.mark.parametrize(
        "any_msi", [name for name in SHAPES if SHAPES[name].maskable == maskable], indirect=True
    )
    for maskable in (True, False)
)


def idt_vectors(rig: Rig) -> list[int]:
    return [rig.function.idt_vector(vector) for vector in rig.vectors]


def test_a_vector_that_a_stopped_guest_cannot_take_is_not_waited_for(
    rig_with: Callable[..., Rig],
) -> None:
    rig = rig_with(Description(msix=None, msi=Msi(1, wide=True, maskable=True)), msi())
    rig.machine.monitor.execute("stop")
    with pytest.raises(DeadlineError, match=r"is in vain: old QEMU is in paused; its last words"):
        rig.fire(0)


def test_each_message_of_msi_is_delivered_exactly_once_and_in_order(rig: Rig) -> None:
    assert rig.endpoint.armed() == (Irq.MSI, frozenset(rig.vectors))
    rig.fire(*rig.vectors)
    rig.fire(*reversed(rig.vectors))
    rig.check()


@with_masks
def test_masked_messages_are_pending_and_delivered_once_when_unmasked(rig: Rig) -> None:
    rig.mask(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.fire(*rig.vectors)
    rig.check()
    seen = rig.observe()
    assert (seen.masked, seen.pending) == (set(rig.vectors), set(rig.vectors))
    for vector in reversed(rig.vectors):
        assert rig.unmask_and_look(vector) == rig.model.pending
    rig.await_delivery(*rig.vectors)
    rig.check()


@with_masks
def test_messages_are_delivered_in_the_order_they_are_unmasked(rig: Rig) -> None:
    order = [*rig.vectors[1::2], *rig.vectors[::2]]
    rig.mask(*rig.vectors)
    rig.fire(*rig.vectors)
    # Else the local APIC would have several at once, and take the highest first.
    for vector in order:
        rig.unmask(vector)
        rig.await_delivery(vector)
    rig.check()


@with_masks
def test_masking_one_message_leaves_the_others_alone(rig: Rig) -> None:
    last = rig.vectors[-1]
    rig.mask(last)
    rig.fire(*rig.vectors)
    rig.check()
    seen = rig.observe()
    assert (seen.masked, seen.pending) == ({last}, {last})
    rig.unmask(last)
    rig.await_delivery(last)
    rig.check()
    assert rig.observe().masked == set()


@without_masks
def test_msi_without_mask_bits_says_so_and_shows_none(rig: Rig) -> None:
    assert not rig.function.can_mask
    with pytest.raises(GuestError, match=r"slot 0x4 has no mask bits"):
        rig.mask(0)
    with pytest.raises(GuestError, match=r"slot 0x4 has no mask bits"):
        rig.unmask_and_look(0)
    rig.check()
    seen = rig.observe()
    assert (seen.masked, seen.pending, seen.table) == (set(), set(), b"")


def test_all_messages_of_msi_move_together(rig: Rig) -> None:
    before = idt_vectors(rig)
    rig.change_message(rig.vectors[-1])
    after = idt_vectors(rig)
    assert not set(before) & set(after)
    assert before[0] % rig.function.size == after[0] % rig.function.size == 0
    rig.fire(*rig.vectors)
    rig.check()
    rig.begin()  # deliveries are counted by IDT vector
    rig.change_message(*rig.vectors)
    assert idt_vectors(rig) == before
    rig.fire(*rig.vectors)
    rig.check()


def test_msi_that_is_disabled_has_no_eventfds_and_comes_back(rig: Rig) -> None:
    rig.disable()
    assert rig.endpoint.armed() is None
    rig.enable()
    rig.fire(*rig.vectors)
    rig.check()


@with_masks
@pytest.mark.parametrize("vector", [-1, 32])
def test_a_message_that_there_is_none_of_cannot_be_masked(rig: Rig, vector: int) -> None:
    with pytest.raises(ValueError, match=f"there is no {vector}"):
        rig.mask(vector)
    assert rig.observe().masked == set()


def test_only_msix_has_a_function_mask(rig: Rig) -> None:
    with pytest.raises(GuestError, match="no Function Mask but that of MSI-X"):
        rig.function_mask(True)
    rig.check()


@pytest.mark.parametrize(("wanted", "granted"), [(1, 1), (2, 2), (7, 4), (32, 8)])
def test_a_driver_may_grant_fewer_messages_than_the_function_asks_for(
    rig_with: Callable[..., Rig], wanted: int, granted: int
) -> None:
    rig = rig_with(Description(msix=None, msi=Msi(8)), msi(wanted))
    assert isinstance(rig.function, MsiFunction)
    assert (rig.function.capable, rig.function.size, rig.model.size) == (8, granted, 8)
    assert [n for n in range(8) if rig.model.can_deliver(n)] == [*rig.vectors]
    assert rig.endpoint.armed() == (Irq.MSI, frozenset(range(granted)))
    rig.mask(0)
    rig.fire(*rig.vectors)
    rig.check()
    with pytest.raises(NotArmedError):
        rig.endpoint.fire(granted)


class Edu:
    """QEMU's own edu device, hw/misc/edu.c, as an endpoint: a write of the guest's raises it."""

    IDENTITY, WITNESS, STATUS, RAISE, LOWER = 0x00, 0x04, 0x24, 0x60, 0x64
    witness_register = (0, WITNESS)
    function: PciFunction

    def fire(self, _vector: int = 0) -> None:
        self.function.write(0, self.RAISE, 1)

    @property
    def asserted(self) -> bool:
        return self.function.read(0, self.STATUS) != 0


@pytest.fixture
def edu_rig(a_machine: Callable[..., Machine]) -> Callable[[Kind, int], tuple[Rig, Edu]]:
    """Makes rigs with an edu device in a slot, which uses INTA# and one message of MSI."""

    def make(kind: Kind, slot: int = SLOT) -> tuple[Rig, Edu]:
        edu = Edu()
        rig = Rig(a_machine(f"edu,addr={slot:x}"), slot, edu, Served(), kind)
        rig.power_on()
        edu.function = rig.function
        assert edu.function.read(0, edu.IDENTITY) & 0xFF == 0xED
        return rig, edu

    return make


def test_msi_of_a_device_of_qemus_own_is_delivered(
    edu_rig: Callable[..., tuple[Rig, Edu]],
) -> None:
    rig, edu = edu_rig(msi())
    assert isinstance(rig.function, MsiFunction)
    assert (rig.function.capable, rig.function.can_mask) == (1, False)
    at = find_capability(rig.function.config(), MSI_CAPABILITY)
    assert at is not None
    rig.function.write_config(at + 8, 1, 4)  # whatever was there: an address above 4 GiB
    rig.program(0)
    rig.enable()
    rig.fire(0, 0, 0)
    rig.check()
    rig.disable()
    edu.fire()
    rig.check()


# INTx.

ACKNOWLEDGE = intx(0, Edu.LOWER, 0xFFFFFFFF)


@pytest.fixture
def intx_rig(edu_rig: Callable[..., tuple[Rig, Edu]]) -> Callable[..., tuple[Rig, Edu]]:
    """Makes rigs with an edu device whose pin is in use."""

    def make(slot: int = SLOT) -> tuple[Rig, Edu]:
        rig, edu = edu_rig(ACKNOWLEDGE, slot)
        rig.program(0)
        rig.enable()
        return rig, edu

    return make


@pytest.mark.parametrize("slot", [1, 4, 24])
def test_a_pin_is_delivered_once_per_request_and_released(
    intx_rig: Callable[..., tuple[Rig, Edu]], slot: int
) -> None:
    rig, edu = intx_rig(slot)
    rig.fire(0, 0, 0)
    assert not edu.asserted
    rig.check()


@pytest.mark.parametrize("pin", [1, 2, 3, 4])
def test_each_of_the_four_pins_is_delivered_and_held_back(
    rig_with: Callable[..., Rig], pin: int
) -> None:
    rig = rig_with(Description(msix=None, intx=pin, acknowledge=(0, 8)), intx(0, 8, 1))
    rig.fire(0, 0, 0)
    rig.mask(0)
    rig.fire(0, 0)
    rig.check()
    assert rig.observe().masked == {0}
    rig.unmask(0)
    rig.await_delivery(0)
    rig.check()


def test_a_pin_may_be_raised_again_when_it_was_taken(
    intx_rig: Callable[..., tuple[Rig, Edu]],
) -> None:
    rig, _ = intx_rig()
    rig.signal(0)
    rig.check()
    rig.signal(0)
    rig.check()
    rig.signal(0)
    rig.begin()
    rig.fire(0)
    rig.check()


def test_interrupt_disable_holds_the_pin_back_and_its_clearing_delivers_once(
    intx_rig: Callable[..., tuple[Rig, Edu]],
) -> None:
    rig, edu = intx_rig()
    rig.mask(0)
    rig.fire(0, 0)
    assert edu.asserted
    rig.check()
    seen = rig.observe()
    assert (seen.masked, seen.pending) == ({0}, set())
    rig.unmask(0)
    rig.await_delivery(0)
    assert not edu.asserted
    rig.check()
    assert rig.observe().masked == set()
    rig.fire(0)
    rig.check()


def test_intx_is_disabled_by_interrupt_disable(
    intx_rig: Callable[..., tuple[Rig, Edu]],
) -> None:
    rig, _ = intx_rig()
    rig.disable()
    rig.fire(0)
    rig.check()
    assert rig.observe().masked == {0}
    rig.enable()
    rig.await_delivery(0)
    rig.check()


def test_a_pin_that_moves_is_delivered_and_released_where_it_moved_to(
    intx_rig: Callable[..., tuple[Rig, Edu]],
) -> None:
    rig, edu = intx_rig()
    before = idt_vectors(rig)
    rig.change_message(0)
    assert idt_vectors(rig) != before
    rig.fire(0, 0)
    assert not edu.asserted
    rig.check()


def test_a_pin_that_is_not_released_goes_on_interrupting(
    edu_rig: Callable[..., tuple[Rig, Edu]],
) -> None:
    """So that it is a level, and the other tests prove that the guest acknowledges it."""
    rig, edu = edu_rig(intx(0, Edu.WITNESS, 0))
    rig.program(0)
    rig.enable()
    edu.fire()
    idt = rig.function.idt_vector(0)
    until(lambda: rig.guest.count(idt) > 10, "the level to come again", 20)
    rig.machine.close()  # it would keep a CPU busy


def test_a_function_without_a_pin_and_a_slot_with_routes_of_its_own_are_told(
    a_guest: Callable[..., tuple[Machine, ProbeGuest]],
) -> None:
    _, guest = a_guest("pci-testdev,addr=5", "edu,addr=19")
    with pytest.raises(GuestError, match="slot 0x5 uses no interrupt pin"):
        IntxFunction(guest, 5, (0, 0, 0))
    with pytest.raises(GuestError, match="slot 0x19 has interrupt routes of its own"):
        IntxFunction(guest, 0x19, (0, 0, 0))


class Recorder:
    """A guest with a function of one BAR that uses an interrupt pin, and what it was asked for."""

    def __init__(self, pin: int) -> None:
        self.config = bytearray(256)
        self.config[0x3D] = pin
        self.asked: list[Op] = []

    def batch(self, ops: Sequence[Op]) -> list[int]:
        self.asked += ops
        return [self._do(op) for op in ops]

    def _do(self, op: Op) -> int:
        at = op.address & 0xFF
        if op.verb == Verb.CONFIG_WRITE and at in (0x04, 0x10):
            value = op.value & 0xFFFFF000 if at == 0x10 else op.value
            self.config[at : at + op.width] = value.to_bytes(op.width, "little")
        return int.from_bytes(self.config[at : at + 4], "little")


@pytest.mark.parametrize(
    ("slot", "pin", "wired_to"),
    [(4, 1, 20), (4, 2, 21), (4, 4, 23), (5, 4, 20), (7, 1, 23), (24, 3, 22)],
)
def test_a_pin_is_programmed_at_the_input_that_q35_wires_it_to(
    slot: int, pin: int, wired_to: int
) -> None:
    guest = Recorder(pin)
    function = IntxFunction(guest, slot, (0, 0x64, 0x80000001))  # type: ignore[arg-type]
    assert function.bars == {0: 0xE0000000}
    guest.asked.clear()
    function.program(0)
    high, low = 0x11 + 2 * wired_to, 0x10 + 2 * wired_to
    assert guest.asked == [
        Op(Verb.CONFIG_WRITE, 0xF868, 0x80808080),  # PIRQ E to H: not to the PIC
        Op(Verb.ACKNOWLEDGE, 0xE0000064, 0x30_80000001),
        Op(Verb.WRITE, 0xFEC00000, high),
        Op(Verb.WRITE, 0xFEC00010, 0),
        Op(Verb.WRITE, 0xFEC00000, low),
        Op(Verb.WRITE, 0xFEC00010, 0xA030),  # level, active low, unmasked, fixed, physical
    ]


def test_interrupt_disable_is_written_and_seen_in_command() -> None:
    guest = Recorder(pin=1)
    function: InterruptFunction = IntxFunction(guest, SLOT, (0, 0, 0))  # type: ignore[arg-type]
    for masked in (True, False, True):
        function.set_mask(masked, 0)
        assert guest.asked[-1] == Op(Verb.CONFIG_WRITE, 0x2004, 0x406 if masked else 0x6, 2)
        assert function.masked(guest.batch(function.mask_ops())) == ({0} if masked else set())
    function.set_control(enable=True)
    assert function.masked(guest.batch(function.mask_ops())) == set()
    assert (function.table_ops(), function.pba_ops(), function.pending()) == ([], [], set())


# The guest behind it all.


def test_a_batch_may_be_longer_than_the_mailbox(there: Plugged) -> None:
    scratch = 0x60000
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


def test_a_guest_that_qemu_has_stopped_is_not_waited_for(
    a_guest: Callable[..., tuple[Machine, ProbeGuest]],
) -> None:
    machine, guest = a_guest()
    guest.stuck = machine.stuck
    machine.monitor.execute("stop")
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"is in vain: old QEMU is in paused; its last words"):
        guest.batch([Op(Verb.NOP)])
    assert time.monotonic() - began < 5


def test_a_guest_that_does_not_start_has_a_deadline(a_machine: Callable[..., Machine]) -> None:
    machine = a_machine()
    machine.start(["-S"])
    guest = ProbeGuest(machine.host, machine.spec.ram, machine.died)
    with pytest.raises(DeadlineError, match=r"waited 0\.3 s for the probe guest to start"):
        guest.wait_ready(0.3)
