# SPDX-License-Identifier: GPL-2.0-or-later
"""The command behind ci/verify: bad input costs seconds, and is one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from fixtures.matrix import listing
from fixtures.verify import main
from images.cache import Cache

ROOT = Path(__file__).parents[2]

BAD_INPUT, COULD_NOT_VERIFY = 2, 3


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "qemu"
    path.write_text("#!/bin/sh\necho QEMU emulator version 11.1.3\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


BAD = {
    "no such file": (["--qemu", "/no/such/qemu"], "/no/such/qemu: no such file"),
    "a directory": (["--qemu", "/tmp"], "/tmp: not a file"),
    "a script": (["--qemu", "qemu"], "qemu: not an ELF executable"),
    "another program": (["--qemu", "/bin/ls"], "not a QEMU system emulator"),
    "a sysroot of nothing": (["--qemu-sysroot", "/"], "there is no --qemu"),
    "firmware of nothing": (["-L", "/"], "there is no --qemu"),
    "a sysroot that is none": (
        ["--qemu", "/bin/ls", "--qemu-sysroot", "/proc"],
        "a root tree with its own libraries is expected",
    ),
    "two choices": (["--qemu", "/bin/ls", "--qemu-suite", "sid"], "one or the other"),
    "no such successor": (["--new-qemu", "/no/new"], "--new-qemu /no/new: no such file"),
    "a successor's sysroot": (["--new-qemu-sysroot", "/"], "there is no --new-qemu"),
    "two successors": (
        ["--new-qemu", "/bin/ls", "--new-qemu-version", "1"],
        "--new-qemu names a binary, --new-qemu-suite and --new-qemu-version choose",
    ),
    "an unknown option": (["--no-such-option"], "--no-such-option"),
    "a shortened option": (["--qemu-s", "sid"], "--qemu-s"),
    "not a number of workers": (["-n", "many"], "-n"),
    "no such point": (["--point", "msix:3"], "--point msix:3: no axis has the value 'msix:3'"),
    "a point that cannot be": (["--point", "ivshmem,intx"], "has MSI-X alone (see --list-axes)"),
    "a shard beyond the last": (["--shard", "5/4"], "--shard 5/4: a shard is I/N"),
    "no shard": (["--shard", ""], "a shard is I/N with I from 1 to N, such as 1/4"),
    "no such record": (["--shard", "1/2", "--durations-from", "no.json"], "no.json: No such file"),
    "a record that is none": (
        ["--shard", "1/2", "--durations-from", "qemu"],
        "--durations-from qemu: not a verdict (--verdict-json writes one)",
    ),
    "no such group": (["--group", "takeover"], "--group takeover: no such module (see"),
    "a time for another profile": (["--hours", "1"], "--hours is for --profile soak"),
    "no place for the verdict": (["--verdict-json", "/proc/x/y.json"], "/proc/x/y.json"),
    "no place for the report": (["--html", "/proc/x/y.html"], "--html /proc/x/y.html: "),
    "a directory for the verdict": (["--verdict-json", "/tmp"], "--verdict-json /tmp: Is a"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD)
@pytest.mark.usefixtures("text_file")
def test_bad_input_is_one_clear_line(
    cache: Cache,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.setattr(pytest, "main", lambda _: pytest.fail("it went on all the same"))
    assert main(["-q", "--cache", str(cache.root), *arguments]) == BAD_INPUT
    said = capfd.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("ci/verify: ")
    assert says in line


@pytest.mark.parametrize("place", ["/proc/cache", "qemu/cache"])
@pytest.mark.usefixtures("text_file")
def test_an_unusable_cache_is_one_clear_line(capfd: pytest.CaptureFixture[str], place: str) -> None:
    assert main(["--cache", place]) == COULD_NOT_VERIFY
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("ci/verify: the cache directory ")
    assert "--cache" in line


def test_a_value_that_is_no_choice_names_the_choices(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--lab-kernel", "newest"])
    assert caught.value.code == BAD_INPUT
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("ci/verify: error: argument --lab-kernel: ")
    assert "'built'" in last


@pytest.mark.parametrize("hours", ["0", "-1", "soon", "nan", "inf"])
def test_a_time_that_is_none_is_told(capfd: pytest.CaptureFixture[str], hours: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--profile", "soak", f"--hours={hours}"])
    assert caught.value.code == BAD_INPUT
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"argument --hours: '{hours}' is no number of hours above 0" in last


# As a command, to the end.


def verify(
    cache: Cache, *arguments: str, stdout: IO[str] | int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "fixtures.verify"),
            *("-q", "-n", "1", "--cache", str(cache.root), *arguments),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )


def test_a_bad_qemu_ends_the_command_with_its_exit_code(cache: Cache) -> None:
    done = verify(cache, "--qemu", "/no/such/qemu")
    assert (done.returncode, done.stdout) == (BAD_INPUT, "")
    assert done.stderr == "ci/verify: --qemu /no/such/qemu: no such file\n"


@pytest.mark.parametrize("arguments", [["--list-axes"], ["-k", "no_such_behaviour"]], ids=" ".join)
def test_that_nobody_reads_what_it_prints_is_one_clear_line(
    cache: Cache, arguments: list[str]
) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as stdout:
        done = verify(cache, *arguments, stdout=stdout)
    assert done.returncode == COULD_NOT_VERIFY
    assert done.stderr == "ci/verify: nobody reads any more what it prints\n"


def test_the_axes_are_listed_and_nothing_is_done(cache: Cache) -> None:
    done = verify(cache, "--list-axes", "--qemu", "/no/such/qemu")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == listing() + "\n"


def test_groups_are_listed_and_nothing_is_done(cache: Cache) -> None:
    done = verify(cache, "--list-groups", "--profile", "smoke", "--qemu", "/no/such/qemu")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tests/qemu/test_direct.py[8-vectors] 9\n" in done.stdout


def test_groups_are_tried_by_name(cache: Cache) -> None:
    one = ("--group", "tests/qemu/test_takeover.py[msix:8]")
    module = ("--group", "tests/qemu/test_pending.py")
    done = verify(cache, "--list-groups", *one, *module)
    assert done.returncode == 0
    names = [line.rpartition(" ")[0] for line in done.stdout.splitlines()]
    assert [name for name in names if "takeover" in name] == [one[1]]
    assert {name.partition("[")[0] for name in names} == {one[1].partition("[")[0], module[1]}


def test_a_choice_that_matches_no_test_is_not_good(cache: Cache, tmp_path: Path) -> None:
    done = verify(cache, "-k", "no_such_behaviour", "--verdict-json", "a/verdict.json")
    assert done.returncode == COULD_NOT_VERIFY
    assert done.stderr == "ci/verify: nothing was verified: no test matches\n"
    assert "GOOD" not in done.stdout
    assert '"exit": 3' in (tmp_path / "a/verdict.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["-k", "not ("], "Wrong expression"), (["no_such_file.py"], "file or directory not found")],
    ids=["expression", "file"],
)
def test_what_pytest_itself_finds_bad_is_bad_input(
    cache: Cache, arguments: list[str], says: str
) -> None:
    done = verify(cache, *arguments)
    assert done.returncode == BAD_INPUT
    (line,) = filter(None, done.stderr.splitlines())
    assert says in line
