# SPDX-License-Identifier: GPL-2.0-or-later
"""The verdict: its exit code, and what it writes, for each way in which tests can end.

The rules are tried on reports made by hand.  That real runs of pytest make such reports, with
and without xdist, is tried on a project of a page whose bench has no lab host.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from fixtures.evidence.saved import load
from fixtures.evidence.verdict import Case, Verdict

ROOT = Path(__file__).parents[2]

GOOD, FAILED, COULD_NOT_VERIFY = 0, 1, 3


@dataclass(frozen=True)
class End:
    """How one step of a test ended."""

    outcome: str
    blame: str = ""
    known: str = ""
    when: str = "call"
    crash: str = ""

    def __str__(self) -> str:
        return "-".join(
            filter(None, (self.when, self.known or self.crash or self.blame or self.outcome))
        )


def names(ends: list[End]) -> str:
    return "+".join(map(str, ends)) or "nothing"


OK = End("passed")
SKIP = End("skipped", when="setup")
BEGUN = End("passed", when="setup")
KNOWN = End("skipped", known="hot-reset")
FAIL = End("failed", blame="qemu")
CRASHED = End("failed", blame="qemu", when="setup", crash="SIGSEGV")
KNOWN_CRASH = End("skipped", known="tcg-crashes", when="setup", crash="SIGSEGV")
FAIL_IN_SETUP = End("failed", blame="qemu", when="setup")
NO_HOST = End("failed", blame="environment", when="setup")
HOST_LOST = End("failed", blame="environment")
BAD_INPUT = End("failed", blame="input", when="setup")
NOT_CLEARED = End("failed", blame="environment", when="teardown")
#: How xdist reports a worker that died: a report of no step, made by nobody's hook.
CRASH = End("failed", when="???")


class Config(SimpleNamespace):
    """All that a verdict asks of pytest's."""

    def getoption(self, name: str) -> Path | None:
        return {
            "verdict_json": self.json,
            "html": None,
            "evidence": Path("evidence"),
            "shard": getattr(self, "shard", None),
        }[name]


def verdict_on(
    *tests: tuple[End, ...] | End, json_path: Path | None = None, others_failed: int = 0
) -> tuple[Verdict, int]:
    """The verdict on tests that end like this, and the exit code of the run."""
    verdict = Verdict(Config(json=json_path))  # type: ignore[arg-type]
    failed = others_failed
    for number, ends in enumerate(tests):
        for end in ends if isinstance(ends, tuple) else (ends,):
            report = pytest.TestReport(
                nodeid=f"tests/qemu/test_takeover.py::test_behaviour_{number}[8-vectors]@group",
                location=("test_takeover.py", 1, "test"),
                keywords={},
                outcome=end.outcome,  # type: ignore[arg-type]
                longrepr=("f.py", 1, "Skipped: why") if end is SKIP else f"says test {number}",
                when=end.when,  # type: ignore[arg-type]
                duration=1.0,
            )
            if end is not CRASH:
                notes = {"blame": end.blame, "known": end.known, "crash": end.crash}
                report.vfio_cpr = {  # type: ignore[attr-defined]
                    "subject": {"QEMU": "11.1.3"},
                    "scene": "in use",
                    **{key: value for key, value in notes.items() if value},
                }
            failed += report.failed
            verdict.pytest_runtest_logreport(report)
    session: Any = SimpleNamespace(
        testsfailed=failed, exitstatus=pytest.ExitCode(1 if failed else 0)
    )
    verdict.pytest_sessionfinish(session, session.exitstatus)
    return verdict, int(session.exitstatus)


@pytest.mark.parametrize(
    "tests",
    [[OK], [OK, OK], [KNOWN], [KNOWN_CRASH], [OK, KNOWN], [OK, SKIP], [KNOWN, SKIP]],
    ids=names,
)
def test_it_is_good_when_all_that_was_verified_holds(tests: list[End]) -> None:
    assert verdict_on(*tests)[1] == GOOD


@pytest.mark.parametrize("other", [OK, SKIP, KNOWN, NO_HOST, HOST_LOST, CRASH], ids=str)
@pytest.mark.parametrize("failure", [FAIL, FAIL_IN_SETUP], ids=str)
def test_it_is_failed_when_qemu_fails_whatever_else_there_is(failure: End, other: End) -> None:
    assert verdict_on(failure)[1] == FAILED
    assert verdict_on(other, failure)[1] == FAILED
    assert verdict_on(failure, other)[1] == FAILED


