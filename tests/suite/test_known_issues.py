# SPDX-License-Identifier: GPL-2.0-or-later
"""Known issues: what the list may say, and what becomes of a test that it names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from fixtures.evidence.known import KnownIssue, judge, load
from images.errors import BadInputError

ENTRY = """\
[[issue]]
id = "hot-reset"
summary = "the device is hot-reset in new QEMU"
versions = ">=10.1,<=11.1.3"
tests = "test_takeover.*e1000e"
symptom = "kvm run failed"
evidence = "seen on 10.2.2"
"""
CASE = "tests/qemu/test_takeover.py::test_it_fires[e1000e]"
VERSION = "11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "known_issues.toml"


@pytest.fixture
def issues(path: Path) -> Sequence[KnownIssue]:
    path.write_text(ENTRY)
    return load(path)


def a_report(outcome: str, text: str = "", when: str = "call") -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=CASE,
        location=("test_takeover.py", 1, "test_it_fires"),
        keywords={},
        outcome=outcome,  # type: ignore[arg-type]
        longrepr=text or None,
        when=when,  # type: ignore[arg-type]
    )


def test_the_list_of_the_project_is_well_formed(pytestconfig: pytest.Config) -> None:
    for issue in load(pytestconfig.rootpath / "tests/qemu/known_issues.toml"):
        assert all((issue.id, issue.summary, issue.evidence))


def test_an_entry_is_read(issues: Sequence[KnownIssue]) -> None:
    (issue,) = issues
    assert (issue.id, issue.evidence) == ("hot-reset", "seen on 10.2.2")
    assert issue.summary == "the device is hot-reset in new QEMU"


def test_a_list_may_be_empty(path: Path) -> None:
    path.write_text("# nothing is known\n")
    assert load(path) == []


MALFORMED = {
    "not TOML": ("[[issue]", "line 1"),
    "a table where a list is wanted": (
        ENTRY.replace("[[issue]]", "[issue]"),
        "begins with [[issue]]",
    ),
    "a list of something else": ('issue = ["hot-reset"]', "issue 1"),
    "a field is missing": (ENTRY.replace('evidence = "seen on 10.2.2"', ""), "evidence"),
    "a field too much": (ENTRY + 'owner = "me"\n', "owner"),
    "not a version": (ENTRY.replace(">=10.1", "ten"), "hot-reset"),
    "not text": (ENTRY.replace('">=10.1,<=11.1.3"', "11"), "versions"),
    "not a regular expression": (ENTRY.replace("kvm run", "(kvm run"), "hot-reset"),
    "not a pattern of tests": (ENTRY.replace("test_takeover", "*test_takeover"), "hot-reset"),
}


@pytest.mark.parametrize(("text", "named"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_list_is_told_by_file_and_place(path: Path, text: str, named: str) -> None:
    path.write_text(text)
    with pytest.raises(BadInputError, match=re.escape(named)) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_list_that_is_not_there_is_told(path: Path) -> None:
    with pytest.raises(BadInputError, match=r"known_issues\.toml.*No such file"):
        load(path)


@pytest.mark.parametrize("version", ["10.1.0", "10.2.2", VERSION, "11.0.50 (v11.0.0-99-gabc)"])
def test_an_issue_concerns_the_versions_it_names(
    issues: Sequence[KnownIssue], version: str
) -> None:
    assert issues[0].concerns(CASE, version)


@pytest.mark.parametrize("version", ["10.0.9", "11.1.4", "12.0.0", "unknown", ""])
def test_an_issue_concerns_no_other_version(issues: Sequence[KnownIssue], version: str) -> None:
    assert not issues[0].concerns(CASE, version)


def test_an_issue_concerns_no_other_test(issues: Sequence[KnownIssue]) -> None:
    assert not issues[0].concerns(CASE.replace("e1000e", "igb"), VERSION)


@pytest.mark.parametrize("when", ["setup", "call"])
def test_a_failure_with_the_symptom_is_the_known_issue(
    issues: Sequence[KnownIssue], when: str
) -> None:
    report = a_report("failed", "QEMU died:\nkvm run failed Bad address", when)
    notes: dict[str, object] = {"blame": "qemu"}
    judge(report, issues, [VERSION], notes)
    assert report.skipped
    assert "hot-reset" in report.wasxfail
    assert notes["known"] == "hot-reset"


def test_a_failure_with_another_symptom_fails_and_names_the_issue(
    issues: Sequence[KnownIssue],
) -> None:
    report, notes = a_report("failed", "vector 3 was lost"), {"blame": "qemu"}
    judge(report, issues, [VERSION], notes)
    assert report.failed
    assert "known" not in notes
    assert report.longrepr == "vector 3 was lost"
    assert any("hot-reset" in text and "kvm run failed" in text for _, text in report.sections)


def test_a_pass_fails_and_asks_whether_it_was_fixed(issues: Sequence[KnownIssue]) -> None:
    report, notes = a_report("passed"), {}
    judge(report, issues, [VERSION], notes)
    assert report.failed
    for word in ("hot-reset", "11.1.3", "Fixed?", "known_issues.toml"):
        assert word in str(report.longrepr)
    assert notes["reason"] == report.longrepr, "xdist puts a line of its own before the latter"
    assert notes["blame"] == "qemu", "what the QEMU does is not what is known of it"


@pytest.mark.parametrize("versions", [(VERSION, "12.0.0"), ("12.0.0", VERSION)])
def test_of_two_qemus_one_may_have_what_is_known(
    issues: Sequence[KnownIssue], versions: Sequence[str]
) -> None:
    failed, passed = a_report("failed", "kvm run failed"), a_report("passed")
    judge(failed, issues, versions, {})
    judge(passed, issues, versions, {})
    assert failed.skipped
    assert passed.passed


def test_what_is_known_of_both_qemus_must_show(issues: Sequence[KnownIssue]) -> None:
    report = a_report("passed")
    judge(report, issues, ("10.2.2", VERSION), {})
    assert report.failed
    assert "10.2.2 and 11.1.3" in str(report.longrepr)


@pytest.mark.parametrize("when", ["setup", "teardown"])
def test_the_steps_around_a_test_need_not_fail(issues: Sequence[KnownIssue], when: str) -> None:
    report = a_report("passed", when=when)
    judge(report, issues, [VERSION], {})
    assert report.passed


@pytest.mark.parametrize(
    ("outcome", "text"), [("passed", ""), ("failed", "kvm run failed"), ("failed", "lost")]
)
def test_with_another_version_all_stays_as_it_is(
    issues: Sequence[KnownIssue], outcome: str, text: str
) -> None:
    report, notes = a_report(outcome, text), {"blame": "qemu"}
    judge(report, issues, ["12.0.0"], notes)
    assert (report.outcome, report.longrepr, notes) == (outcome, text or None, {"blame": "qemu"})
    assert report.sections == []


@pytest.mark.parametrize("blame", ["environment", "input"])
def test_a_failure_that_is_not_qemus_is_no_known_issue(
    issues: Sequence[KnownIssue], blame: str
) -> None:
    report, notes = a_report("failed", "kvm run failed, says the host"), {"blame": blame}
    judge(report, issues, [VERSION], notes)
    assert report.failed
    assert "known" not in notes


def test_a_skip_stays_a_skip(issues: Sequence[KnownIssue]) -> None:
    report, notes = a_report("skipped", "no IOMMUFD"), {}
    judge(report, issues, [VERSION], notes)
    assert report.skipped
    assert not hasattr(report, "wasxfail")
    assert notes == {}
