# SPDX-License-Identifier: GPL-2.0-or-later
"""What a Linux guest says of its device, compared with what it said before."""

from __future__ import annotations

from typing import Any

from fixtures.linux.account import Account, Befallen
from fixtures.linux.nic import Networking

BOOTED = "[    0.000000] Linux version\n[    1.500000] igb: eth0 NIC Link is Up\n"


def account(**changes: Any) -> Account:
    said: dict[str, Any] = {
        "boot": "a",
        "uptime_s": 1.0,
        "identity": {},
        "mishaps": {"carrier_changes": 2, "tx_timeout": 0},
        "interrupts": {},
        "log": BOOTED,
        "complaints": "igb|eth0",
    }
    return Account(**{**said, **changes})


def test_nothing_has_befallen_a_device_of_which_the_same_is_said() -> None:
    later = account(uptime_s=2.0, log=BOOTED + "[   12.345678] PM: suspend exit\n")
    assert later.since(account()) == Befallen({"carrier_changes": 0, "tx_timeout": 0})


def test_what_has_happened_since_is_counted() -> None:
    later = account(mishaps={"carrier_changes": 4, "tx_timeout": 1})
    assert later.since(account()).mishaps == {"carrier_changes": 2, "tx_timeout": 1}


def test_what_has_been_said_of_the_device_since_has_no_time() -> None:
    log = BOOTED + "[   12.345678] igb 0000:01:00.0: Reset adapter\n[  112.345678] eth0 gone\n"
    assert account(log=log).since(account()).reports == {
        "igb 0000:01:00.0: Reset adapter",
        "eth0 gone",
    }


def test_a_guest_that_was_booted_has_said_all_of_its_log_since() -> None:
    log = BOOTED.replace("1.5", "1.6")
    assert account(log=log).since(account()).reports == {"igb: eth0 NIC Link is Up"}


SAID = """\
The test result is FAIL
The test extra info:
Register test  (offline)\t 376
Interrupt test (offline)\t 0
Link test   (on/offline)\t 0

"""


class Tested:
    """A guest whose driver's own test says this, and whose network controller has a carrier."""

    has_traffic = True

    def cease(self) -> None:
        self.has_traffic = False

    def run(self, command: str, deadline_s: float) -> str:
        assert not self.has_traffic
        assert command.startswith("ethtool -t eth0 offline")
        assert deadline_s
        return SAID

    def read(self, path: str) -> str:
        assert path == "/sys/class/net/eth0/carrier"
        return "1\n"


def test_the_errors_of_each_part_of_a_drivers_own_test_are_told() -> None:
    guest: Any = Tested()
    found = Networking("igb").self_test(guest)
    assert found == {"Register test": 376, "Interrupt test": 0, "Link test": 0}
