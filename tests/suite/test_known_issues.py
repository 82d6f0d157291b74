# SPDX-License-Identifier: GPL-2.0-or-later
"""Known issues: what the list may say, and what becomes of a test that it names."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures import known_issues, qualify
from fixtures.direct import described
from fixtures.endpoints.vfio_user import VfioUserEndpoint
from fixtures.evidence.known import KnownIssue, judge, load
from fixtures.evidence.reproducer import BLOCKS
from fixtures.known_issues import collected, flaws, mail, main, raiser
from fixtures.matrix import product
from images.cache import Cache
from images.errors import BadInputError
from images.sysroot import Sysroot

ENTRY = """\
[[issue]]
id = "hot-reset"
summary = "the device is hot-reset in new QEMU"
versions = ">=10.1,<=11.1.3"
tests = "test_takeover.*e1000e"
symptom = "kvm run failed"
evidence = "seen on 10.2.2"
"""
#: As far as an edit of the catalogue needs it.
ENABLE = """\
static bool vfio_cpr_intx_enable_kvm(VFIOPCIDevice *vdev)
{
    vdev->intx.kvm_accel = true;
}
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


@pytest.fixture(scope="module")
def ours(pytestconfig: pytest.Config) -> Sequence[KnownIssue]:
    """The list of the project."""
    return load(pytestconfig.rootpath / "tests/qemu/known_issues.toml")


def test_the_list_of_the_project_is_well_formed(ours: Sequence[KnownIssue]) -> None:
    assert list(flaws(ours, collected())) == []
    assert all(issue.id and issue.summary and issue.evidence for issue in ours)


def test_the_matrix_leaves_out_what_the_list_says_is_broken(ours: Sequence[KnownIssue]) -> None:
    """The points that `matrix.APART` sets apart are those of the issues that are about any test."""
    live = {"mode": ("cpr-transfer", "cpr-exec"), "iommu": ("intel-iommu",), "apic": ("xapic",)}
    for point in product(**live, irq=("msix:8", "msi:1", "intx")):
        case = f"tests/qemu/test_device.py::test_any[{point}]"
        known = any(issue.concerns(case, VERSION) for issue in ours)
        assert known == point.is_apart, point


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
    "not a pattern of those by chance": (ENTRY + 'by_chance = "*"\n', "hot-reset"),
    "not a pattern of tests": (ENTRY.replace("test_takeover", "*test_takeover"), "hot-reset"),
    "about nothing": (re.sub("tests = .*", "", ENTRY), "neither tests nor axes"),
    "no axes": (ENTRY + 'axes = "tcg"\n', "axes is not a table"),
    "no such axis": (ENTRY + 'axes = { colour = ["red"] }\n', "no axis 'colour'"),
    "no such value": (ENTRY + 'axes = { accel = ["xen"] }\n', "no value 'xen'"),
    "a value, no list": (ENTRY + 'axes = { accel = "tcg" }\n', "no list"),
    "a contradiction": (ENTRY + 'axes = { accel = ["tcg"], path = ["kvm"] }\n', "hot-reset"),
    "no reference": (ENTRY + 'upstream = "somewhere"\n', "no URL, <Message-Id> or commit"),
    "a report that says nothing": (ENTRY + "[issue.report]\n", "lacks observed and expected"),
    "a report that says too much": (ENTRY + '[issue.report]\nwho = "me"\n', "no field who"),
    "a reproducer of nothing": (ENTRY + "[issue.reproducer]\n", "lacks steps and shows"),
    "a step of no kind": (
        ENTRY + '[issue.reproducer]\nsteps = ["rm -rf /"]\nshows = "killed old 11"\n',
        "no building block: rm -rf /",
    ),
    "steps that are no list": (
        ENTRY + '[issue.reproducer]\nsteps = "start old"\nshows = "killed old 11"\n',
        "steps of the reproducer",
    ),
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