@pytest.mark.parametrize("trouble", [NO_HOST, HOST_LOST, BAD_INPUT, NOT_CLEARED, CRASH], ids=str)
@pytest.mark.parametrize("others", [[], [OK], [KNOWN], [SKIP]], ids=names)
def test_what_could_not_be_verified_is_no_failure_of_qemu(trouble: End, others: list[End]) -> None:
    assert verdict_on(*others, trouble)[1] == COULD_NOT_VERIFY


@pytest.mark.parametrize("tests", [[SKIP], [SKIP, SKIP], [BEGUN]], ids=names)
def test_a_run_that_verified_nothing_is_never_good(tests: list[End]) -> None:
    assert verdict_on(*tests)[1] == COULD_NOT_VERIFY


def test_a_run_without_verdict_tests_keeps_pytests_exit_code() -> None:
    assert verdict_on()[1] == 0
    assert verdict_on(others_failed=1)[1] == 1


def test_a_test_of_our_own_code_that_fails_is_a_failure_too() -> None:
    assert verdict_on(OK, others_failed=1)[1] == FAILED
    assert verdict_on(NO_HOST, others_failed=1)[1] == FAILED
    page = io.StringIO()
    verdict_on(OK, others_failed=1)[0].print(Console(file=page, width=100))
    last = page.getvalue().splitlines()[-1]
    assert last.startswith("FAILED: 1 ok, and 1 that failed beside the verdict")


def test_the_worst_step_of_a_test_is_its_result() -> None:
    verdict, code = verdict_on((OK, NOT_CLEARED), (HOST_LOST, NOT_CLEARED), (FAIL, NOT_CLEARED))
    assert [case.result for case in verdict.cases.values()] == ["error", "error", "FAIL"]
    assert code == FAILED
    assert verdict_on((HOST_LOST, NOT_CLEARED))[1] == COULD_NOT_VERIFY


def test_a_case_says_what_was_verified_and_how_it_came_out() -> None:
    verdict, _ = verdict_on((BEGUN, OK), FAIL, SKIP)
    passed, failed, skipped = verdict.cases.values()
    assert (passed.group, passed.behaviour, passed.point) == (
        "takeover",
        "behaviour 0",
        "8-vectors",
    )
    assert (passed.result, passed.seconds, passed.text) == ("ok", 2.0, "")
    assert (failed.result, failed.text) == ("FAIL", "says test 1")
    assert (skipped.result, skipped.text) == ("skip", "Skipped: why")


def test_a_case_does_not_pay_for_the_host_of_all() -> None:
    verdict, _ = verdict_on()
    report = pytest.TestReport(
        "tests/qemu/test_takeover.py::test_x[msix:8]", ("", 1, ""), {}, "passed", None, "call"
    )
    report.duration = 12.0
    report.vfio_cpr = {"host_s": 10.5}  # type: ignore[attr-defined]
    verdict.pytest_runtest_logreport(report)
    (case,) = verdict.cases.values()
    assert (case.seconds, case.notes) == (1.5, {})


def test_what_a_person_reads() -> None:
    verdict, _ = verdict_on(OK, FAIL, SKIP, KNOWN, NO_HOST)
    page = io.StringIO()
    verdict.print(Console(file=page, width=100))
    lines = [line.rstrip() for line in page.getvalue().splitlines()]
    assert "QEMU                 11.1.3" in lines
    assert "takeover: in use" in lines
    assert "FAIL takeover [8-vectors] behaviour 1: says test 1" in lines
    assert "skip takeover [8-vectors] behaviour 2: Skipped: why" in lines
    assert any(line.startswith("error takeover [8-vectors] (setup)") for line in lines)
    assert lines[-1].startswith("FAILED: 1 FAIL, 1 error, 1 known, 1 skip, 1 ok in ")


def test_a_crash_is_told_apart_from_other_failures_and_names_its_signal() -> None:
    verdict, code = verdict_on(CRASHED, FAIL, KNOWN_CRASH)
    assert code == FAILED
    page = io.StringIO()
    verdict.print(Console(file=page, width=100))
    lines = [line.rstrip() for line in page.getvalue().splitlines()]
    assert any(re.fullmatch("behaviour 0 +crashed SIGSEGV", line) for line in lines)
    assert any(re.fullmatch("behaviour 2 +known", line) for line in lines)
    assert "crashed takeover [8-vectors] (setup): says test 0" in lines
    assert lines[-1].startswith("FAILED: 1 crashed, 1 FAIL, 1 known in ")


