# SPDX-License-Identifier: GPL-2.0-or-later
"""Options and the list of plugins; what they do is in fixtures/."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.coverage import PROFILES

pytest_plugins = [
    "fixtures.plugin",
    "fixtures.soak",
    "fixtures.evidence.verdict",
    "fixtures.developer",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vfio-cpr-suite")
    group.addoption("--qemu", type=Path, metavar="PATH", help="verify this QEMU binary")
    group.addoption(
        "--qemu-sysroot",
        type=Path,
        metavar="DIR",
        help="the root tree that binary belongs to, if its libraries are not here",
    )
    group.addoption(
        "--firmware",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a directory with firmware for that binary, as QEMU's -L",
    )
    group.addoption(
        "--qemu-suite",
        metavar="SUITE",
        help="verify the QEMU of this Debian suite (default: trixie-backports)",
    )
    group.addoption("--qemu-version", metavar="VERSION", help="this Debian version of it")
    group.addoption("--new-qemu", type=Path, metavar="PATH", help="this QEMU binary takes over")
    group.addoption("--new-qemu-sysroot", type=Path, metavar="DIR", help="see --qemu-sysroot")
    group.addoption("--new-qemu-suite", metavar="SUITE", help="see --qemu-suite")
    group.addoption("--new-qemu-version", metavar="VERSION", help="see --qemu-version")
    group.addoption(
        "--lab-kernel",
        choices=("auto", "built", "debian"),
        default="auto",
        help="the lab host's kernel: our own, Debian's, or our own if it is there",
    )
    group.addoption(
        "--profile",
        choices=PROFILES,
        default="main",
        help="what to cover: "
        + "; ".join(f"{name}: {what}" for name, what in PROFILES.items())
        + " (default: main)",
    )
    group.addoption(
        "--hours",
        type=float,
        default=1.0,
        metavar="H",
        help="for how long the profile soak goes on (default: 1)",
    )
    group.addoption(
        "--point",
        action="append",
        default=[],
        metavar="AXIS=VALUE,...",
        help="only this point of the matrix; may be given several times",
    )
    group.addoption(
        "--changed",
        action="append",
        default=[],
        metavar="FILE",
        help="only what can notice a change in this file of QEMU; may be given several times",
    )
    group.addoption("--only-failed", action="store_true", help="only what failed in the last run")
    group.addoption(
        "--hold",
        action="store_true",
        help="wait at the first failure, with everything up; ci/verify has it as --debug",
    )
    group.addoption(
        "--keep-evidence", action="store_true", help="also keep the evidence of what passes"
    )
    group.addoption(
        "--group",
        action="append",
        default=[],
        metavar="MODULE[POINT]",
        help="only this group of tests, which share a takeover; may be given several times",
    )
    group.addoption("--shard", metavar="I/N", help="only the I-th of N shares, such as 1/4")
    group.addoption(
        "--durations-from",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="balance shards by the times in this verdict; may be given several times",
    )
    group.addoption(
        "--statemachine-steps",
        type=int,
        default=30,
        metavar="N",
        help="steps of each random sequence (default: 30)",
    )
    group.addoption(
        "--statemachine-sequences",
        type=int,
        metavar="N",
        help="random sequences of each test that plays them (default: by profile, main has none)",
    )
    group.addoption("--inventory", type=Path, metavar="FILE", help="verify on a host of this lab")
    group.addoption(
        "--host", action="append", default=[], metavar="NAME", help="this host of the lab"
    )
    group.addoption(
        "--tag", action="append", default=[], metavar="TAG", help="hosts of the lab with this tag"
    )
    group.addoption(
        "--wait", type=float, default=0, metavar="S", help="wait so long for a host to be free"
    )
    group.addoption(
        "--cases", type=Path, metavar="FILE", help="only the cases whose ids are lines of this file"
    )
    group.addoption("--cache", type=Path, metavar="DIR", help="where images are kept")
    group.addoption(
        "--evidence",
        type=Path,
        metavar="DIR",
        default=Path("evidence"),
        help="where failing cases leave evidence (default: evidence/)",
    )
    group.addoption(
        "--verdict-json", type=Path, metavar="FILE", help="write the verdict as JSON too"
    )
    group.addoption("--html", type=Path, metavar="FILE", help="write the report there")
