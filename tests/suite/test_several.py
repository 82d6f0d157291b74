# SPDX-License-Identifier: GPL-2.0-or-later
"""Which functions an arrangement has, what a lab host needs for them, how they are plugged in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.bench import _equipment
from fixtures.endpoints import IvshmemDoorbell
from fixtures.endpoints.igb import VirtualFunction, virtual_functions
from fixtures.hosts.pci import PciDevice
from fixtures.matrix import Point
from fixtures.several import ARRANGEMENTS, Arrangements, Multifunction, Together
from images.errors import BadInputError


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_it_is_named_by_its_first_function_and_the_arrangement(name: str) -> None:
    together = Together.parse(f"msix:8+iommufd+trap+{name}")
    assert str(together) == f"msix:8+iommufd+trap+{name}"
    assert together.functions[0] == Point.parse("msix:8+iommufd+trap")
    assert len(together.functions) + ARRANGEMENTS[name].virtual >= 2
    assert together != together.functions[0]


def test_an_arrangement_that_does_not_exist_is_told() -> None:
    with pytest.raises(BadInputError, match="no arrangement is called 'msix:8': twins, kinds, "):
        Together.parse("msix:8")


def test_further_functions_differ_as_the_arrangement_says() -> None:
    kinds = Together.parse("msix:8+cpr-exec+kinds").functions
    assert [str(each) for each in kinds] == [
        "msix:8+cpr-exec",
        "msi:8+cpr-exec+vfio-user",
        "intx+cpr-exec+vfio-user",
    ]
    mixed = Together.parse("msix:8+iommufd+trap+mixed").functions
    assert [each.container for each in mixed] == ["iommufd", "type1"]


def test_each_function_has_an_endpoint_of_its_own_and_there_is_a_further_one() -> None:
    assert list(_equipment(Point())) == ["ivshmem-msix8-bus"]
    twins = _equipment(Together.parse("msix:8+twins"))
    assert list(twins) == [
        "ivshmem-msix8-bus",
        "ivshmem-msix8-bus-second",
        "ivshmem-msix8-bus-spare",
    ]
    one_device = list(_equipment(Together.parse("msix:8+multifunction")))
    assert [name.rpartition("-")[2] for name in one_device] == [
        "multifunction.0",
        "multifunction.1",
        "spare",
    ]


def test_a_profile_has_what_the_module_says_and_full_has_it_in_each_mode() -> None:
    coverage = Arrangements("msix:8+twins", also=("msix:8+iommufd+trap+objects",))
    assert list(map(str, coverage.points("main"))) == ["msix:8+twins"]
    quick = list(map(str, coverage.points("quick")))
    assert quick == ["msix:8+twins", "msix:8+iommufd+trap+objects"]
    assert list(map(str, coverage.points("full"))) == [
        "msix:8+twins",
        "msix:8+cpr-exec+twins",
        "msix:8+iommufd+trap+objects",
        "msix:8+cpr-exec+iommufd+trap+objects",
    ]


def test_a_point_that_is_named_stands_for_all_arrangements_that_begin_with_it() -> None:
    coverage = Arrangements("msix:8+twins", also=("msix:8+kinds", "msix:8+iommufd+trap+twins"))
    named = coverage.points("main", [Point()])
    assert list(map(str, named)) == ["msix:8+twins", "msix:8+kinds"]
    assert not coverage.points("main", [Point(irq="msix:64")])


def test_functions_of_one_device_are_plugged_in_one_by_one(tmp_path: Path) -> None:
    device = Multifunction([IvshmemDoorbell(2), IvshmemDoorbell(2)])
    words, streams = device.plug("pair", "port3", tmp_path)
    assert [word.partition(",chardev")[0] for word in words if word.startswith("ivshmem")] == [
        "ivshmem-doorbell,id=pair-0,bus=port3,addr=0.0,multifunction=on",
        "ivshmem-doorbell,id=pair-1,bus=port3,addr=0.1,multifunction=on",
    ]
    assert len(streams) == 2
    for stream in streams:
        stream.close()
    device.close()


def test_a_virtual_function_raises_what_it_lets_through_and_forgets() -> None:
    written: list[tuple[int, ...]] = []
    endpoint, function = VirtualFunction(), SimpleNamespace(write=lambda *w: written.append(w))
    endpoint.function = function  # type: ignore[assignment]
    endpoint.fire(2)
    assert written == [(0, 0x1524, 7), (0, 0x152C, 7), (0, 0x1520, 1 << 2)]


def test_virtual_functions_are_where_their_physical_function_says() -> None:
    host: Any = SimpleNamespace(
        run=lambda _: SimpleNamespace(
            out="/sys/devices/a/0000:02:10.0\n/sys/devices/a/0000:02:10.2\n"
        )
    )
    devices = virtual_functions(host, PciDevice(host, "0000:02:00.0"), 2)
    assert [device.address for device in devices] == ["0000:02:10.0", "0000:02:10.2"]
