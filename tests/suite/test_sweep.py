# SPDX-License-Identifier: GPL-2.0-or-later
"""A sweep: which jobs there are, what is resumed, and what is reported."""

from __future__ import annotations

import fcntl
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from fixtures.labs import sweep
from fixtures.labs.inventory import Device, Fire, Host, Limits
from fixtures.labs.sweep import POINTS_PER_JOB, Job, Plan, is_done, main, plan, prepare, report
from fixtures.matrix import Point
from fixtures.several import Together
from fixtures.waiting import until

TAKEOVER, PENDING = "tests/qemu/test_takeover.py", "tests/qemu/test_pending.py"


def a_host(name: str, *irqs: str, iommu: Any = "intel-iommu") -> Host:
    devices = tuple(
        Device(
            address=f"0000:{n + 1:02x}:00.0",
            endpoint="ivshmem",
            irq=irq,
            reset="bus",
            fire=Fire(command=("raise", "{vector}")),
        )
        for n, irq in enumerate(irqs)
    )
    return Host(
        name=name,
        address="192.0.2.1",
        key=Path("key"),
        known_hosts=Path("known"),
        limits=Limits(iommu=iommu),
        device=devices,
    )


def cases_of(module: str, *points: str) -> list[sweep.Collected]:
    return [
        (f"{module}::test_{n}[{point}]", "bench", Point.parse(point))
        for point in points
        for n in range(2)
    ]


BOTH = (a_host("one", "msix:8", "msix:64"), a_host("two", "msix:8", iommu="amd-iommu"))


def planned(cases: list[sweep.Collected], *, everywhere: bool = False) -> Plan:
    return plan(cases, BOTH, ["--profile", "quick"], Path("/lab.toml"), everywhere=everywhere)


def test_cases_of_a_module_are_together_where_they_can_be_tried() -> None:
    found = planned(cases_of(TAKEOVER, "msix:8", "msix:64", "msix:8+amd-iommu"))
    assert [(job.hosts, len(job.cases), job.devices) for job in found.jobs] == [
        (("one",), 4, ("ivshmem-msix8-bus", "ivshmem-msix64-bus")),
        (("two",), 2, ("ivshmem-msix8-bus",)),
    ]
    assert found.skipped == ()


def test_what_any_of_the_hosts_can_do_is_for_the_first_that_is_free() -> None:
    alike = [a_host("one", "msix:8"), a_host("two", "msix:8")]
    (job,) = plan(cases_of(TAKEOVER, "msix:8"), alike, [], Path("/lab.toml")).jobs
    assert job.hosts == ("one", "two")


def test_everywhere_is_on_each_host_that_can() -> None:
    found = planned(cases_of(TAKEOVER, "msix:8"), everywhere=True)
    assert [job.hosts for job in found.jobs] == [("one",)]
    assert found.skipped == (
        (f"{TAKEOVER}::test_0[msix:8]", "two", "two has amd-iommu"),
        (f"{TAKEOVER}::test_1[msix:8]", "two", "two has amd-iommu"),
    )


def test_what_no_host_can_do_has_a_reason() -> None:
    found = planned(
        [
            *cases_of(PENDING, "msix:1"),
            ("tests/qemu/test_direct.py::test_x", "direct_bench", None),
        ]
    )
    assert found.jobs == ()
    reasons = [reason for _, _, reason in found.skipped]
    assert reasons[0] == (
        "one has no device with endpoint=ivshmem, irq=msix:1, reset=bus; two has amd-iommu"
    )
    assert reasons[-1] == "needs no lab host (ci/verify --profile smoke)"


def test_several_functions_are_for_no_host() -> None:
    found = plan(
        [
            (
                "tests/qemu/test_several.py::test_0[msix:8+twins]",
                "bench",
                Together.parse("msix:8+twins"),
            )
        ],
        BOTH,
        [],
        Path("/lab.toml"),
    )
    assert not found.jobs
    assert "assigned one at a time" in found.skipped[0][2]


def test_many_points_are_several_jobs_and_no_case_is_lost() -> None:
    irqs = [f"msix:{n}" for n in (1, 2, 8, 31, 32, 33, 64, 65)]
    cases = cases_of(TAKEOVER, *irqs) + cases_of(PENDING, "msix:8")
    jobs = plan(cases, [a_host("one", *irqs)], [], Path("/lab.toml")).jobs
    assert sorted(case for job in jobs for case in job.cases) == sorted(
        case for case, _, _ in cases
    )
    assert len({job.name for job in jobs}) == len(jobs) == 3
    points = [len({case.partition("[")[2] for case in job.cases}) for job in jobs]
    assert points == sorted(points, reverse=True)
    assert points[0] == POINTS_PER_JOB


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = planned(cases_of(TAKEOVER, "msix:8", "msix:1"))
    found.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == found


# What is done, and what is reported.

JOB = Job("takeover-0", ("one", "two"), (f"{TAKEOVER}::test_0[msix:8]",), ("ivshmem-msix8-bus",))
SWEEP = Plan((), "/lab.toml", (JOB,))


def leave(into: Path, *results: str) -> None:
    place = into / "jobs" / JOB.name
    place.mkdir(parents=True, exist_ok=True)
    cases = [
        {"group": "takeover", "behaviour": str(n), "point": "msix:8", "result": result}
        for n, result in enumerate(results)
    ]
    (place / "verdict.json").write_text(json.dumps({"facts": {"host": "two"}, "cases": cases}))