def test_what_fails_many_behaviours_for_one_reason_is_told_once() -> None:
    verdict, _ = verdict_on(SKIP, SKIP, SKIP)
    page = io.StringIO()
    verdict.print(Console(file=page, width=100))
    assert "\nskip takeover [8-vectors] behaviour 0 and 2 more: Skipped: why\n" in page.getvalue()


def test_a_takeover_that_fails_is_not_called_by_the_name_of_a_behaviour() -> None:
    verdict, _ = verdict_on((FAIL_IN_SETUP, NOT_CLEARED), FAIL)
    page = io.StringIO()
    verdict.print(Console(file=page, width=100))
    assert "\nFAIL takeover [8-vectors] (setup): says test 0\n" in page.getvalue()
    assert "\nFAIL takeover [8-vectors] behaviour 1: says test 1\n" in page.getvalue()


@pytest.mark.parametrize(
    ("tests", "word"), [([OK], "GOOD"), ([FAIL], "FAILED"), ([SKIP], "COULD NOT VERIFY")]
)
def test_its_last_line_says_it_in_a_word(tests: list[End], word: str) -> None:
    page = io.StringIO()
    verdict_on(*tests)[0].print(Console(file=page, width=100))
    assert page.getvalue().splitlines()[-1].startswith(f"{word}: ")


def test_what_is_written_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    verdict, code = verdict_on(OK, FAIL, SKIP, KNOWN, json_path=path)
    saved = load(path)
    assert (saved.exit, saved.facts["QEMU"], saved.scenes["takeover"]) == (code, "11.1.3", "in use")
    assert [case.result for case in saved.cases] == ["ok", "FAIL", "skip", "known"]
    assert saved.counts == {"FAIL": 1, "known": 1, "skip": 1, "ok": 1}
    assert list(saved.cases) == list(verdict.cases.values())


def test_blackouts_are_summed_up_by_mode_and_each_cpr_counts_once() -> None:
    verdict = Verdict(Config(json=None))  # type: ignore[arg-type]
    for point, guest, qemu, downtime in (
        ("msix:1", 10.2, 9.0, 5),
        ("msix:8", 30.0, None, 6),
        ("msix:8", 30.0, None, 6),  # another behaviour after the same CPR
        ("msix:64", 20.0, 19.0, 9),
        ("msix:8+cpr-exec", None, 99.6, None),
        ("intx", None, None, None),
    ):
        case = Case("takeover", "behaviour", point, "ok")
        case.notes["blackout"] = {"guest_ms": guest, "qemu_ms": qemu, "downtime_ms": downtime}
        verdict.cases[f"{point} {len(verdict.cases)}"] = case
    verdict.cases["none"] = Case("refused", "behaviour", "msix:8", "ok")
    page = io.StringIO()
    verdict.print(Console(file=page, width=100))
    lines = [re.split("  +", line.strip()) for line in page.getvalue().splitlines()]
    assert ["cpr-transfer (4)", "10 / 20 / 30", "9 / 14 / 19", "5 / 6 / 9"] in lines
    assert ["cpr-exec (1)", "100 / 100 / 100"] in lines


def test_where_nothing_was_taken_over_nothing_is_said_of_blackouts() -> None:
    page = io.StringIO()
    verdict_on(OK)[0].print(Console(file=page, width=100))
    assert "blackout" not in page.getvalue()


def test_it_is_written_as_json(tmp_path: Path) -> None:
    verdict_on(OK, NO_HOST, json_path=tmp_path / "verdict.json")
    content = json.loads((tmp_path / "verdict.json").read_text())
    assert content["exit"] == COULD_NOT_VERIFY
    assert content["facts"] == {"QEMU": "11.1.3"}
    assert [case["result"] for case in content["cases"]] == ["ok", "error"]
    assert content["cases"][1]["notes"]["blame"] == "environment"


# The real thing: pytest, our plugins, and a bench without a lab host.

