# SPDX-License-Identifier: GPL-2.0-or-later
"""A binary is asked what it is and can do; what cannot be verified is told and why."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fixtures.hosts.nested import NEW_SYSROOT, SYSROOT
from fixtures.machines import Capabilities, identify
from fixtures.subject import Subject, Successor
from fixtures.waiting import until
from images.errors import BadInputError, EnvironmentFault
from images.sysroot import QEMU_BINARY, Sysroot


@dataclass(frozen=True)
class Scripted(Sysroot):
    """A sysroot whose QEMU is a shell script."""

    script: str = ""

    def qemu(self, *args: str) -> list[str]:
        return ["sh", "-c", self.script, "qemu", *args]


@dataclass(frozen=True)
class Answers:
    """What a QEMU answers in an interview; the defaults are those of one that can all."""

    arch: str = "x86_64"
    types: tuple[str, ...] = ("vfio-pci", "edu")
    modes: tuple[str, ...] = ("normal", "cpr-reboot", "cpr-transfer")
    vmstate: str = '{"vfio-pci": {"Description": {"name": "vfio-cpr-pci"}}}'
    trace: str = "vfio_msi_interrupt"

    def script(self) -> str:
        schema = [
            {"name": "0", "meta-type": "object", "members": []},
            {"name": "1", "meta-type": "enum", "values": ["on", "off"]},
            {"name": "2", "meta-type": "enum", "values": list(self.modes)},
        ]
        replies = [
            {"QMP": {}},
            {"return": {}},
            {"return": {"arch": self.arch}},
            {"return": [{"name": name} for name in self.types]},
            {"return": schema},
            {"event": "SHUTDOWN"},
            {"return": {}},
        ]
        text = "\n".join(json.dumps(reply) for reply in replies)
        return f"""
            for last; do :; done
            case "$*" in
            --version) echo 'QEMU emulator version 11.0.50 (v11.0.0-99-gabc)'
                       echo 'Copyright (c) 2003-2026 Fabrice Bellard and others' ;;
            *-qmp*) for command in 1 2 3 4; do read -r line; done; echo '{text}' ;;
            *-dump-vmstate*) echo '{self.vmstate}' > "$last" ;;
            *trace:help*) echo '{self.trace}' ;;
            esac
        """


def interview(**answers: object) -> Capabilities:
    script = Answers(**answers).script()  # type: ignore[arg-type]
    return identify(Scripted(Path("/"), script), "a script", "0" * 64)


# The packaged QEMU, which is real.


def test_the_packaged_qemu_can_all_that_is_needed(packaged: Sysroot) -> None:
    found = identify(packaged, "the packaged QEMU", "1" * 64)
    assert found.version[0].isdigit()
    assert "Debian" in found.version
    assert found.sha256 == "1" * 64
    assert {"normal", "cpr-reboot", "cpr-transfer"} <= set(found.modes)
    assert (found.vfio_pci, found.vfio_cpr, found.iommufd) == (True,) * 3
    assert (found.vfio_user, found.log_trace) == (True,) * 2
    found.require_cpr_transfer()


# QEMUs that lack something, played by a script.


def test_a_qemu_that_can_all_is_recognised() -> None:
    found = interview()
    assert found == Capabilities(
        version="11.0.50 (v11.0.0-99-gabc)",
        sha256="0" * 64,
        modes=("normal", "cpr-reboot", "cpr-transfer"),
        vfio_pci=True,
        vfio_cpr=True,
        iommufd=False,
        vfio_user=False,
        log_trace=True,
    )
    found.require_cpr_transfer()


def test_a_qemu_with_vfio_user_is_recognised() -> None:
    assert interview(types=("vfio-pci", "vfio-user-pci")).vfio_user


def test_a_qemu_with_iommufd_is_recognised() -> None:
    assert interview(types=("vfio-pci", "iommufd")).iommufd


LACKS = {
    "vfio-pci": ({"types": ("edu",)}, {"vfio_pci": False}, "built without vfio-pci"),
    "the mode": (
        {"modes": ("normal", "cpr-reboot")},
        {"modes": ("normal", "cpr-reboot")},
        "no migration mode cpr-transfer, which came with QEMU 10.0",
    ),
    "any mode": ({"modes": ("normal",)}, {"modes": ()}, "no migration mode cpr-transfer"),
    "vfio's part": (
        {"vmstate": '{"vfio-pci": {"Description": {"name": "vfio-pci"}}}'},
        {"vfio_cpr": False},
        "vfio-pci takes no part in it",
    ),
    "any state of vfio-pci": ({"vmstate": "{}"}, {"vfio_cpr": False}, "takes no part"),
}


@pytest.mark.parametrize(("answers", "found", "says"), LACKS.values(), ids=LACKS)
def test_what_a_qemu_lacks_is_told(
    answers: dict[str, object], found: dict[str, object], says: str
) -> None:
    capabilities = interview(**answers)
    assert capabilities == dataclasses.replace(interview(), **found)  # type: ignore[arg-type]
    with pytest.raises(EnvironmentFault, match=r"^11\.0\.50 .*") as caught:
        capabilities.require_cpr_transfer()
    assert says in str(caught.value)
    assert "nothing can be verified" in str(caught.value)


def test_a_qemu_without_traces_can_be_verified() -> None:
    found = interview(trace="qemu_loadvm_state")
    assert found.log_trace is False
    found.require_cpr_transfer()


def test_a_qemu_without_a_dump_is_not_taken_for_one_without_vfios_part() -> None:
    with pytest.raises(EnvironmentFault, match=r"a script: .* leaves no dump .* it says: nothing"):
        interview(vmstate="not JSON")
    lost = (
        Answers().script().replace("*-dump-vmstate*)", "*-dump-vmstate*) echo no ROM >&2 ;; none)")
    )
    with pytest.raises(EnvironmentFault, match=r"leaves no dump .*No such file.* it says: no ROM"):
        identify(Scripted(Path("/"), lost), "a script", "")


def test_a_qemu_that_is_killed_is_not_taken_for_one_that_lacks_something() -> None:
    killed = Answers().script().replace("*trace:help*)", "*trace:help*) kill -9 $$ ;; none)")
    with pytest.raises(EnvironmentFault, match=r"with -d trace:help it was killed by signal 9"):
        identify(Scripted(Path("/"), killed), "a script", "")


# What is no QEMU.


def test_a_program_that_is_no_qemu_is_quoted(packaged: Sysroot, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / QEMU_BINARY).parent.mkdir(parents=True)
    (tree / "usr/lib").symlink_to(packaged.root / "usr/lib")
    shutil.copy("/bin/ls", tree / QEMU_BINARY)
    with pytest.raises(BadInputError, match=r"^mine: not a QEMU .* 'ls \(GNU coreutils\)"):
        identify(Sysroot(tree), "mine", "")


NOT_QEMU = {
    "says nothing": ("exit 1", "'nothing'"),
    "complains": ("echo cannot open shared object file >&2; exit 127", "'cannot open shared"),
    "is qemu-img": ("echo qemu-img version 11.1.3", "'qemu-img version 11.1.3'"),
    "speaks no text": (r"printf '\377\376'", "not a QEMU system emulator"),
    "speaks no QMP": (
        'case "$1" in --version) echo QEMU emulator version 1.2;; *) echo no such option >&2; esac',
        "does not speak QMP: no such option",
    ),
    "emulates another machine": (Answers(arch="aarch64").script(), "emulates aarch64"),
}


@pytest.mark.parametrize(("script", "says"), NOT_QEMU.values(), ids=NOT_QEMU)
def test_what_is_no_qemu_for_this_is_bad_input(script: str, says: str) -> None:
    with pytest.raises(BadInputError, match=r"^mine: ") as caught:
        identify(Scripted(Path("/"), script), "mine", "")
    assert says in str(caught.value)


def test_what_cannot_be_started_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"^mine: cannot be started: No such file"):
        identify(Sysroot(tmp_path), "mine", "")


def test_what_two_qemus_share_is_what_both_can() -> None:
    modes = ("normal", "cpr-transfer")
    newer = Capabilities(
        "11.1.3",
        "1",
        (*modes, "cpr-exec"),
        True,
        True,
        True,
        True,
        True,
        frozenset({"10.1", "10.2", "11.1"}),
    )
    older = Capabilities(
        "10.2.2", "2", modes, True, True, False, True, False, frozenset({"10.1", "10.2"})
    )
    shared = newer.shared_with(older)
    assert (shared.version, shared.sha256) == ("11.1.3", "1")
    assert shared.modes == modes
    assert (shared.iommufd, shared.vfio_user, shared.log_trace) == (False, True, False)
    subject = Subject(
        "new",
        shared,
        Sysroot(Path("/a")),
        Path(),
        None,
        Successor("old", older, Sysroot(Path("/b"))),
    )
    assert subject.machine == "pc-q35-10.2"
    assert subject.versions == ("11.1.3", "10.2.2")
    assert subject.local(NEW_SYSROOT) == Sysroot(Path("/b"))
    assert subject.local(SYSROOT) == Sysroot(Path("/a"))


def test_the_packaged_qemu_has_versions_of_its_machine(packaged: Sysroot) -> None:
    assert {"10.1", "10.2"} <= identify(packaged, "it", "").machines


ASK_IN_VAIN = """
from fixtures.machines import binary
from images.sysroot import Sysroot
from pathlib import Path
qmp = binary._Interview.qmp
binary._Interview.qmp = lambda ask, *commands: qmp(ask, "no-such-command")
binary.identify(Sysroot(Path({tree!r})), "a QEMU", "0" * 64)
"""


def test_a_qemu_that_is_asked_does_not_outlive_who_asks(packaged: Sysroot) -> None:
    mark = f"VFIO_CPR_TEST={secrets.token_hex(8)}"

    def asked() -> list[str]:
        listing = subprocess.run(
            f"grep -ls {mark} /proc/[0-9]*/environ", shell=True, capture_output=True, text=True
        ).stdout.split()
        found: list[str] = []
        for entry in listing:
            with contextlib.suppress(OSError):
                command = Path(entry).with_name("cmdline").read_bytes()
                found += [entry] if b"\0stdio\0" in command else []
        return found

    asker = subprocess.Popen(
        [sys.executable, "-c", ASK_IN_VAIN.format(tree=str(packaged.root))],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **dict([mark.split("=")])},
    )
    until(asked, "QEMU to be asked", 60, pause_s=0.05)
    asker.kill()
    asker.wait()
    until(lambda: not asked(), "QEMU to end", 20, pause_s=0.05)