@pytest.mark.parametrize(
    ("results", "done"),
    [(["ok"], True), (["FAIL"], True), (["skip"], True), (["error"], False), ([], False)],
)
def test_a_job_is_done_when_each_case_has_a_verdict(
    tmp_path: Path, results: list[str], done: bool
) -> None:
    leave(tmp_path, *results)
    assert is_done(tmp_path, JOB) == done


def test_a_verdict_that_was_cut_off_is_none(tmp_path: Path) -> None:
    leave(tmp_path, "ok")
    path = tmp_path / "jobs" / JOB.name / "verdict.json"
    path.write_text(path.read_text()[:40])
    assert not is_done(tmp_path, JOB)


@pytest.mark.parametrize(
    ("results", "code"),
    [(["ok"], 0), (["FAIL"], 1), (["error"], 3), (["skip"], 3), ([], 3)],
)
def test_the_exit_code_is_that_of_all_jobs_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], results: list[str], code: int
) -> None:
    leave(tmp_path, *results)
    assert report(tmp_path, SWEEP, time.monotonic()) == code
    assert json.loads((tmp_path / "verdict.json").read_text())["exit"] == code
    assert "two" in capsys.readouterr().out


def test_a_job_that_left_no_verdict_is_an_error_with_its_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "jobs" / JOB.name
    place.mkdir(parents=True)
    (place / "output").write_text("something\nci/verify: one is in use: me\n")
    assert report(tmp_path, SWEEP, time.monotonic()) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "1 cases have no verdict: ci/verify: one is in use: me" in said


# How a job is run.


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script of a job, with something in the place of ci/verify that takes its time."""
    verify = tmp_path / "verify"
    verify.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    verify.chmod(0o755)
    monkeypatch.setattr(sweep, "command_of", lambda *_: [str(verify)])
    (tmp_path / "jobs").mkdir()
    (tmp_path / "lock").touch()
    prepare(tmp_path, JOB, SWEEP)
    return tmp_path / "jobs" / JOB.name / "run"


def test_a_job_ends_with_its_sweep_however_that_ends(tmp_path: Path, script: Path) -> None:
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = subprocess.Popen([script], start_new_session=True, close_fds=True)
        until((tmp_path / "pid").exists, "the job to begin", 10, pause_s=0.01)
        time.sleep(0.2)
        assert job.poll() is None
    assert job.wait(10) != 0  # the kernel has dropped the lock
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not Path(f"/proc/{pid}").exists(), "its ci/verify to end", 10, pause_s=0.01)


def test_a_job_that_is_told_to_end_takes_its_verify_along(tmp_path: Path, script: Path) -> None:
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = subprocess.Popen([script])
        until((tmp_path / "pid").exists, "the job to begin", 10, pause_s=0.01)
        job.terminate()
        assert job.wait(10) != 0
        pid = int((tmp_path / "pid").read_text())
        until(lambda: not Path(f"/proc/{pid}").exists(), "its ci/verify to end", 10, pause_s=0.01)


# Bad input.


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("key", "known"):
        (tmp_path / name).touch()
    (tmp_path / "lab.toml").write_text(
        '[[host]]\nname = "one"\naddress = "192.0.2.1"\nkey = "key"\nknown_hosts = "known"\n'
    )
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--inventory", "no.toml"], "no.toml: No such file"),
        (["--host", "two"], "no host 'two': there are one"),
        (["--tag", "fast"], "no host with the tags fast"),
        (["--point", "msix:3"], "--point msix:3: no axis has the value"),
        (["--no-such-option"], "--no-such-option"),
        (["--resume"], "nothing to resume"),
    ],
)
@pytest.mark.usefixtures("lab")
def test_bad_input_is_one_clear_line(
    capfd: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("ci/sweep: ")
    assert says in line


def test_a_second_sweep_in_a_directory_is_refused(
    lab: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_collected", lambda _: [])
    monkeypatch.setattr(sweep.verify, "check", lambda _: None)
    into = lab / "sweep"
    (into / "jobs").mkdir(parents=True)
    SWEEP.write(into / "plan.json")
    assert main([]) == 2
    assert "has a sweep in it: --resume" in capfd.readouterr().err
    with (into / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["--resume"]) == 3
    assert "another sweep runs" in capfd.readouterr().err


def test_a_dry_run_prints_commands_and_makes_nothing(
    lab: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (lab / "lab.toml").write_text(
        (lab / "lab.toml").read_text()
        + '[[host.device]]\nid = "1af4:1110"\nendpoint = "ivshmem"\nirq = "msix:8"\nreset = "bus"\n'
        'fire = { command = ["raise", "{vector}"] }\n'
    )
    (lab / "key").write_text("SECRET")
    before = sorted(lab.iterdir())
    monkeypatch.setattr(sweep, "_collected", lambda _: cases_of(TAKEOVER, "msix:8", "msix:1"))
    monkeypatch.setattr(sweep.verify, "check", lambda _: None)
    monkeypatch.setattr(sweep, "LabMachine", type("NoHost", (), {"unpacking": lambda *_: "tar"}))
    assert main(["--dry-run"]) == 0
    said = capfd.readouterr().out
    for part in ("ci/verify --inventory", "flock", "1af4:1110", "drivers_probe", "# skip", "tar"):
        assert part in said
    assert "SECRET" not in said
    assert sorted(lab.iterdir()) == before
