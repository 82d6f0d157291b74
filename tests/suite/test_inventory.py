# SPDX-License-Identifier: GPL-2.0-or-later
"""An inventory says what is wrong with it in one line: file, entry, field."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.labs.inventory import load
from fixtures.matrix import Point
from images.errors import BadInputError

HOST = """
[[host]]
name = "rack3"
address = "192.0.2.17"
key = "key"
known_hosts = "known_hosts"
tags = ["intel", "fast"]
"""
DEVICE = """
[[host.device]]
address = "0000:41:00.0"
endpoint = "ivshmem"
irq = "msix:8"
reset = "bus"
fire = { command = ["raise", "{vector}"] }
"""
TRAFFIC = """
[[host.device]]
address = "0000:42:00.0"
fire = { traffic = "igb", peer = "eth3" }
"""


@pytest.fixture
def write(tmp_path: Path) -> object:
    for name in ("key", "known_hosts"):
        (tmp_path / name).touch()

    def write(text: str) -> Path:
        path = tmp_path / "lab.toml"
        path.write_text(text)
        return path

    return write


def test_a_host_with_a_device(write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (host,) = load(write(HOST + DEVICE))
    assert (host.name, host.port, host.user) == ("rack3", 22, "root")
    assert host.key == tmp_path / "key", "paths are relative to the file"
    assert host.device[0].fire.command == ("raise", "{vector}")
    assert host.lacks(Point.parse("msix:8")) is None


@pytest.mark.parametrize(
    ("point", "says"),
    [
        ("msix:64", "rack3 has no device with endpoint=ivshmem, irq=msix:64, reset=bus"),
        ("iommu=amd-iommu", "rack3 has intel-iommu"),
        ("container=iommufd", "rack3 has no iommufd"),
    ],
)
def test_what_a_host_cannot_do_has_a_reason(write, point, says) -> None:  # type: ignore[no-untyped-def]
    (host,) = load(write(HOST + "[host.limits]\niommufd = false\n" + DEVICE))
    assert host.lacks(Point.parse(point)) == says


def test_a_device_that_a_driver_has_traffic_through(write) -> None:  # type: ignore[no-untyped-def]
    (host,) = load(write(HOST + DEVICE + TRAFFIC))
    assert [device.name for device in host.device] == ["ivshmem-msix8-bus", "igb"]
    assert host.lacks_traffic("igb") is None
    assert host.lacks_traffic("nvme") == "rack3 has no device with fire.traffic=nvme"


def test_hosts_are_chosen_by_names_and_tags(write) -> None:  # type: ignore[no-untyped-def]
    path = write(HOST + HOST.replace("rack3", "rack4").replace(', "fast"', ""))
    assert [host.name for host in load(path)] == ["rack3", "rack4"]
    assert [host.name for host in load(path, ["rack4"])] == ["rack4"]
    assert [host.name for host in load(path, tags=["intel", "fast"])] == ["rack3"]
    with pytest.raises(BadInputError, match="no host 'rack5': there are rack3, rack4"):
        load(path, ["rack5"])
    with pytest.raises(BadInputError, match="no host with the tags amd"):
        load(path, tags=["amd"])


BAD = {
    "no TOML": ("[[host]", "lab.toml: "),
    "no hosts": ("", "lab.toml: no host"),
    "a table": ("[host]\nname = 'x'", "host: Expected `array`"),
    "an unknown field": (HOST + "adress = 'x'", "host rack3: adress: Object contains unknown"),
    "a missing field": (HOST.replace("address", "#"), "host rack3: address: Object missing"),
    "no number": (HOST + "port = 'ssh'", "host rack3: port: Expected `int`, got `str`"),
    "no port": (HOST + "port = 70000", "host rack3: port: Expected `int` <= 65535"),
    "a number": (HOST.replace('"192.0.2.17"', "1"), "host rack3: address: Expected `str`"),
    "a host without a name": (HOST.replace("name =", "name_ ="), "host 1: "),
    "no name": (HOST.replace("rack3", "../x"), "host ../x: name: "),
    "a name twice": (HOST + HOST, "host rack3: name: another host has it"),
    "no key": (HOST.replace('"key"', '"no/key"'), "host rack3: key: "),
    "no known hosts": (HOST.replace('"known_hosts"', '"no"'), "host rack3: known_hosts: "),
    "no known hosts at all": (HOST.replace("known_hosts = ", "#"), "host rack3: known_hosts: "),
    "a relative place": (HOST + "place = 'x'", "host rack3: place: 'x' is no absolute path"),
    "no such IOMMU": (
        HOST + "[host.limits]\niommu = 'arm-smmu'",
        "host rack3: limits: iommu: Invalid enum value 'arm-smmu'",
    ),
    "no guests": (HOST + "[host.limits]\nguests = 0", "host rack3: limits: guests: Expected"),
    "no address": (
        HOST + DEVICE.replace("0000:41:00.0", "41:0.0"),
        "host rack3: device 1: address: ",
    ),
    "two addresses": (HOST + DEVICE + 'id = "1af4:1110"', "host rack3: device 1: address: give"),
    "no such kind": (
        HOST + DEVICE.replace("msix:8", "msix:3"),
        "host rack3: device 1: irq: irq has no value 'msix:3'",
    ),
    "what cannot be": (
        HOST + DEVICE.replace("msix:8", "intx"),
        "host rack3: device 1: endpoint: endpoint=ivshmem rules out irq=intx",
    ),
    "no vector": (
        HOST + DEVICE.replace("{vector}", "3"),
        "host rack3: device 1: fire.command: it has no {vector} in it",
    ),
    "nothing that fires": (
        HOST + DEVICE.replace('command = ["raise", "{vector}"]', ""),
        "host rack3: device 1: fire: give an endpoint, a command or traffic",
    ),
    "no endpoint": (
        HOST + DEVICE.replace('endpoint = "ivshmem"', ""),
        "host rack3: device 1: endpoint: ",
    ),
    "two things that fire": (
        HOST + TRAFFIC.replace("traffic", 'command = ["{vector}"], traffic'),
        "host rack3: device 1: fire: give an endpoint, a command or traffic",
    ),
    "a peer without traffic": (
        HOST + DEVICE.replace("fire = {", 'fire = { peer = "eth3",'),
        "host rack3: device 1: fire.peer: there is no traffic",
    ),
    "no such driver": (
        HOST + TRAFFIC.replace("igb", "ixgbe"),
        "host rack3: device 1: fire: traffic: Invalid enum value 'ixgbe'",
    ),
    "traffic at a point": (
        HOST + TRAFFIC + 'irq = "msix:8"',
        "host rack3: device 1: irq: what has traffic is no point",
    ),
    "traffic from nowhere": (
        HOST + TRAFFIC.replace(', peer = "eth3"', ""),
        "host rack3: device 1: fire.peer: igb and e1000e have",
    ),
    "a disk with a cable": (
        HOST + TRAFFIC.replace("igb", "nvme"),
        "host rack3: device 1: fire.peer: igb and e1000e have",
    ),
    "no keeper": (
        HOST + DEVICE.replace('command = ["raise", "{vector}"]', 'endpoint = "x"'),
        "host rack3: device 1: fire.endpoint: the host has no keeper that could",
    ),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_said_in_one_line(write, text, says) -> None:  # type: ignore[no-untyped-def]
    path = write(text)
    with pytest.raises(BadInputError) as caught:
        load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert says in said
    assert len(said.splitlines()) == 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"lab\.toml: No such file"):
        load(tmp_path / "lab.toml")
