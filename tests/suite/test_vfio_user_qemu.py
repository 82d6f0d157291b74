# SPDX-License-Identifier: GPL-2.0-or-later
"""The vfio-user endpoint with QEMU as its client, and the probe guest as its driver.

Here QEMU's vfio-user-pci is itself the device that the guest sees, under TCG, so that what the
endpoint does is known to be right before QEMU under test has a part in it.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fixtures.endpoints.vfio_user import (
    Bar,
    Description,
    DmaError,
    Irq,
    Msi,
    Msix,
    ResetBy,
    VfioUserEndpoint,
)
from fixtures.endpoints.vfio_user.protocol import IrqSet, Region
from fixtures.endpoints.vfio_user.witness import (
    ConfigWritten,
    Connected,
    Disconnected,
    DmaMapped,
    Event,
    IrqsSet,
    Refused,
    WasReset,
)
from fixtures.guests import MsixFunction, Op, PciFunction, ProbeGuest
from fixtures.guests.pci import FIRST_IDT_VECTOR, MSI_ADDRESS, find_capability
from fixtures.guests.probe import Verb
from fixtures.hosts import LocalHost
from fixtures.machines import Machine
from fixtures.machines.machine import MachineDiedError
from fixtures.waiting import until

pytestmark = pytest.mark.filterwarnings("error")

SLOT = 4
MSI, EXPRESS, POWER = 0x05, 0x10, 0x01
#: In the guest's RAM, clear of its mailbox.
BUFFER = 0x200000


class Folded(MsixFunction):
    """A function with more vectors than the guest has IDT vectors: they share them."""

    places = 2048  # type: ignore[assignment]

    def idt_vector(self, vector: int) -> int:
        return FIRST_IDT_VECTOR + vector % 128


@dataclass
class Plugged:
    """A machine whose guest sees an endpoint of ours."""

    machine: Machine
    endpoint: VfioUserEndpoint
    guest: ProbeGuest

    def taken(self, idt_vector: int) -> int:
        """Interrupts the guest has taken on an IDT vector."""
        return self.guest.count(idt_vector)

    def logged(self) -> int:
        """Interrupts the guest has taken, all but the timer's, once QEMU has come to rest."""
        self.machine.settle()
        self.guest.batch([Op(Verb.NOP)])
        return self.guest.look().log_count

    def await_logged(self, count: int) -> None:
        until(
            lambda: self.guest.look().log_count >= count,
            f"{count} interrupts",
            20,
            pause_s=0.0005,
            but=self.machine.died,
        )


@pytest.fixture(scope="module")
def make_endpoint(local: LocalHost) -> Iterator[Callable[..., VfioUserEndpoint]]:
    """Makes endpoints that listen."""
    made = []

    def make(description: Description | None = None, **options: Any) -> VfioUserEndpoint:
        made.append(VfioUserEndpoint(description, **options))
        made[-1].listen(local.scratch / f"{secrets.token_hex(4)}.sock")
        return made[-1]

    yield make
    for endpoint in made:
        endpoint.close()


@pytest.fixture(scope="module")
def plug(
    make_endpoint: Callable[..., VfioUserEndpoint], a_machine: Callable[..., Machine]
) -> Callable[..., Plugged]:
    """Makes machines with an endpoint; the guest is ready."""

    def plug(
        description: Description | None = None,
        *,
        device: dict[str, Any] | None = None,
        **options: Any,
    ) -> Plugged:
        endpoint = make_endpoint(description, **options)
        argument = endpoint.qemu_device("dut", bus="pcie.0", addr=f"{SLOT:x}", **(device or {}))
        machine = a_machine(argument)
        machine.start()
        guest = ProbeGuest(machine.host, machine.spec.ram, machine.died)
        machine.alive(guest.wait_ready)
        return Plugged(machine, endpoint, guest)

    return plug


@pytest.fixture(scope="module")
def other_qemu() -> Iterator[Callable[[Plugged], Plugged]]:
    """Makes another machine with the same endpoint, and RAM of its own."""
    machines = []

    def make(there: Plugged) -> Plugged:
        ram = there.machine.host.memory / f"{secrets.token_hex(4)}.ram"
        machine = there.machine.successor(ram=ram)
        machines.append(machine)
        machine.start()
        guest = ProbeGuest(machine.host, ram, machine.died)
        machine.alive(guest.wait_ready)
        return Plugged(machine, there.endpoint, guest)

    yield make
    for machine in machines:
        machine.close()
        Path(machine.spec.ram).unlink(missing_ok=True)