def test_axes_are_those_of_the_point_in_the_name(path: Path) -> None:
    path.write_text(re.sub("tests = .*", 'axes = { accel = ["tcg"] }', ENTRY))
    (issue,) = load(path)
    assert issue.concerns("test_takeover.py::test_it_fires[msix:8+qemu+tcg]", VERSION)
    assert not issue.concerns("test_takeover.py::test_it_fires[msix:8+qemu]", VERSION)
    assert not issue.concerns("test_linux.py::test_it_fires[tcg-e1000e]", VERSION), "no point"
    assert not issue.concerns("test_takeover.py::test_it_fires", VERSION)


def test_axes_are_those_of_the_first_of_several_functions(path: Path) -> None:
    path.write_text(re.sub("tests = .*", 'axes = { mode = ["cpr-exec"] }', ENTRY))
    (issue,) = load(path)
    assert issue.concerns("test_several.py::test_it_fires[msix:8+cpr-exec+twins]", VERSION)
    assert not issue.concerns("test_several.py::test_it_fires[msix:8+twins]", VERSION)


def test_axes_and_tests_must_both_fit(path: Path) -> None:
    path.write_text(ENTRY.replace(".*e1000e", "") + 'axes = { accel = ["tcg"] }\n')
    (issue,) = load(path)
    assert issue.concerns("test_takeover.py::test_it_fires[msix:8+qemu+tcg]", VERSION)
    assert not issue.concerns("test_pending.py::test_it_fires[msix:8+qemu+tcg]", VERSION)


@pytest.mark.parametrize(
    "reference", ["https://gitlab.com/qemu-project/qemu/-/issues/1", "<a.b@c.org>", "0123456789ab"]
)
def test_a_reference_is_read(path: Path, reference: str) -> None:
    path.write_text(ENTRY + f'upstream = "{reference}"\n')
    assert load(path)[0].upstream == reference


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


def test_one_that_shows_by_chance_is_known_where_it_does_and_passes_where_not(path: Path) -> None:
    path.write_text(ENTRY + 'by_chance = "it_fires"\n')
    issues = load(path)
    failed, passed = a_report("failed", "kvm run failed"), a_report("passed")
    judge(failed, issues, [VERSION], {})
    judge(passed, issues, [VERSION], {})
    assert failed.skipped
    assert passed.passed
    assert not issues[0].always_shows(CASE)
    assert issues[0].always_shows(CASE.replace("it_fires", "it_is_pending"))


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


# ci/known-issues: what is wrong with a list.

REPORT = """\
[issue.report]
observed = "it dies"
expected = "it lives"
"""
DIES = """\
[issue.reproducer]
steps = ["start old", "monitor old", "signal old SEGV"]
shows = "killed old 11"
"""
GOOD = ENTRY + REPORT + DIES

FLAWS = {
    "nothing": (GOOD, []),
    "nothing, as it has been reported": (
        ENTRY + 'no_reproducer = "x"\nupstream = "<a@b>"\n',
        [],
    ),
    "an id twice": (GOOD + GOOD, ["hot-reset: there are 2 of that id"]),
    "neither reference nor draft": (ENTRY + DIES, ["neither a reference"]),
    "no reproducer, and no word of it": (ENTRY + REPORT, ["wants a reproducer", "no steps"]),
    "a reproducer, and a reason for none": (
        ENTRY + 'no_reproducer = "x"\n' + REPORT + DIES,
        ["not both"],
    ),
    "no test": (GOOD.replace("e1000e", "e2000e"), ["concerns no test: test_takeover.*e2000e"]),
    "no test that always tells": (
        GOOD.replace("evidence", 'by_chance = "takeover"\nevidence'),
        ["shows only by chance"],
    ),
    "no version": (GOOD.replace(">=10.1,<=11.1.3", ""), ["versions names none"]),
    "not a point": (GOOD + 'device = "msix:3"\n', ["the reproducer's device"]),
    "not a script": (GOOD.replace("old SEGV", "old '"), ["the reproducer is no script"]),
}