CONFTEST = """\
import os
import pytest
from fixtures import plugin
from fixtures.bench import LabBench
from fixtures.hosts.base import HostLostError
from fixtures.machines.binary import Capabilities
from fixtures.subject import Subject

@pytest.fixture(scope="session")
def bench(pytestconfig):
    capabilities = Capabilities("11.1.3", "0" * 64, ("cpr-transfer",), True, True, True, True, True)
    bench = LabBench(Subject("a QEMU", capabilities, None, None, None))
    pytestconfig.stash[plugin._BENCHES]["bench"] = bench
    return bench

@pytest.fixture
def no_host(bench):
    raise HostLostError("the lab host does not answer")

@pytest.fixture
def a_known_issue(bench):
    raise AssertionError("kvm run failed")
"""
KNOWN_ISSUES = """\
[[issue]]
id = "hot-reset"
summary = "the device is hot-reset"
versions = ">=10"
tests = "test_(known|fixed)"
symptom = "kvm run failed"
evidence = "seen"
"""
BEHAVIOURS = {
    "test_holds": "def test_holds(bench): pass",
    "test_fails": "def test_fails(bench): assert 'vector 3 is delivered' == 'vector 3 is lost'",
    "test_skips": "def test_skips(bench): pytest.skip('no IOMMUFD here')",
    "test_has_no_host": "def test_has_no_host(no_host): pass",
    "test_known": "def test_known(a_known_issue): pass",
    "test_fixed": "def test_fixed(bench): pass",
    "test_loses_its_host": (
        "@pytest.fixture(scope='module')\n"
        "def loses_its_host(bench):\n"
        "    bench.lost = lambda: 'the lab host has gone'\n"
        "    raise AssertionError('new QEMU does not answer')\n"
        "def test_loses_its_host(loses_its_host): pass\n"
        "def test_has_lost_its_host(bench, loses_its_host): pass\n"
        "def test_has_another(bench): del bench.lost; assert False\n"
    ),
    "test_kills_its_worker": "def test_kills_its_worker(bench): os.kill(os.getpid(), 9)",
    "test_is_interrupted": "def test_is_interrupted(bench): raise KeyboardInterrupt",
}


@dataclass(frozen=True)
class Run:
    """A run of pytest that ended."""

    exit: int
    output: str
    place: Path

    @property
    def results(self) -> dict[str, str]:
        """The result of each behaviour, as the JSON has it."""
        content = json.loads((self.place / "verdict.json").read_text())
        return {case["behaviour"]: case["result"] for case in content["cases"]}

    @property
    def last_word(self) -> str:
        """The verdict's last line."""
        words = ("GOOD: ", "FAILED: ", "COULD NOT VERIFY: ", "INTERRUPTED: ")
        return [line for line in self.output.splitlines() if line.startswith(words)][-1]