def vectors_of(size: int) -> Description:
    """A function with so many MSI-X vectors."""
    return Description(msix=Msix(size))


@pytest.fixture(scope="module", params=[1, 8, 64], ids="{}-vectors".format)
def there(request: pytest.FixtureRequest, plug: Callable[..., Plugged]) -> Plugged:
    return plug(vectors_of(request.param))


@pytest.fixture
def function(there: Plugged) -> MsixFunction:
    """The endpoint as a driver finds it: programmed, disabled, all masked."""
    function = MsixFunction(there.guest, SLOT)
    everything = range(function.size)
    function.set_control(enable=False, function_mask=False)
    function.program(*everything)
    function.set_mask(True, *everything)
    return function


# What QEMU asks of a device, and what the guest finds.


def test_qemu_asks_nothing_that_is_refused(there: Plugged) -> None:
    assert there.machine.said() == ""
    assert there.endpoint.witness.since(0, Refused) == []
    assert there.endpoint.witness.since(0, Connected) == [Connected(client=0)]


def test_the_guest_finds_the_function(there: Plugged, function: MsixFunction) -> None:
    config = function.config()
    description = there.endpoint.description
    assert struct.unpack_from("<HH", config) == (description.vendor, description.device)
    assert function.size == there.endpoint.vectors
    assert set(function.bars) == {0, 1}
    assert find_capability(config, EXPRESS) == there.endpoint.device.capabilities[EXPRESS]


def test_the_guest_reads_and_writes_registers(there: Plugged, function: MsixFunction) -> None:
    function.write(0, 0xFF8, 0x5EEDCAFE)
    assert function.read(0, 0xFF8) == 0x5EEDCAFE  # QEMU does not wait for the write to be done
    assert there.endpoint.device.read(0, 0xFF8, 4) == b"\xfe\xca\xed\x5e"


# MSI-X.


def test_every_vector_fires_exactly_once_and_in_order(
    there: Plugged, function: MsixFunction
) -> None:
    everything = range(function.size)
    function.set_control(enable=True, function_mask=False)
    function.set_mask(False, *everything)
    assert there.endpoint.armed() == (Irq.MSIX, frozenset(everything))
    log = there.logged()
    for number, vector in enumerate(everything, 1):
        there.endpoint.fire(vector)
        there.await_logged(log + number)
    assert there.logged() == log + function.size
    order = [delivery.vector for delivery in there.guest.log(log, log + function.size)]
    assert order == [function.idt_vector(vector) for vector in everything]


def test_masked_vectors_are_kept_and_fire_once_when_unmasked(
    there: Plugged, function: MsixFunction
) -> None:
    everything = range(function.size)
    function.set_control(enable=True, function_mask=False)
    function.set_mask(False, *everything)
    function.set_mask(True, *everything)
    log = there.logged()
    for vector in everything:
        there.endpoint.fire(vector)
        there.endpoint.fire(vector)
    assert there.logged() == log
    function.set_mask(False, *everything)
    assert there.logged() == log + function.size
    taken = [delivery.vector for delivery in there.guest.log(log, log + function.size)]
    assert sorted(taken) == [function.idt_vector(vector) for vector in everything]


def test_a_masked_vector_is_pending_where_the_guest_looks_if_the_device_says_so(
    there: Plugged, function: MsixFunction
) -> None:
    # QEMU has no PBA of its own for this device: reads are the endpoint's (vfio_user_pba_read).
    function.set_control(enable=True, function_mask=False)
    last = function.size - 1
    assert function.pending() == set()
    there.endpoint.set_pending(last)
    assert function.pending() == {last}
    there.endpoint.set_pending(last, False)
    assert function.pending() == set()


def test_a_vector_that_was_never_unmasked_has_no_eventfd_of_its_own(
    there: Plugged, function: MsixFunction
) -> None:
    function.set_control(enable=True, function_mask=False)
    mark = there.endpoint.witness.mark()
    function.set_mask(False, 0)
    armed = there.endpoint.armed()
    assert armed is not None
    assert 0 in armed[1]
    events = there.endpoint.witness.since(mark, IrqsSet)
    assert [(event.index, event.start, event.count, event.fds) for event in events] == [
        (Irq.MSIX, 0, 1, 1)
    ]


