# SPDX-License-Identifier: GPL-2.0-or-later
"""Soaking: when a run is over, what it counts, and that nothing of it may grow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.soak import Clock, Footprint
from fixtures.waiting import until

ROOT = Path(__file__).parents[2]
#: What a verdict makes pytest end with.
INTERRUPTED = 2


@pytest.fixture
def clock() -> Clock:
    return Clock.start(1, 2, seed=1)


def test_it_is_over_at_its_deadline(clock: Clock) -> None:
    assert not clock.is_over
    assert replace(clock, end=time.monotonic()).is_over


def test_it_is_over_when_it_has_been_told_to_stop_also_for_another_process(clock: Clock) -> None:
    told = f"from fixtures.soak import Clock; print({clock!r}.is_over)"
    ask = [sys.executable, "-c", told]

    def asked() -> str:
        return subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert asked() == "False\n"
    clock.stop()
    assert asked() == "True\n"


def test_it_is_over_when_who_controls_it_is_gone(clock: Clock) -> None:
    assert replace(clock, told="/proc/0/fd/3").is_over


@pytest.mark.parametrize("hours", [1 / 3600, 0.05, 1, 24, 24 * 365])
@pytest.mark.parametrize("workers", [1, 4])
def test_parts_fill_the_time_and_are_not_too_many_for_pytest(hours: float, workers: int) -> None:
    clock = Clock.start(hours, workers, seed=1)
    assert clock.parts * clock.part_s >= hours * 3600 * workers
    assert 10 <= clock.parts <= 500 * workers + workers


FIRST = Footprint(50, 100, 200, 90, 400, 300)


def test_what_grows_is_told() -> None:
    assert FIRST.grown(FIRST) == []
    assert FIRST.grown(replace(FIRST, descriptors=60, memory_mb=90)) == []
    assert FIRST.grown(replace(FIRST, descriptors=99, kept_mb=900)) == [
        "descriptors 50 -> 99",
        "kept_mb 300 -> 900",
    ]


# Runs, with a lab host that there is none of.

CONFTEST = """
import pytest
from types import SimpleNamespace
from fixtures import plugin, soak
from fixtures.bench import LabBench
from fixtures.machines.binary import Capabilities
from fixtures.subject import Subject

class Bench(LabBench):
    lab_with = lambda self, iommu: SimpleNamespace(token="")

@pytest.fixture(scope="session")
def bench(pytestconfig):
    soak.Footprint.now = lambda lab: soak.Footprint(*[FOOTPRINTS.pop()] * 6)
    capabilities = Capabilities("11.1.3", "0" * 64, ("cpr-transfer",), True, True, True, True, True)
    bench = Bench(Subject("a QEMU", capabilities, None, None, None))
    pytestconfig.stash[plugin._BENCHES]["bench"] = bench
    return bench

FOOTPRINTS = [{footprint}] * 1000 + [0]
"""
TESTS = """
import time
from pathlib import Path
import pytest
from fixtures.coverage import Coverage

pytestmark = pytest.mark.soak
POINTS = Coverage("msix:8", "intx")

def test_holds(soak, point):
    def round(seed):
        while {breaks} < 0:
            Path("begun").touch()
            if soak.clock.is_over:
                Path("told").touch()
            time.sleep(0.01)
        soak._bench.counts["CPRs"] += 2
        time.sleep(0.01)
    soak.repeat(round)

def test_breaks(soak, point):
    def round(seed):
        time.sleep(0.01)
        assert soak.rounds < {breaks}
    soak.repeat(round)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def begin(*arguments: str, breaks: int = 10**9, footprint: int = 0) -> subprocess.Popen[str]:
        tests = tmp_path / "tests/qemu"
        tests.mkdir(parents=True)
        (tests / "known_issues.toml").touch()
        (tests / "conftest.py").write_text(CONFTEST.format(footprint=footprint))
        (tests / "test_soak.py").write_text(TESTS.format(breaks=breaks))
        command = [
            *(sys.executable, "-m", "pytest", "-p", "conftest", "--color=no", "--no-header"),
            *("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)),
            *("--profile", "soak", "--verdict-json", "verdict.json", *arguments, str(tests)),
        ]
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        started.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env={**env, "PYTHONPATH": str(ROOT)},
                stdout=(tmp_path / "output").open("w"),
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


IN_PARALLEL = ("-n", "2", "--dist", "loadgroup")


@pytest.mark.parametrize("how", [(), IN_PARALLEL], ids=["alone", "in-parallel"])
def test_a_run_ends_by_its_time_with_progress_counts_and_seed(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, how: tuple[str, ...]
) -> None:
    run = start("--hours", "0.002", "--hypothesis-seed=7", *how)
    assert run.wait(60) == 0, (tmp_path / "output").read_text()
    said = (tmp_path / "output").read_text()
    assert " of 0:00:07: " in said
    assert ", no failures" in said
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["facts"]["seed"] == "7"
    assert verdict["counts"]["rounds"] >= len(verdict["cases"])
    assert f"{verdict['counts']['rounds']} rounds\nGOOD: " in said
    assert {case["result"] for case in verdict["cases"]} == {"ok"}
    # No part is a case of its own.
    assert {case["point"] for case in verdict["cases"]} <= {"msix:8", "intx+vfio-user"}


@pytest.mark.parametrize("how", [(), IN_PARALLEL], ids=["alone", "in-parallel"])
def test_ctrl_c_ends_the_time_and_there_is_a_verdict(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, how: tuple[str, ...]
) -> None:
    run = start("--hours", "0.02", *how)
    until(lambda: " rounds, " in (tmp_path / "output").read_text(), "a part", 60, pause_s=0.02)
    run.send_signal(signal.SIGINT)
    assert run.wait(20) == 0
    assert "GOOD: " in (tmp_path / "output").read_text()


def test_a_second_ctrl_c_interrupts(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = start("--hours", "1", breaks=-1)  # which waits
    until(lambda: (tmp_path / "begun").exists(), "a round", 60, pause_s=0.02)
    run.send_signal(signal.SIGINT)
    until(lambda: (tmp_path / "told").exists(), "the run to be told", 20, pause_s=0.02)
    run.send_signal(signal.SIGINT)
    assert run.wait(20) == INTERRUPTED
    assert "INTERRUPTED: " in (tmp_path / "output").read_text()


def test_a_round_that_fails_names_its_seed_and_the_others_go_on(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = start("--hours", "0.001", breaks=3)
    assert run.wait(60) == 1
    said = (tmp_path / "output").read_text()
    assert "in round 4 of this part; to be played first:" in said
    assert "ci/verify --profile soak --hypothesis-seed=" in said
    results = [c["result"] for c in json.loads((tmp_path / "verdict.json").read_text())["cases"]]
    assert sorted(results) == ["FAIL", "FAIL", "ok", "ok"]


def test_a_run_that_grows_could_not_verify(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = start("--hours", "0.001", footprint=1000)
    assert run.wait(60) == 3
    assert "the run itself has grown: descriptors 0 -> 1000" in (tmp_path / "output").read_text()
