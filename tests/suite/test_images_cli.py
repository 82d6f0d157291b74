# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m images``: what it prints, how it ends, and what it leaves when it is stopped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import images
from fixtures.waiting import until
from images.__main__ import main
from images.progress import Progress

ROOT = Path(images.__file__).parents[1]
NOBODY = 65534

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "images", *map(str, arguments)]


def command_as(user: int, *arguments: str | Path) -> list[str]:
    """The command, run by somebody who may not read our virtual environment: it is imported
    before the privileges are dropped."""
    script = (
        "import os, sys; from images.__main__ import main; os.setgroups([]); "
        f"os.setgid({user}); os.setuid({user}); sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", script, *map(str, arguments)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the default cache is: nothing may be written to the true one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VFIO_CPR_CACHE", raising=False)
    return tmp_path / "xdg/vfio-cpr-suite"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH without any program in it."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line that was printed."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_the_key_is_that_of_all_that_is_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(**keys: str) -> str:
        recipes = {name: SimpleNamespace(key=lambda _, k=k: k) for name, k in keys.items()}
        monkeypatch.setattr("images.__main__._recipes", lambda *_: recipes)
        assert main(["key"]) == 0
        return capsys.readouterr().out

    names = dict.fromkeys(("probe", "qemu", "qemu-image", "labroot", "lab-kernel"), "a")
    assert key(**names) == key(**names, other="c")
    assert len({key(**names | {name: "b"}) for name in names} | {key(**names)}) == 6


@needs_gcc
def test_a_life(cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["build", "probe"]) == 0
    out, err = capsys.readouterr()
    place = Path(out.strip())
    assert place.parent == cache
    assert (place / "probe.bin").stat().st_size == 65536
    assert "Probe guest: done in" in err
    assert main(["build", "probe", "probe"]) == 0
    assert capsys.readouterr() == (f"{place}\n" * 2, "")

    assert main(["list"]) == 0
    assert capsys.readouterr().out.split()[1:] == ["MB", place.name]
    assert main(["verify"]) == 0
    assert capsys.readouterr().out == "1 assets, all as they were made\n"

    with (place / "probe.bin").open("r+b") as rom:
        rom.write(b"\xff")
    assert main(["verify"]) == 3
    assert capsys.readouterr().out == f"{place.name}: probe.bin has changed\n"
    assert main(["build", "probe"]) == 0
    assert "the cached copy is damaged (probe.bin has changed)" in capsys.readouterr().err
    assert main(["verify"]) == 0
    capsys.readouterr()

    (cache / f".building-{place.name}.1").mkdir()
    assert main(["gc"]) == 0
    assert capsys.readouterr().out == f"removed .building-{place.name}.1\n"
    assert main(["gc", "--unused-days", "0"]) == 0
    assert capsys.readouterr().out == f"removed {place.name}\n"
    assert main(["gc"]) == 0
    assert capsys.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["xdg"]


@needs_gcc
def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quiet", "build", "probe"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("path")
def test_no_gcc(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "probe"]) == 3
    assert "gcc is needed to compile the probe guest" in one_line(capsys)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("asset", ["tools", "qemu", "qemu-image", "labroot", "lab-kernel"])
def test_no_apt(capsys: pytest.CaptureFixture[str], asset: str) -> None:
    assert main(["build", asset]) == 3
    assert "apt-get is needed to get packages" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["build", "probe", "nonsense"], "no such asset: nonsense; there are probe, tools, "),
        (["--qemu-suite", "No Suite", "build", "qemu"], "'No Suite' is not the name of a Debian"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    assert main(arguments) == 2
    assert text in one_line(capsys)


@pytest.mark.parametrize("days", ["-1", "nan", "soon"])
def test_bad_days(capsys: pytest.CaptureFixture[str], days: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gc", "--unused-days", days])
    assert ended.value.code == 2
    assert f"'{days}'" in capsys.readouterr().err


def test_a_cache_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", Path("/proc/cache")):
        assert main(["--cache", str(place), "build", "probe"]) == 3
        assert f"the cache directory '{place}' cannot be used: " in one_line(capsys)


@as_root
@needs_gcc
def test_an_ordinary_user(tmp_path: Path) -> None:
    # Below pytest's directory nobody else may look.
    place = Path("/tmp") / f"vfio-cpr-suite-test-{os.getpid()}"
    place.mkdir()
    try:
        run = subprocess.run(
            command_as(NOBODY, "--cache", place, "build", "probe"),
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert run.returncode == 3
        assert run.stderr == (
            f"images: the cache directory '{place}' cannot be used: Permission denied; "
            "name another with --cache or $VFIO_CPR_CACHE\n"
        )
        os.chown(place, 65534, 65534)
        run = subprocess.run(command_as(NOBODY, "--cache", place, "build", "probe"), cwd=ROOT)
        assert run.returncode == 0
        assert list(place.glob("probe-*/probe.bin"))
        # The same cache, when it is somebody else's: root's files are in its way.
        (place / "locks").chmod(0o755)
        os.chown(place / "locks", 0, 0)
        run = subprocess.run(
            command_as(NOBODY, "--cache", place, "list"), capture_output=True, cwd=ROOT
        )
        assert run.returncode == 3
    finally:
        shutil.rmtree(place)
    assert not (tmp_path / "home").exists()


@as_root
def test_a_user_without_a_home() -> None:
    environment = {"PATH": os.environ["PATH"]}
    run = subprocess.run(
        command_as(54321, "list"), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 3
    assert run.stderr.startswith("images: this user has no home directory; name a cache")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle(
    cache: Path,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    monkeypatch.setenv("TMPDIR", str(path))
    begun = tmp_path / "begun"
    (path / "gcc").write_text(f"#!/bin/sh\ntrue > {begun}; exec /bin/sleep 60\n")
    (path / "gcc").chmod(0o755)
    process = subprocess.Popen(
        command("build", "probe"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C goes to all that the terminal has in the foreground
    )
    until(begun.exists, "the compiler to be started", 10, pause_s=0.01)
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)
    assert process.stderr
    error = process.stderr.readline() + process.stderr.readline()
    assert process.wait() == (130 if number == signal.SIGINT else -number)
    assert error == "Probe guest ...\n" + (
        "images: interrupted\n" if number == signal.SIGINT else ""
    )
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the compiler, which nobody told
    left = [*cache.glob(".building-probe-*")]
    assert bool(left) == (number == signal.SIGKILL)
    assert not [*cache.glob("probe-*")]


def test_steps_within_steps_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # how rich is told to take it for a terminal
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress()
    for title in ("first", "second"):
        with progress.step(title) as report:
            report(0.5, "halfway [with] brackets")
            with progress.step("inner"):
                progress.say("a line " + 30 * "and more ")
    out = capsys.readouterr()
    assert out.out == ""
    assert "a line " + 30 * "and more " in out.err
    assert re.search(r"second: done in [0-9.]+ s\n", out.err)