def test_a_disabled_function_has_no_eventfds(there: Plugged, function: MsixFunction) -> None:
    function.set_control(enable=True, function_mask=False)
    function.set_mask(False, *range(function.size))
    function.set_control(enable=False, function_mask=False)
    assert there.endpoint.armed() is None


def test_all_vectors_that_a_table_can_have_are_delivered(plug: Callable[..., Plugged]) -> None:
    there = plug(vectors_of(2048))
    function = Folded(there.guest, SLOT)
    everything = range(2048)
    function.program(*everything)
    function.set_mask(False, *everything)
    mark = there.endpoint.witness.mark()
    function.set_control(enable=True, function_mask=False)
    assert there.endpoint.armed() == (Irq.MSIX, frozenset(everything))
    sizes = [event.fds for event in there.endpoint.witness.since(mark, IrqsSet)]
    assert sizes[-256:] == 256 * [8], "as many at once as max_msg_fds allows"
    before = [there.taken(function.idt_vector(vector)) for vector in range(128)]
    log = there.logged()
    for number, vector in enumerate(everything, 1):
        there.endpoint.fire(vector)
        if number % 128 == 0:  # no two of them have the same IDT vector
            there.await_logged(log + number)
    assert there.logged() == log + 2048
    after = [there.taken(function.idt_vector(vector)) for vector in range(128)]
    assert after == [count + 16 for count in before]


@pytest.mark.parametrize(
    "description",
    [
        Description(msix=Msix(8, 0, 0x800, 0, 0xFF0), bars=(Bar(0, 0x1000),)),
        Description(
            bars=(Bar(0, 0x1000), Bar(2, 0x4000, wide=True, prefetchable=True), Bar(4, 0x1000)),
            msix=Msix(33, table_bar=2, table_offset=0x2000, pba_bar=4, pba_offset=0x100),
        ),
        Description(express=False, reset=ResetBy.PM, msi=Msi(4), intx=1),
    ],
    ids=["one-bar", "64-bit", "conventional"],
)
def test_other_layouts_do_as_well(plug: Callable[..., Plugged], description: Description) -> None:
    there = plug(description)
    function = MsixFunction(there.guest, SLOT)
    last = function.size - 1
    function.program(0, last)
    function.set_control(enable=True, function_mask=False)
    function.set_mask(False, 0, last)
    log = there.logged()
    there.endpoint.fire(last)
    there.await_logged(log + 1)
    there.endpoint.fire(0)
    there.await_logged(log + 2)
    order = [delivery.vector for delivery in there.guest.log(log, there.logged())]
    assert order == [function.idt_vector(last), function.idt_vector(0)]
    function.write(0, 0, 0x5EEDCAFE)
    assert function.read(0, 0) == 0x5EEDCAFE


# MSI.


@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize("msi", [Msi(), Msi(wide=False, maskable=False)], ids=["64", "32"])
def test_each_message_of_msi_is_delivered_once(
    plug: Callable[..., Plugged], msi: Msi, count: int
) -> None:
    there = plug(Description(msix=None, msi=Msi(count, msi.wide, msi.maskable)))
    function = PciFunction(there.guest, SLOT)
    function.place_bars()
    at = find_capability(function.config(), MSI)
    assert at is not None
    first = 0x40  # the low bits of the data are the vector's
    function.write_config(at + 4, MSI_ADDRESS, 4)
    function.write_config(at + (0xC if msi.wide else 8), first, 2)
    function.write_config(at + 2, (count.bit_length() - 1) << 4 | 1, 2)
    assert there.endpoint.armed() == (Irq.MSI, frozenset(range(count)))
    log = there.logged()
    for number in range(count):
        there.endpoint.fire(number)
        there.await_logged(log + number + 1)
    order = [delivery.vector for delivery in there.guest.log(log, there.logged())]
    assert order == [first + number for number in range(count)]
    function.write_config(at + 2, 0, 2)
    assert there.endpoint.armed() is None


# INTx.  The probe has no driver for it: what counts is what QEMU does with the signal.