def run(place: Path, behaviours: list[str], *arguments: str) -> Run:
    """Run pytest with our plugins on a project with these behaviours."""
    tests = place / "tests/qemu"
    tests.mkdir(parents=True)
    (tests / "conftest.py").write_text(CONFTEST)
    (tests / "known_issues.toml").write_text(KNOWN_ISSUES)
    text = "\n".join(BEHAVIOURS.get(name, name) for name in behaviours)
    (tests / "test_takeover.py").write_text(f"import os\nimport pytest\n\n{text}\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "conftest", "-q", "--color=no"),
            *("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(place)),
            *("--evidence", str(place / "evidence")),
            *("--verdict-json", str(place / "verdict.json")),
            *("--junitxml", str(place / "junit.xml")),
            *arguments,
            str(tests),
        ],
        cwd=place,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")},
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Run(done.returncode, done.stdout + done.stderr, place)


IN_PARALLEL = ("-n", "2", "--dist", "loadgroup")


@pytest.mark.parametrize("how", [(), IN_PARALLEL], ids=["alone", "in-parallel"])
def test_a_real_run_with_every_kind_of_end(tmp_path: Path, how: tuple[str, ...]) -> None:
    done = run(tmp_path, list(BEHAVIOURS)[:6], *how)
    assert done.exit == FAILED, done.output
    assert done.last_word.startswith("FAILED: 2 FAIL, 1 error, 1 known, 1 skip, 1 ok in ")
    assert done.results == {
        "holds": "ok",
        "fails": "FAIL",
        "skips": "skip",
        "has no host": "error",
        "known": "known",
        "fixed": "FAIL",
    }
    assert "Traceback" not in done.output
    (evidence,) = (tmp_path / "evidence").glob("*test_fails*")
    assert "vector 3 is lost" in (evidence / "failure.txt").read_text()
    assert f"evidence: {evidence}" in done.output.replace("\n", "")
    page = (tmp_path / "evidence/report.html").read_text()
    assert "vector 3 is lost" in page
    assert f'href="{evidence.name}/"' in page
    assert f"report: {tmp_path / 'evidence/report.html'}" in done.output.replace("\n", "")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("6", "2", "1")


@pytest.mark.parametrize(
    ("behaviours", "code", "word"),
    [
        (["test_holds", "test_known"], GOOD, "GOOD"),
        (["test_skips"], COULD_NOT_VERIFY, "COULD NOT VERIFY"),
        (["test_has_no_host", "test_holds"], COULD_NOT_VERIFY, "COULD NOT VERIFY"),
    ],
    ids=["good", "skipped", "no-host"],
)
def test_a_real_run_ends_with_its_exit_code(
    tmp_path: Path, behaviours: list[str], code: int, word: str
) -> None:
    done = run(tmp_path, behaviours)
    assert (done.exit, done.last_word.split(":")[0]) == (code, word), done.output


def test_what_is_seen_of_a_qemu_whose_host_goes_is_no_failure_of_qemu(tmp_path: Path) -> None:
    done = run(tmp_path, ["test_loses_its_host"])
    assert done.results == {
        "loses its host": "error",
        "has lost its host": "error",
        "has another": "FAIL",
    }
    assert "the lab host has gone: new QEMU does not answer" in done.output


def test_a_failure_is_told_even_if_its_evidence_cannot_be_kept(tmp_path: Path) -> None:
    done = run(tmp_path, ["test_fails"], "--evidence", "/proc/evidence")
    assert (done.exit, done.results) == (FAILED, {"fails": "FAIL"}), done.output
    assert "could not be kept: " in done.output


def test_where_all_is_well_there_is_a_report_if_it_was_asked_for(tmp_path: Path) -> None:
    done = run(tmp_path / "one", ["test_holds"])
    assert "report: " not in done.output
    assert not (tmp_path / "one/evidence").exists()
    page = tmp_path / "page.html"
    done = run(tmp_path / "two", ["test_holds"], "--html", str(page))
    assert f"report: {page}" in done.output.replace("\n", "")
    assert "GOOD" in page.read_text()


def test_a_report_that_cannot_be_written_hides_no_failure(tmp_path: Path) -> None:
    done = run(tmp_path, ["test_fails"], "--html", "/proc/page.html")
    assert (done.exit, done.results) == (FAILED, {"fails": "FAIL"}), done.output
    assert "report: could not be made: " in done.output


def test_a_takeover_that_fails_leaves_its_evidence_once(tmp_path: Path) -> None:
    """All its tests name it; collecting it takes the time of many tests."""
    takeover = """
@pytest.fixture(scope="module")
def taken_over(bench):
    raise AssertionError("the takeover failed")
"""
    tests = [f"def test_{name}(bench, taken_over): pass" for name in ("one", "two", "three")]
    done = run(tmp_path, [takeover, *tests, "test_fails"])
    assert done.exit == FAILED, done.output
    cases = json.loads((tmp_path / "verdict.json").read_text())["cases"]
    assert len({case["notes"]["evidence"] for case in cases[:3]}) == 1
    assert len(list((tmp_path / "evidence").iterdir())) == 3  # that, of test_fails, the report


def test_a_run_in_parallel_that_stops_at_the_first_failure_is_failed(tmp_path: Path) -> None:
    done = run(tmp_path, ["test_fails"], *IN_PARALLEL, "-x")
    assert (done.exit, done.results) == (FAILED, {"fails": "FAIL"}), done.output


def test_a_worker_that_dies_is_no_failure_of_qemu(tmp_path: Path) -> None:
    behaviours = ["test_holds", "test_kills_its_worker"]
    done = run(tmp_path, behaviours, *IN_PARALLEL, "--max-worker-restart", "1")
    assert done.exit == COULD_NOT_VERIFY, done.output
    assert done.results == {"holds": "ok", "kills its worker": "error"}


def test_an_interrupted_run_does_not_say_that_all_is_good(tmp_path: Path) -> None:
    done = run(tmp_path, ["test_holds", "test_is_interrupted"])
    assert done.exit == pytest.ExitCode.INTERRUPTED, done.output
    assert done.last_word.startswith("INTERRUPTED: 1 ok in ")
    assert json.loads((tmp_path / "verdict.json").read_text())["exit"] == 130


def test_tests_that_cannot_be_loaded_are_not_an_interruption(tmp_path: Path) -> None:
    done = run(tmp_path, ["import no_such_module"])
    assert done.exit == COULD_NOT_VERIFY, done.output


def test_a_malformed_list_of_known_issues_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "KNOWN_ISSUES", "[[issue]]\n")
    done = run(tmp_path, ["test_holds"])
    assert done.exit == pytest.ExitCode.USAGE_ERROR
    (line,) = (line for line in done.output.splitlines() if line)
    assert line.startswith(f"ERROR: {tmp_path}/tests/qemu/known_issues.toml: issue 1: wants the ")
    assert "fields ['evidence', 'id', 'summary', 'symptom', 'versions'], may have " in line
