# SPDX-License-Identifier: GPL-2.0-or-later
"""The catalogue of faults, and how one gets into a source tree and out again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fixtures.evidence import known as known_issues
from fixtures.qualify import (
    BASE,
    BEGIN,
    END,
    QUICK,
    TOGETHER,
    Fault,
    Qualifier,
    Result,
    _Job,
    _replace_table,
    _Verdict,
    edited,
    load,
)
from images.cache import Cache
from images.errors import BadInputError
from images.progress import Progress

ROOT = Path(__file__).parents[2]

SOURCE = """\
static int other(int i)
{
    return i + 1;
}

int
victim(int i,
       int j)
{
    while (i < j) {
        i++;
    }
    return i + 1;
}
"""


def fault(pattern: str, replacement: str = "", function: str = "victim") -> Fault:
    return Fault("id", "file.c", function, ((pattern, replacement),), "breaks", "tests")


def test_the_catalogue_is_well_formed() -> None:
    faults = load()
    assert sum(not entry.harmless for entry in faults) >= 40
    assert sum(entry.harmless for entry in faults) >= 10
    assert set(QUICK) <= {entry.id for entry in faults}


def test_an_entry_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "faults.toml"
    path.write_text('[[fault]]\nid = "a"\nfunktion = "f"\n')
    with pytest.raises(BadInputError, match="funktion"):
        load(path)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ('["intx", "msi:9"]', "'msi:9': no axis has the value 'msi:9'"),
        ('["amd-iommu,iommufd,vfio-user"]', "'amd-iommu,iommufd,vfio-user': .* rules out"),
        ('"intx"', "'i': no axis has the value 'i'"),
    ],
)
def test_a_point_that_cannot_be_is_refused_by_the_name_of_its_entry(
    tmp_path: Path, points: str, reason: str
) -> None:
    path = tmp_path / "faults.toml"
    path.write_text(
        '[[fault]]\nid = "bad"\nfile = "f.c"\nfunction = "f"\nedits = [["a", "b"]]\n'
        f'breaks = "all"\ntests = ""\npoints = {points}\n'
    )
    with pytest.raises(BadInputError, match=f"bad: point {reason}"):
        load(path)


def test_an_edit_stays_in_its_function() -> None:
    text = fault(r"i \+ 1", "i + 2").apply(SOURCE)
    assert text == SOURCE[: SOURCE.index("int\nvictim")] + SOURCE[
        SOURCE.index("int\nvictim") :
    ].replace("i + 1", "i + 2")


def test_a_space_stands_for_any_white_space() -> None:
    assert "gone" in fault(r"\{ i\+\+; \}", "gone").apply(SOURCE)


@pytest.mark.parametrize("pattern", ["nowhere", "i"])
def test_an_edit_that_does_not_match_exactly_once_is_refused(pattern: str) -> None:
    with pytest.raises(LookupError, match="must once"):
        fault(pattern).apply(SOURCE)


def test_a_function_that_is_not_there_is_refused() -> None:
    with pytest.raises(LookupError, match="absent is defined 0 times"):
        fault("i", function="absent").apply(SOURCE)


def test_the_source_is_itself_again_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "file.c"
    path.write_text(SOURCE)
    with edited(tmp_path, fault(r"i \+ 1", "0")):
        assert path.read_text() != SOURCE
    assert path.read_text() == SOURCE
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.c"]


def qualifier(tmp_path: Path, *results: Result) -> Qualifier:
    faults = [fault_named(result.id, harmless=result.outcome == "clean") for result in results]
    (tmp_path / "source").mkdir()
    (tmp_path / "source/VERSION").write_text("10.2.2\n")
    made = Qualifier(tmp_path, Cache(tmp_path / "cache"), faults, progress=Progress(quiet=True))
    for result in results:
        made._record(result)
    return made


def fault_named(
    name: str, *, harmless: bool = False, points: tuple[str, ...] = (), **more: str
) -> Fault:
    more = {"tests": "", **more}
    return Fault(
        name, "file.c", "victim", (("j", "k"),), "" if harmless else "all", points=points, **more
    )


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (["clean", "caught", "missed", "not applicable"], 0),
        (["clean", "MISSED"], 1),
        (["FALSE ALARM", "caught"], 1),
        (["error", "caught"], 3),
        (["error", "MISSED"], 1),
        (["clean", "mended"], 0),
        (["clean", "NOT MENDED"], 1),
    ],
)
def test_only_what_was_claimed_and_seen_is_good(
    tmp_path: Path, outcomes: list[str], code: int
) -> None:
    results = [Result(f"fault-{n}", outcome) for n, outcome in enumerate(outcomes)]
    assert qualifier(tmp_path, *results).exit_code() == code


def test_the_table_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}old\n{END}\nafter\n")
    made = qualifier(
        tmp_path,
        Result("bad", "caught", "takeover [8]: x", verify_s=12.4),
        Result("base", "clean", verify_s=50, runs=10),
    )
    catalogue = [made.faults[0], fault_named("new")]
    for _ in range(2):
        _replace_table(page, made, catalogue)
        assert page.read_text() == (
            f"before\n{BEGIN}QEMU 10.2.2, 2 edits:\n\n"
            "| fault | what it breaks | outcome | seen by | s |\n|---|---|---|---|---:|\n"
            "| base | (nothing) | clean, 10 times |  | 50 |\n"
            "| base-at-points | (nothing) | not tried |  | 0 |\n"
            "| base-with-linux | (nothing) | not tried |  | 0 |\n"
            "| harmless-together | (nothing) | not tried |  | 0 |\n"
            "| harmless-together-at-points | (nothing) | not tried |  | 0 |\n"
            "| harmless-together-with-linux | (nothing) | not tried |  | 0 |\n"
            "| bad | all | caught | takeover [8]: x | 12 |\n"
            f"| new | all | not tried |  | 0 |\n{END}\nafter\n"
        )


def test_a_page_without_a_place_for_the_table_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("mine\n")
    with pytest.raises(BadInputError, match="no place for a table"):
        _replace_table(page, qualifier(tmp_path), [])
    assert page.read_text() == "mine\n"


def test_the_table_of_the_readme_has_the_whole_catalogue() -> None:
    table = (ROOT / "README.md").read_text().partition(BEGIN)[2].partition(END)[0]
    assert {line.split("|")[1].strip() for line in table.splitlines() if line.count("|") == 6} == {
        "fault",
        "---",
        "base",
        "base-at-points",
        "base-with-linux",
        "harmless-together",
        "harmless-together-at-points",
        "harmless-together-with-linux",
        *(entry.id for entry in load()),
    }


class _Builds(Qualifier):
    """One that builds and verifies nothing."""

    verified: list[str]
    points: dict[str, tuple[str, ...]]
    tests: dict[str, str]
    sources: dict[str, str]

    def build_base(self) -> Path:
        self.verified, self.points, self.tests, self.sources = [], {}, {}, {}
        (self.work / "qemu").write_text("elf")
        return self.work / "qemu"

    def _verify(self, job: _Job) -> Result:
        self.verified.append(job.fault.id)
        self.points[job.fault.id] = job.fault.points
        self.tests[job.fault.id] = job.fault.tests
        self.sources[job.fault.id] = job.binary.read_text()
        if job.fault.id == "strange":
            raise OSError("no such thing")
        if job.fault.harmless:
            here = "afar" if job.fault.points else "silent"
            return Result(job.fault.id, "clean", runs=self.runs, tests=["loud", here])
        return Result(job.fault.id, "caught", by="loud", tests=["loud"])


@pytest.mark.parametrize(
    ("tests", "ends", "outcome"),
    [
        ("test_takeover", [1], "caught"),
        ("test_takeover", [0, 1], "caught"),
        ("test_takeover", [0, 0], "MISSED"),
        ("test_takeover", [3, 1], "caught"),
        ("test_takeover", [3, 3], "error"),
        ("test_takeover", [0, 3, 0], "MISSED"),
        ("", [1], "caught"),
    ],
)
def test_what_could_not_be_verified_is_tried_once_more(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tests: str,
    ends: list[int],
    outcome: str,
) -> None:
    made = qualifier(tmp_path, Result("bad", "caught"))
    left = iter(ends)
    monkeypatch.setattr(Qualifier, "_run", lambda *_: _Verdict(next(left), "by"))
    monkeypatch.setattr(Cache, "discard", lambda *_: None)
    bad = Fault("bad", "file.c", "victim", (("j", "k"),), "all", tests)
    assert made._verify(_Job(bad, Path("/bin/true"))).outcome == outcome
    assert list(left) == []


def test_a_fault_is_tried_at_its_points_by_its_tests_and_then_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(_: object, argv: list[str]) -> subprocess.CompletedProcess[str]:
        asked.append(argv[argv.index("--verdict-json") + 2 :])
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(Qualifier, "_to_its_end", run)
    monkeypatch.setattr(Cache, "discard", lambda *_: None)
    bad = fault_named("bad", tests="test_takeover", points=("intx", "msi:8"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/qemu").touch()
    result = qualifier(tmp_path)._verify(_Job(bad, tmp_path / "bin/qemu"))
    assert result.outcome == "MISSED"
    points = ["--point", "intx", "--point", "msi:8"]
    assert asked == [["-k", "test_takeover", *points], points]


def test_a_fault_for_a_linux_guest_is_tried_by_its_tests_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(_: object, argv: list[str]) -> subprocess.CompletedProcess[str]:
        asked.append(argv[argv.index("--verdict-json") + 2 :])
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(Qualifier, "_to_its_end", run)
    monkeypatch.setattr(Cache, "discard", lambda *_: None)
    bad = fault_named("bad", tests="test_linux", guest="linux")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/qemu").touch()
    assert qualifier(tmp_path)._verify(_Job(bad, tmp_path / "bin/qemu")).outcome == "MISSED"
    assert asked == [["-k", "test_linux", "--profile", "quick"]]


CASES = {
    "gone": {"result": "FAIL", "notes": {"gone": "old"}},
    "shown": {"result": "known", "notes": {"known": "old"}},
    "another": {"result": "known", "notes": {"known": "other"}},
    "wrong": {"result": "FAIL", "notes": {}},
    "right": {"result": "ok", "notes": {}},
}


@pytest.mark.parametrize(
    ("cases", "code", "outcome"),
    [
        (["gone", "right", "another"], 1, "mended"),
        (["gone", "shown"], 1, "NOT MENDED"),
        (["gone", "wrong"], 1, "NOT MENDED"),
        (["wrong"], 1, "NOT MENDED"),
        (["right", "shown"], 0, "NOT MENDED"),
        (["right"], 0, "NOT MENDED"),
        (["gone"], 3, "error"),
    ],
)
def test_an_issue_is_mended_if_its_tests_say_so_and_none_fails_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: list[str], code: int, outcome: str
) -> None:
    asked: list[list[str]] = []

    def run(_: object, argv: list[str]) -> subprocess.CompletedProcess[str]:
        asked.append(argv)
        each = {"group": "takeover", "point": "8", "behaviour": "x", "phase": "call"}
        verdict = {"cases": [each | CASES[name] for name in cases]}
        Path(argv[argv.index("--verdict-json") + 1]).write_text(json.dumps(verdict))
        return subprocess.CompletedProcess(argv, code, "", "")

    monkeypatch.setattr(Qualifier, "_to_its_end", run)
    monkeypatch.setattr(Cache, "discard", lambda *_: None)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/qemu").touch()
    mend = fault_named("mend", tests="test_takeover", points=("intx",), mends="old")
    assert qualifier(tmp_path)._verify(_Job(mend, tmp_path / "bin/qemu")).outcome == outcome
    assert all("-x" not in argv for argv in asked), "all of its tests have to say so"


def test_known_issues_that_are_mended_are_of_the_list() -> None:
    known = {issue.id for issue in known_issues.load(ROOT / "tests/qemu/known_issues.toml")}
    assert {entry.mends for entry in load() if entry.mends} < known


@pytest.fixture
def qualify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., _Builds]:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/VERSION").write_text("10.2.2\n")
    (tmp_path / "source/file.c").write_text(SOURCE)

    def build(source: Path, *_: object, **__: object) -> Path:
        return Path(shutil.copy(source / "file.c", tmp_path / "qemu"))

    monkeypatch.setattr("images.qemu_build.build", build)

    def run(*faults: Fault, **options: int) -> _Builds:
        made = _Builds(
            tmp_path, Cache(tmp_path / "cache"), faults, progress=Progress(quiet=True), **options
        )
        made.run()
        return made

    return run


def test_a_fault_for_other_versions_is_not_applicable(qualify: Callable[..., _Builds]) -> None:
    made = qualify(fault_named("new", versions=">=11.0"))
    assert made.results["new"].outcome == "not applicable"
    assert made.verified == ["base"]


def test_a_fault_that_does_not_match_its_version_is_an_error(
    qualify: Callable[..., _Builds],
) -> None:
    made = qualify(fault("nowhere"))
    assert made.results["id"].outcome == "error"
    assert "must once" in made.results["id"].by
    assert made.exit_code() == 3


def test_what_has_been_seen_is_not_seen_again(qualify: Callable[..., _Builds]) -> None:
    known = Fault("known", "file.c", "victim", ((r"i \+ 1", "0"),), "all", "")
    assert qualify(known).verified == ["base", "known"]
    assert qualify(known).verified == []
    assert qualify(known).results["known"].outcome == "caught"
    assert qualify(known, again=True).verified == ["base", "known"]


@pytest.mark.parametrize("fault", [BASE, TOGETHER], ids=lambda fault: fault.id)
def test_the_base_and_what_is_harmless_are_verified_as_often_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    made = qualifier(tmp_path)
    made.runs = 3
    codes = iter([0, 0, 0, 0, 1])
    monkeypatch.setattr(Qualifier, "_run", lambda *_: _Verdict(next(codes), "by"))
    monkeypatch.setattr(Cache, "discard", lambda *_: None)
    fine = made._verify(_Job(fault, Path("/bin/true")))
    assert (fine.outcome, fine.runs) == ("clean", 3)
    alarmed = made._verify(_Job(fault, Path("/bin/true")))
    assert (alarmed.outcome, alarmed.runs) == ("FALSE ALARM", 0)


def test_harmless_edits_are_also_made_all_together(qualify: Callable[..., _Builds]) -> None:
    edits = [
        Fault(f"fine-{old}", "file.c", "victim", ((old, "0"),), "", "")
        for old in (r"i \+ 1", r"i\+\+")
    ]
    assert qualify(*edits).verified == ["base", "fine-i \\+ 1", "fine-i\\+\\+"]
    made = qualify(*edits, runs=2)
    assert made.verified == ["base", "harmless-together"]
    assert "return 0;" in made.sources["harmless-together"]
    assert "0;\n    }" in made.sources["harmless-together"]


def test_the_base_is_also_verified_at_all_points_that_faults_name(
    qualify: Callable[..., _Builds],
) -> None:
    faults = [
        Fault(name, "file.c", "victim", ((r"i \+ 1", "0"),), "all", "", points)
        for name, points in (("a", ("msi:8",)), ("b", ("intx", "msi:8")), ("c", ()))
    ]
    made = qualify(*faults)
    assert made.verified == ["base", "base-at-points", "a", "b", "c"]
    assert made.points["base"] == made.points["c"] == ()
    assert made.points["base-at-points"] == ("intx", "msi:8")
    assert qualify(*faults[1:]).verified == []
    assert qualify(faults[0]).verified == ["base-at-points"]


def test_the_base_is_not_verified_where_an_issue_is_mended(
    qualify: Callable[..., _Builds],
) -> None:
    mend = fault_named("mend", points=("intx",), mends="old")
    made = qualify(replace(mend, edits=((r"i \+ 1", "0"),)))
    assert made.verified == ["base", "mend"]


def test_the_base_is_also_verified_by_the_tests_of_faults_for_linux_guests(
    qualify: Callable[..., _Builds],
) -> None:
    faults = [
        Fault(name, "file.c", "victim", ((r"i \+ 1", "0"),), "all", tests, guest="linux")
        for name, tests in (("a", "one and two"), ("b", "three"))
    ]
    made = qualify(*faults)
    assert made.verified == ["base", "base-with-linux", "a", "b"]
    assert made.tests["base-with-linux"] == "(one and two) or (three)"
    assert made.tests["base"] == ""


def test_harmless_edits_are_also_verified_together_at_those_points(
    qualify: Callable[..., _Builds],
) -> None:
    fine = Fault("fine", "file.c", "victim", ((r"i \+ 1", "0"),), "", "")
    far = Fault("far", "file.c", "victim", ((r"i\+\+", "0"),), "all", "", ("intx",))
    made = qualify(fine, far, runs=2)
    name = "harmless-together-at-points"
    assert made.verified == ["base", "base-at-points", "harmless-together", name, "fine", "far"]
    assert made.points[name] == ("intx",)
    assert made.sources[name] == made.sources["harmless-together"] == made.sources["fine"]


def test_more_runs_than_were_seen_are_made(qualify: Callable[..., _Builds]) -> None:
    assert qualify(runs=2).verified == ["base"]
    assert qualify(runs=1).verified == []
    assert qualify(runs=3).verified == ["base"]


def test_who_is_no_witness_of_any_fault_is_named(qualify: Callable[..., _Builds]) -> None:
    known = Fault("known", "file.c", "victim", ((r"i \+ 1", "0"),), "all", "")
    assert qualify(known, witnesses=True).unmoved() == ["silent"]
    far = replace(known, id="far", points=("intx",))
    assert qualify(far, witnesses=True).unmoved() == ["silent", "afar"]


def test_an_error_is_tried_again_and_stops_nothing(qualify: Callable[..., _Builds]) -> None:
    faults = [
        Fault(name, "file.c", "victim", ((r"i \+ 1", "0"),), "all", "")
        for name in ("strange", "next")
    ]
    made = qualify(*faults)
    assert made.results["strange"].outcome == "error"
    assert made.results["next"].outcome == "caught"
    assert qualify(*faults).verified == ["strange"]


def test_an_interrupted_run_ends_what_it_verifies_and_keeps_none_of_it(
    tmp_path: Path, qualify: Callable[..., _Builds], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    begun = threading.Event()

    def verify(self: _Builds, job: _Job) -> Result:
        begun.set()
        ends.append(self._to_its_end(["sleep", "60"]).returncode)
        return Result(job.fault.id, "caught")

    def interrupt(*_: object, **__: object) -> Path:
        assert begun.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(_Builds, "_verify", verify)
    monkeypatch.setattr("images.qemu_build.build", interrupt)
    with pytest.raises(KeyboardInterrupt):
        qualify(fault(r"i \+ 1", "0"))
    assert ends == [-signal.SIGTERM]
    assert not (tmp_path / "results.json").exists()


def test_what_two_verifications_are_made_of_goes_with_the_last(tmp_path: Path) -> None:
    """The base is verified as usual and at named points: two binaries, which are equal."""
    gone: list[object] = []
    one, other = tmp_path / "one", tmp_path / "other"
    for binary in (one, other):
        binary.write_bytes(b"the same")
    qualifier = Qualifier(tmp_path, SimpleNamespace(discard=gone.append), ())  # type: ignore[arg-type]
    with qualifier._images(one):
        with qualifier._images(other):
            pass
        assert gone == []
    assert len(gone) == 2