def test_intx_is_raised_and_unmasked_by_the_next_access(plug: Callable[..., Plugged]) -> None:
    there = plug(Description(intx=1))
    assert there.endpoint.armed() == (Irq.INTX, frozenset({0}))
    function = MsixFunction(there.guest, SLOT)
    mark = there.endpoint.witness.mark()
    for number in (1, 2):
        there.endpoint.fire()
        there.endpoint.fire()
        until(
            lambda n=number: len(there.machine.trace("vfio_intx_interrupt")) == 2 * n - 1,
            "QEMU to assert INTx",
            10,
        )
        function.read(0, 0)  # taken for the handling of the interrupt (vfio_pci_intx_eoi)
        until(
            lambda n=number: len(there.machine.trace("vfio_intx_interrupt")) == 2 * n,
            "the second signal, once unmasked",
            10,
        )
        function.read(0, 0)
    events = there.endpoint.witness.since(mark, IrqsSet)
    assert {(event.index, event.count, event.flags) for event in events} == {
        (Irq.INTX, 1, IrqSet.NONE | IrqSet.UNMASK)
    }
    assert len(events) == 4
    function.set_control(enable=True, function_mask=False)
    function.set_mask(False, 0)
    assert there.endpoint.armed() == (Irq.MSIX, frozenset({0}))


# DMA.


def test_the_device_reads_and_writes_the_guests_memory(
    there: Plugged, function: MsixFunction
) -> None:
    ram = there.machine.spec.ram
    data = os.urandom(0x3000)
    there.endpoint.dma_write(BUFFER + 1, data)
    assert there.machine.host.read(ram, BUFFER + 1, len(data)) == data
    (seen,) = there.guest.batch([Op(Verb.READ, BUFFER + 4)])
    assert seen == int.from_bytes(data[3:7], "little")
    there.guest.batch([Op(Verb.WRITE, BUFFER, 0x5EEDCAFE)])
    assert there.endpoint.dma_read(BUFFER, 4) == b"\xfe\xca\xed\x5e"
    with pytest.raises(DmaError, match="no client has mapped"):
        there.endpoint.dma_read(there.machine.spec.ram_mb << 20, 4)
    assert function.size == there.endpoint.vectors


def test_the_device_reaches_the_guests_memory_by_messages_too(
    plug: Callable[..., Plugged],
) -> None:
    there = plug(dma_by_message=True)
    PciFunction(there.guest, SLOT).place_bars()  # also lets it master the bus
    data = os.urandom(0x48001)  # more than one message takes
    there.endpoint.dma_write(BUFFER, data)
    assert there.machine.host.read(there.machine.spec.ram, BUFFER, len(data)) == data
    assert there.endpoint.dma_read(BUFFER, len(data)) == data
    (seen,) = there.guest.batch([Op(Verb.READ, BUFFER + 4)])
    assert seen == int.from_bytes(data[4:8], "little")


def test_a_pattern_is_in_the_guests_memory_to_the_byte(there: Plugged) -> None:
    ram = there.machine.spec.ram
    there.machine.host.write(ram, (BUFFER, bytes(512)))
    writer = there.endpoint.write_pattern(BUFFER, slots=64, rate_hz=4000)
    until(lambda: writer.count > 100, "the ring to be full", 10, pause_s=0.005)
    pattern = writer.stop()
    assert pattern.stalls == ()
    assert there.machine.host.read(ram, BUFFER, 512) == pattern.ring(bytes(512))


def test_all_of_the_guests_memory_is_mapped_with_its_file(there: Plugged) -> None:
    regions = [
        event
        for event in there.endpoint.witness.since(0, DmaMapped)
        if event.address == 0x100000 and event.offset is not None
    ]
    assert regions
    assert regions[-1].offset == 0x100000
    assert regions[-1].size == (there.machine.spec.ram_mb << 20) - 0x100000


# Resets.


def test_a_system_reset_is_a_reset_of_the_device(there: Plugged, function: MsixFunction) -> None:
    function.write(0, 0, 0x5EEDCAFE)
    mark = there.endpoint.witness.mark()
    loops = there.guest.look().loops
    there.machine.monitor.execute("system_reset")
    until(lambda: there.guest.look().loops < loops, "the guest to start again", 20)
    there.guest.wait_ready()
    assert there.endpoint.witness.since(mark, WasReset) == [WasReset("message", client=0)]
    assert MsixFunction(there.guest, SLOT).read(0, 0) == 0