@pytest.mark.parametrize(("text", "found"), FLAWS.values(), ids=FLAWS)
def test_a_flaw_is_told(path: Path, text: str, found: Sequence[str]) -> None:
    path.write_text(text)
    told = list(flaws(load(path), [CASE]))
    assert len(told) == len(found)
    for flaw, words in zip(told, found, strict=True):
        assert words in flaw


def test_a_list_that_cannot_be_read_fails_its_check(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_text(MALFORMED["a field is missing"][0])
    assert main(["--list", str(path), "check"]) == 1
    assert "evidence" in capsys.readouterr().err


def test_a_list_that_is_not_there_is_bad_input(path: Path) -> None:
    assert main(["--list", str(path), "check"]) == 2


def test_each_entry_is_listed(
    ours: Sequence[KnownIssue], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for issue in ours:
        (line,) = (line for line in lines if line.startswith(f"{issue.id} "))
        assert ("draft" in line) == (issue.report is not None)


@pytest.mark.parametrize("verb", ["draft", "reproducer", "verify"])
def test_no_such_issue_is_one_clear_line(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert main([verb, "no-such"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no known issue no-such: there are vfio-user-ignores-cpr, " in line


@pytest.mark.parametrize("verb", ["reproducer", "verify"])
def test_an_issue_without_a_reproducer_says_why(
    path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    path.write_text(ENTRY + 'no_reproducer = "it takes a hammer"\n')
    assert main(["--list", str(path), verb, "hot-reset"]) == 2
    assert "no reproducer: it takes a hammer" in capsys.readouterr().err


# The mail.


def test_a_report_is_a_mail_with_all_that_is_known(path: Path) -> None:
    path.write_text(GOOD)
    (issue,) = load(path)
    message = mail(issue)
    assert message["To"] == "qemu-devel@nongnu.org"
    assert message["Subject"] == "[BUG] the device is hot-reset in new QEMU"
    text = message.get_content()
    for words in (">=10.1", "it dies", "it lives", "seen on 10.2.2", "signal old SEGV"):
        assert words in text
    # The script can be cut out and run.
    script = text.partition(" ---\n")[2]
    assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [(ENTRY, "has no draft"), (ENTRY + 'upstream = "<a@b>"\n', "has been reported: <a@b>")],
)
def test_what_is_no_draft_is_no_mail(path: Path, text: str, why: str) -> None:
    path.write_text(text)
    with pytest.raises(BadInputError, match=re.escape(why)):
        mail(load(path)[0])


def test_what_mends_it_is_in_the_mail_and_a_diff_to_a_tree(
    ours: Sequence[KnownIssue], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (issue,) = (each for each in ours if each.id == "intx-stays-masked")
    assert "vfio_cpr_intx_enable_kvm (hw/vfio/pci.c): INTx is unmasked" in mail(issue).get_content()
    source = tmp_path / "hw/vfio/pci.c"
    source.parent.mkdir(parents=True)
    source.write_text(ENABLE)
    assert main(["mend", issue.id, str(tmp_path)]) == 0
    git = ("git", "-C", str(tmp_path), "apply", "-")
    subprocess.run(git, input=capsys.readouterr().out, text=True, check=True)
    assert "vfio_device_irq_unmask(" in source.read_text()


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("intx-stays-masked", "", "hw/vfio/pci.c: No such file"),
        ("intx-stays-masked", "int one;\n", "vfio_cpr_intx_enable_kvm is defined 0 times"),
        ("gap-in-the-moon", ENABLE, "no known issue gap-in-the-moon"),
        ("UNMENDED", ENABLE, "has nothing that mends it"),
    ],
)
def test_what_cannot_be_mended_is_one_clear_line(
    ours: Sequence[KnownIssue],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    why: str,
) -> None:
    mended = {fault.mends for fault in qualify.load()}
    unmended = next(issue.id for issue in ours if issue.id not in mended)
    if text:
        (tmp_path / "hw/vfio").mkdir(parents=True)
        (tmp_path / "hw/vfio/pci.c").write_text(text)
    assert main(["mend", name.replace("UNMENDED", unmended), str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line


# The scripts.


def test_a_script_has_the_blocks_that_it_needs_and_no_others(path: Path) -> None:
    path.write_text(GOOD)
    (issue,) = load(path)
    assert issue.reproducer
    script = issue.reproducer.script("", "")
    has = {name for name in BLOCKS if f"\n{name}() {{" in script}
    assert {"could_not", "set_up", "clean_up", "await", "ended", "greets", "killed"} <= has
    at_once = replace(issue.reproducer, steps=("start old",)).script("", "")
    assert "\nawait() {" in at_once  # as TIMEOUT=5 await
    assert not has & {"bind", "give_back", "bus", "listen", "failed"}


def test_each_block_is_used(ours: Sequence[KnownIssue]) -> None:
    scripts = "".join(i.reproducer.script("", "") for i in ours if i.reproducer)
    assert [name for name in BLOCKS if f"\n{name}() {{" not in scripts] == []


def play(path: Path, qemu: str, **variables: str) -> subprocess.CompletedProcess[str]:
    (issue,) = load(path)
    assert issue.reproducer
    return subprocess.run(
        ["sh"],
        input=issue.reproducer.script("", ""),
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "QEMU": qemu, "TIMEOUT": "20", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_shows_is_reproduced(path: Path, packaged: Sysroot) -> None:
    path.write_text(GOOD)
    done = play(path, shlex.join(packaged.qemu()))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("it shows: old QEMU has ended with 139")


def test_what_does_not_show_is_not_reproduced(path: Path, packaged: Sysroot) -> None:
    path.write_text(GOOD.replace('"signal old SEGV"', '"transfer", "monitor new"'))
    done = play(path, shlex.join(packaged.qemu()))
    assert done.returncode == 1, done.stderr
    assert done.stdout == "it does not show: old QEMU goes on\n"


@pytest.mark.parametrize("qemu", ["/bin/false", "/no/such/qemu"])
def test_without_a_qemu_it_could_not_be_tried(path: Path, qemu: str) -> None:
    path.write_text(GOOD)
    done = play(path, qemu)
    assert done.returncode == 3
    assert done.stderr.startswith("could not be tried: old QEMU does not start")


def test_a_step_that_is_refused_is_no_verdict(path: Path, packaged: Sysroot) -> None:
    path.write_text(GOOD.replace("signal old SEGV", "qmp old no-such-command"))
    done = play(path, shlex.join(packaged.qemu()))
    assert done.returncode == 3
    assert "old QEMU refuses no-such-command" in done.stderr


@pytest.mark.parametrize(
    ("more", "named"),
    [("", "DEVICE"), ("served = true\n", "SOCKET")],
    ids=["of the host", "of a server"],
)
def test_a_device_must_be_named(path: Path, more: str, named: str) -> None:
    path.write_text(GOOD + 'device = "msix:8"\nneeds = "a function with MSI-X"\n' + more)
    done = play(path, "/bin/false")
    assert done.returncode == 2
    assert done.stderr.startswith(f"set {named} to ")
    assert play(path, "/bin/false", **{named: "/no/such"}).returncode == 2


def test_a_script_takes_two_functions(path: Path) -> None:
    path.write_text(
        GOOD
        + 'device = "msix:8+multifunction"\nneeds = "two functions"\n'
        + "options = '-device vfio-pci,host=$DEVICE -device vfio-pci,host=$OTHER'\n"
    )
    (issue,) = load(path)
    assert list(flaws([issue], [CASE])) == []
    assert issue.reproducer
    assert "DEVICE=0000:01:00.0 OTHER=0000:01:00.1 QEMU=" in issue.reproducer.script("", "")
    done = play(path, "/bin/false", DEVICE="/no/such", OTHER="/no/such")
    assert done.returncode == 2
    assert done.stderr.startswith("set DEVICE and OTHER to the PCI address of two functions")


PENDING = """\
[issue.reproducer]
steps = ["start old", "monitor old", "enable_msix old 0"]
shows = "hides_pending old 0"
served = true
device = "msix:8+vfio-user"
needs = "a server"
options = '-device {"driver":"vfio-user-pci","addr":"4","socket":{"type":"unix","path":"$SOCKET"}}'
"""


class Knowing(VfioUserEndpoint):
    """A server that shows as pending what is masked."""

    def fire(self, vector: int = 0) -> None:
        self.set_pending(vector)
        super().fire(vector)


@pytest.mark.parametrize(("server", "code"), [(VfioUserEndpoint, 0), (Knowing, 1)])
def test_a_server_is_told_to_raise_a_vector(
    path: Path, packaged: Sysroot, tmp_path: Path, server: type[VfioUserEndpoint], code: int
) -> None:
    path.write_text(ENTRY + REPORT + PENDING)
    endpoint = server(described(8))
    with contextlib.ExitStack() as stack:
        stack.callback(endpoint.close)
        endpoint.listen(tmp_path / "socket")
        fire = raiser(endpoint, tmp_path, stack)
        done = play(path, shlex.join(packaged.qemu()), SOCKET=str(tmp_path / "socket"), FIRE=fire)
    assert done.returncode == code, done.stderr
    assert f"the pending bit of vector 0 was {code} " in done.stdout


def test_what_raises_a_vector_must_be_named(path: Path, packaged: Sysroot, tmp_path: Path) -> None:
    path.write_text(ENTRY + REPORT + PENDING)
    endpoint = VfioUserEndpoint(described(8))
    with contextlib.closing(endpoint):
        endpoint.listen(tmp_path / "socket")
        done = play(path, shlex.join(packaged.qemu()), SOCKET=str(tmp_path / "socket"))
    assert done.returncode == 2
    assert done.stderr.startswith("set FIRE to ")


def test_a_wait_within_a_wait_ends_too() -> None:
    """Each has time of its own, and is not given more by the other."""
    blocks = "".join(BLOCKS[name] for name in ("await", "later"))
    script = blocks + "inner() { await true; false; }\nTIMEOUT=1\nawait inner; echo $?\n"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout == "1\n"


def test_a_script_leaves_nothing(path: Path, packaged: Sysroot, tmp_path: Path) -> None:
    path.write_text(GOOD.replace('"signal old SEGV"', '"transfer", "signal old STOP"'))
    play(path, shlex.join(packaged.qemu()), TMPDIR=str(tmp_path))
    left = subprocess.run(
        ["grep", "-ls", "--", str(tmp_path), *map(str, Path("/proc").glob("[0-9]*/cmdline"))],
        capture_output=True,
        text=True,
    ).stdout.split()
    assert [p for p in left if Path(p).exists()] == []
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_done_in_time_leaves_nothing(
    cache: Cache, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_issues, "DEADLINE_S", 3.0)
    path.write_text(GOOD.replace('"signal old SEGV"', '"signal old STOP", "qmp old query-status"'))
    before = {*Path("/dev/shm").glob("tmp.*"), *Path("/tmp").glob("tmp.*")}
    assert main(["--list", str(path), "verify", "-q", "--cache", str(cache.root), "hot-reset"]) == 3
    assert "did not end in 3 s" in capsys.readouterr().out
    assert {*Path("/dev/shm").glob("tmp.*"), *Path("/tmp").glob("tmp.*")} <= before


VERDICTS = {
    "reproduced": ("signal old SEGV", 0),
    "not reproduced": ("transfer", 1),
    "could not be tried": ("qmp old no-such-command", 3),
}


@pytest.mark.parametrize(("step", "code"), VERDICTS.values(), ids=VERDICTS)
def test_issues_are_verified_on_this_machine(
    cache: Cache, path: Path, capsys: pytest.CaptureFixture[str], step: str, code: int
) -> None:
    path.write_text(GOOD.replace("signal old SEGV", step))
    verify = ["--list", str(path), "verify", "-q", "--cache", str(cache.root)]
    assert main([*verify, "hot-reset"]) == code
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"hot-reset: {next(k for k, v in VERDICTS.items() if v[1] == code)} in ")