@pytest.mark.parametrize("reset", [ResetBy.FLR, ResetBy.PM])
def test_a_guest_can_reset_the_function(plug: Callable[..., Plugged], reset: ResetBy) -> None:
    there = plug(Description(reset=reset))
    function = MsixFunction(there.guest, SLOT)
    capabilities = there.endpoint.device.capabilities
    function.write(0, 0, 0x5EEDCAFE)
    mark = there.endpoint.witness.mark()
    if reset is ResetBy.FLR:
        function.write_config(capabilities[EXPRESS] + 8, 0x8000, 2)
    else:
        function.write_config(capabilities[POWER] + 4, 3, 2)
        function.write_config(capabilities[POWER] + 4, 0, 2)
    assert there.endpoint.witness.since(mark, WasReset) == [WasReset(reset.value, client=0)]
    assert there.endpoint.device.read(0, 0, 4) == bytes(4)


def test_what_the_guest_writes_to_configuration_space_is_told(
    there: Plugged, function: MsixFunction
) -> None:
    mark = there.endpoint.witness.mark()
    function.write_config(0x3C, 0x5A, 1)
    assert there.endpoint.witness.since(mark, ConfigWritten) == [
        ConfigWritten(0x3C, 1, 0x5A, client=0)
    ]
    assert there.endpoint.device.read(Region.CONFIG, 0x3C, 1) == b"\x5a"


# What goes wrong.


def test_a_qemu_that_ends_takes_its_own_along_and_the_next_one_is_served(
    plug: Callable[..., Plugged], other_qemu: Callable[[Plugged], Plugged]
) -> None:
    there = plug()
    function = MsixFunction(there.guest, SLOT)
    function.set_control(enable=True, function_mask=False)
    function.set_mask(False, 0)
    there.machine.process.kill()
    until(lambda: not there.endpoint.clients, "QEMU to be missed", 10, pause_s=0.005)
    assert there.endpoint.armed() is None
    assert len(there.endpoint.witness.since(0, Disconnected)) == 1
    again = other_qemu(there)
    assert there.endpoint.clients == [1]
    again.machine.close()


def test_two_qemus_may_have_it_at_once(
    plug: Callable[..., Plugged], other_qemu: Callable[[Plugged], Plugged]
) -> None:
    there = plug()
    function = MsixFunction(there.guest, SLOT)
    function.program(0)
    function.set_control(enable=True, function_mask=False)
    function.set_mask(False, 0)
    other = other_qemu(there)
    assert there.endpoint.clients == [0, 1]
    log = there.logged()
    there.endpoint.fire(0)
    there.await_logged(log + 1)
    assert other.logged() == 0
    other.machine.close()


def test_a_device_that_dies_is_noticed_by_qemu(plug: Callable[..., Plugged]) -> None:
    there = plug()
    function = MsixFunction(there.guest, SLOT)
    there.endpoint.die()
    assert function.read(0, 0) == 0xFFFFFFFF
    assert there.machine.status() == "running"
    # QEMU's loop, which reads, and its CPU, which writes: the first of them names the reason.
    assert "vfio_region_read" in (said := there.machine.said())
    assert re.search("EOF|Broken pipe|Connection reset", said)


def test_a_device_that_does_not_answer_ends_the_start_of_qemu(
    make_endpoint: Callable[..., VfioUserEndpoint], a_machine: Callable[..., Machine]
) -> None:
    endpoint = make_endpoint()
    machine = a_machine(endpoint.qemu_device("dut", **{"x-msg-timeout": 50}))
    with endpoint.silence():
        machine.start()
        with pytest.raises(MachineDiedError, match="timed out waiting for reply"):
            machine.status()
    assert [type(event) for event in endpoint.witness.since(0, Event)][:1] == [Connected]


def test_a_device_that_does_not_answer_in_time_reads_as_all_ones(
    plug: Callable[..., Plugged],
) -> None:
    there = plug(device={"x-msg-timeout": 300})
    function = MsixFunction(there.guest, SLOT)
    with there.endpoint.silence():
        assert function.read(0, 0) == 0xFFFFFFFF
        there.endpoint.drop()
    assert "timed out waiting for reply" in there.machine.said()
    assert there.machine.status() == "running"


def test_a_slow_device_is_waited_for(there: Plugged, function: MsixFunction) -> None:
    function.write(0, 8, 0x5EEDCAFE)
    answers: list[int] = []
    reader = threading.Thread(target=lambda: answers.append(function.read(0, 8)))
    with there.endpoint.silence():
        reader.start()
        reader.join(0.1)
        loops = there.guest.look().loops
        reader.join(0.1)
        assert not answers
        assert there.guest.look().loops == loops, "the guest stands still in its access"
    reader.join(10)
    assert answers == [0x5EEDCAFE]
