# SPDX-License-Identifier: GPL-2.0-or-later
"""Avocado finds our tests, runs them, tells how they came out, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from avocado.core.nrunner.runnable import Runnable

from fixtures.avocado.reference import Reference, root_of
from fixtures.avocado.runner import VerdictRunner, outcome, parameters
from fixtures.waiting import until
from images.cache import Cache

ROOT = Path(__file__).parents[2]
MODULE = "tests/qemu/test_takeover.py"


# What names tests.


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a/test_b.py", ("a/test_b.py", "", "")),
        ("a/test_b.py[msix:8+iommufd]", ("a/test_b.py", "msix:8+iommufd", "")),
        ("a/test_b.py:pba or mask", ("a/test_b.py", "", "pba or mask")),
        ("test_b.py[msi:8]:pba", ("test_b.py", "msi:8", "pba")),
    ],
)
def test_a_reference_is_a_module_a_point_and_words(text: str, parts: tuple[str, ...]) -> None:
    reference = Reference.parse(text)
    assert reference == Reference(*parts)
    assert str(reference) == text


@pytest.mark.parametrize("text", ["", "a.c", "test_b.py[]", "test_b.py[x", "test_b.py:", "tests/"])
def test_what_is_none_is_not_taken_for_one(text: str) -> None:
    assert Reference.parse(text) is None


def test_a_reference_knows_its_checkout() -> None:
    assert Reference(str(ROOT / MODULE)).root == ROOT
    assert root_of(ROOT / "tests/suite") == ROOT
    for other in ("tests/suite/test_avocado.py", "tests/qemu/conftest.py", "tests/qemu/test_no.py"):
        assert Reference(str(ROOT / other)).root is None


# What came out.


def verdict(*results: str) -> dict[str, Any]:
    def case(number: int, result: str) -> dict[str, str]:
        return {
            "result": result,
            "text": f"why {result}" if result != "ok" else "",
            "group": "takeover",
            "behaviour": f"behaviour {number}",
            "point": "msix:8",
        }

    return {"facts": {"QEMU": "11"}, "incidents": [], "cases": list(map(case, range(9), results))}


OUTCOMES = {
    "all is well": (0, ["ok", "ok"], "", "pass", None),
    "some cannot be": (0, ["ok", "skip"], "", "pass", None),
    "a known issue": (0, ["ok", "known", "known"], "", "warn", "why known"),
    "a failure": (1, ["ok", "known", "FAIL"], "", "fail", "behaviour 2: why FAIL"),
    "a crash": (1, ["crashed", "crashed"], "", "fail", "behaviour 0: why crashed (and 1 more)"),
    "none can be": (3, ["skip", "skip"], "", "skip", "why skip"),
    "no environment": (3, ["error"], "", "error", "behaviour 0: why error"),
    "no tests": (3, [], "ci/verify: no test matches", "error", "ci/verify: no test matches"),
    "not begun": (3, [], "apt\nci/verify: no gcc\n", "error", "ci/verify: no gcc"),
    "bad input": (2, [], "ci/verify: no such file", "error", "ci/verify: no such file"),
    "contradiction": (2, [], "ci/verify: a rules out b", "error", "ci/verify: a rules out b"),
    "interrupted": (130, ["ok"], "", "interrupted", "interrupted"),
    "killed": (-9, [], "", "error", "ci/verify ended with -9"),
    "good of nothing": (0, [], "", "error", "nothing was verified"),
}


@pytest.mark.parametrize(
    ("code", "results", "said", "result", "reason"), OUTCOMES.values(), ids=OUTCOMES
)
def test_a_verdict_is_a_status(
    code: int, results: list[str], said: str, result: str, reason: str | None
) -> None:
    found = outcome(code, verdict(*results) if results else {}, said)
    assert (found.result, found.reason) == (result, reason)


def test_a_variant_that_cannot_be_is_skipped_with_its_reason() -> None:
    contradiction = outcome(2, {}, "ci/verify: tcg rules out split: why", at_variant=True)
    assert (contradiction.result, contradiction.reason) == ("skip", "tcg rules out split: why")
    elsewhere = outcome(3, verdict(), "nothing: no test matches", at_variant=True)
    assert (elsewhere.result, elsewhere.reason) == ("skip", "it has no behaviour at this point")
    typo = outcome(2, {}, "ci/verify: no axis has the value 'msix:3'", at_variant=True)
    assert typo.result == "error"


def test_the_parameters_of_a_variant_are_gathered_from_all_its_nodes() -> None:
    variant = {
        "variant_id": "a-b-1234",
        "paths": ["/run/*"],
        "variant": [
            ["/run/a", [["/run/a", "irq", "msi:8"]]],
            ["/run/b", [["/run/b", "container", "iommufd"], ["/run", "vfio_cpr_args", "-x"]]],
        ],
    }
    assert parameters(variant) == {
        "irq": "msi:8",
        "container": "iommufd",
        "vfio_cpr_args": "-x",
    }
    assert parameters(None) == {}


# With a suite that is a script.

SUITE = """\
#!/bin/sh
here=$(dirname "$0")
case "$*" in
    *--list-axes*) printf '%s (default x)\\n    x  so many\\n' irq container; exit ;;
    *no_such*) echo "ci/verify: bad input" >&2; exit 2 ;;
    *--list-groups*) cat "$here/groups"; exit ;;
esac
for word; do
    [ "$before" != --verdict-json ] || cp "$here/verdict" "$word"
    [ "$before" != --evidence ] || { mkdir -p "$word/case" && echo trace > "$word/case/log"; }
    before=$word
done
echo "verifying: $*"
echo "a note" >&2
[ ! -e "$here/hangs" ] || { sleep 1000 & wait; }
exit "$(cat "$here/code")"
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A checkout whose ci/verify is a script that says what we want."""
    root = tmp_path / "suite"
    for name in ("takeover", "pending"):
        (root / f"tests/qemu/test_{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (root / f"tests/qemu/test_{name}.py").touch()
    (root / "tests/qemu/conftest.py").touch()
    (root / "ci").mkdir()
    (root / "ci/verify").write_text(SUITE)
    (root / "ci/verify").chmod(0o755)
    (root / "ci/groups").write_text(f"{MODULE}[msix:1] 3\n{MODULE}[msix:8] 3\n")
    (root / "ci/code").write_text("0")
    (root / "ci/verdict").write_text(json.dumps(verdict("ok", "known")))
    return root


def run(uri: str, **runnable: Any) -> list[dict[str, Any]]:
    return list(VerdictRunner().run(Runnable("vfio-cpr", uri, **runnable)))


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A runner has a process for itself, and heeds signals in its own way."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def log(told: list[dict[str, Any]], kind: str) -> str:
    return b"".join(m["log"] for m in told if m.get("type") == kind).decode()


def test_a_group_is_one_run_whose_results_are_those_of_the_test(
    suite: Path, tmp_path: Path
) -> None:
    place = tmp_path / "results"
    place.mkdir()
    told = run(f"{suite / MODULE}[msix:8]:pba", output_dir=str(place))
    assert [m["status"] for m in told if m["status"] != "running"] == ["started", "finished"]
    assert (told[-1]["result"], told[-1]["fail_reason"]) == ("warn", "why known")
    said = log(told, "stdout")
    assert f"--group {MODULE}[msix:8] -k pba --profile main" in said
    assert log(told, "stderr") == "a note\n"
    assert "known   takeover [msix:8] behaviour 1: why known" in log(told, "whiteboard")
    assert (place / "evidence/case/log").read_text() == "trace\n"
    assert json.loads((place / "verdict.json").read_text())["facts"] == {"QEMU": "11"}
    assert not log(told, "file")


def test_where_the_job_sees_no_files_of_ours_they_are_sent(suite: Path, tmp_path: Path) -> None:
    told = run(str(suite / MODULE), output_dir=str(tmp_path / "on another machine"))
    files = {m["path"]: m["log"] for m in told if m.get("type") == "file"}
    assert files["evidence/case/log"] == b"trace\n"
    assert set(files) == {"evidence/case/log", "verdict.json"}


def test_a_variant_is_a_point(suite: Path) -> None:
    values = [
        ["/a", "irq", "msi:8"],
        ["/b", "container", "iommufd"],
        ["/", "vfio_cpr_args", "-x 1"],
    ]
    told = run(str(suite / MODULE), variant={"variant": [["/a", values]], "paths": []})
    assert "--point container=iommufd,irq=msi:8 -x 1 " in log(told, "stdout") + " "


def test_a_variant_with_a_parameter_that_nothing_heeds_is_an_error(suite: Path) -> None:
    values = [["/a", "conatiner", "iommufd"]]
    told = run(str(suite / MODULE), variant={"variant": [["/a", values]], "paths": []})
    assert told[-1]["result"] == "error"
    assert (
        "the variant has conatiner; there are point, vfio_cpr_args, and the axes container, irq"
        in (told[-1]["fail_reason"])
    )


def test_what_is_no_test_of_ours_is_an_error() -> None:
    assert run("/no/such/test_x.py")[-1]["result"] == "error"


# With Avocado, and the plugin as pip installs it.


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plugin")
    source = tmp_path_factory.mktemp("source")
    subprocess.run(["git", "checkout-index", "-a", f"--prefix={source}/"], cwd=ROOT, check=True)
    subprocess.run(["cp", "-r", ROOT / "fixtures/avocado", source / "fixtures"], check=True)
    subprocess.run(["cp", ROOT / "pyproject.toml", source], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", place, source], check=True)
    return place


Avocado = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(plugin: Path, tmp_path: Path) -> dict[str, str]:
    """Where nothing but the plugin is known of this checkout."""
    return {
        **os.environ,
        "PYTHONPATH": str(plugin),
        "PATH": f"{plugin / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "VFIO_CPR_TEST": str(tmp_path),
    }


@pytest.fixture
def avocado(environment: dict[str, str], tmp_path: Path) -> Avocado:
    (tmp_path / "home").mkdir()

    def run(*words: str | Path, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "avocado", *map(str, words)],
            env=environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def results(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "jobs/latest/results.json").read_text())
    return found


def test_only_the_plugin_is_installed(plugin: Path) -> None:
    assert {path.name for path in plugin.iterdir() if not path.name.endswith(".dist-info")} == {
        "bin",
        "vfio_cpr_avocado",
    }
    assert [path.name for path in (plugin / "bin").iterdir()] == ["avocado-runner-vfio-cpr"]


def test_tests_are_listed_by_groups(avocado: Avocado, suite: Path) -> None:
    listed = [f"vfio-cpr {MODULE}[msix:1]", f"vfio-cpr {MODULE}[msix:8]"]
    assert avocado("list", "tests/qemu", cwd=suite).stdout.splitlines() == listed
    assert avocado("list", cwd=suite).stdout.splitlines() == listed
    assert avocado("list", f"{MODULE}[msix:8]", cwd=suite).stdout.splitlines() == listed[1:]
    whole = avocado("list", "--vfio-cpr-whole-modules", MODULE, cwd=suite)
    assert whole.stdout.splitlines() == [f"vfio-cpr {MODULE}"]


def test_what_the_suite_does_not_take_is_said(avocado: Avocado, suite: Path) -> None:
    done = avocado("list", "--vfio-cpr-args=--no_such", MODULE, cwd=suite)
    assert "ci/verify: bad input" in done.stdout + done.stderr


def test_elsewhere_nothing_of_ours_is_found(avocado: Avocado, tmp_path: Path) -> None:
    (tmp_path / "test_other.py").touch()
    assert avocado("list").stdout == ""
    assert "vfio-cpr" not in avocado("list", "test_other.py").stdout


def test_a_run_has_our_statuses_and_evidence(avocado: Avocado, suite: Path, tmp_path: Path) -> None:
    job = ("--job-results-dir", tmp_path / "jobs", "--disable-sysinfo")
    done = avocado("run", *job, "--vfio-cpr-args=--qemu Q", MODULE, cwd=suite)
    assert done.returncode == 0, done.stdout
    told = results(tmp_path)
    assert (told["warn"], told["total"]) == (2, 2)
    one = min(told["tests"], key=lambda test: test["name"])  # they run in parallel
    assert (one["status"], one["fail_reason"]) == ("WARN", "why known")
    assert "behaviour 1: why known" in one["whiteboard"]
    place = Path(one["logdir"])
    assert (place / "evidence/case/log").exists()
    assert f"--group {MODULE}[msix:1] --profile main --qemu Q" in (place / "stdout").read_text()

    (suite / "ci/code").write_text("1")
    (suite / "ci/verdict").write_text(json.dumps(verdict("FAIL")))
    done = avocado("run", *job, f"{MODULE}[msix:8]", cwd=suite)
    assert done.returncode == 1
    assert results(tmp_path)["tests"][0]["status"] == "FAIL"


VARIANTS = """\
irq: !mux
    a:
        irq: msix:8
    b:
        irq: msi:8
    c:
        irq: intx
container: !mux
    a:
        container: type1
    b:
        container: iommufd
"""
# With two values of each, CIT of 113.0 gives up once in some times: it is random.
PAIRS = "PARAMETERS\nirq [msix:8, msi:8, intx]\ncontainer [type1, iommufd]\nCONSTRAINTS\n"


@pytest.mark.parametrize(
    ("option", "content"),
    [("--mux-yaml", VARIANTS), ("--cit-parameter-file", PAIRS)],
    ids=["yaml-to-mux", "CIT"],
)
def test_variants_are_points(
    avocado: Avocado, suite: Path, tmp_path: Path, option: str, content: str
) -> None:
    (tmp_path / "variants").write_text(content)
    job = ("--job-results-dir", tmp_path / "jobs", "--disable-sysinfo")
    done = avocado("run", *job, option, tmp_path / "variants", "--", MODULE, cwd=suite)
    assert done.returncode == 0, done.stdout
    said = [(Path(t["logdir"]) / "stdout").read_text() for t in results(tmp_path)["tests"]]
    points = {text.partition("--point ")[2].split()[0] for text in said}
    assert len(said) == 6
    assert points == {
        f"container={container},irq={irq}"
        for container in ("type1", "iommufd")
        for irq in ("msix:8", "msi:8", "intx")
    }


def test_variants_that_cannot_be_made_are_not_left_out(
    avocado: Avocado, suite: Path, tmp_path: Path
) -> None:
    """CIT of 113.0 gives up where a parameter has one value, and Avocado goes on without."""
    (tmp_path / "variants").write_text(PAIRS.replace("type1, ", ""))
    job = ("--job-results-dir", tmp_path / "jobs", "--disable-sysinfo")
    named = ("--cit-parameter-file", tmp_path / "variants")
    done = avocado("run", *job, *named, "--", MODULE, cwd=suite)
    assert done.returncode != 0
    assert "there are no variants, but" in done.stdout + done.stderr


def test_a_point_is_not_named_twice(avocado: Avocado, suite: Path, tmp_path: Path) -> None:
    job = ("--job-results-dir", tmp_path / "jobs", "--disable-sysinfo")
    done = avocado("run", *job, "-p", "irq=msix:8", "--", f"{MODULE}[msix:8]", cwd=suite)
    assert done.returncode != 0
    assert "which point is meant: msix:8, or those of the variants?" in done.stdout + done.stderr


def ours(tmp_path: Path) -> list[str]:
    """The processes that a test has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"VFIO_CPR_TEST={tmp_path}\0".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it has just ended
    return found


def test_a_timeout_ends_all_that_was_started(avocado: Avocado, suite: Path, tmp_path: Path) -> None:
    (suite / "ci/hangs").touch()
    (tmp_path / "conf").write_text("[task.timeout]\nrunning = 4\n")
    job = ("--job-results-dir", tmp_path / "jobs", "--disable-sysinfo")
    done = avocado("--config", tmp_path / "conf", "run", *job, f"{MODULE}[msix:8]", cwd=suite)
    assert done.returncode == 8
    (one,) = results(tmp_path)["tests"]
    assert (one["status"], one["fail_reason"]) == (
        "INTERRUPTED",
        "Test interrupted: Timeout reached",
    )
    assert "verifying" in (Path(one["logdir"]) / "stdout").read_text()
    until(lambda: not ours(tmp_path), "the end of all processes", 30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_runner_that_is_ended_leaves_nothing(
    environment: dict[str, str], suite: Path, tmp_path: Path, number: int
) -> None:
    (suite / "ci/hangs").touch()
    results = tmp_path / "results"
    results.mkdir()
    runner = subprocess.Popen(
        ["avocado-runner-vfio-cpr", "runnable-run", "-u", str(suite / MODULE)],
        executable=environment["PATH"].partition(":")[0] + "/avocado-runner-vfio-cpr",
        env={**environment, "TMPDIR": str(results)},
        stdout=subprocess.DEVNULL,
    )
    until(lambda: any("sleep 1000" in line for line in ours(tmp_path)), "its work", 20)
    runner.send_signal(number)
    runner.wait()
    until(lambda: not ours(tmp_path), "the end of all processes", 30)
    until(lambda: not any(results.iterdir()), "the end of its results", 5)


def test_the_real_suite_by_its_own_command(cache: Cache, tmp_path: Path) -> None:
    """``ci/avocado`` sets itself up; a known issue is a warning."""
    done = subprocess.run(
        [
            *(ROOT / "ci/avocado", "run", "--job-results-dir", tmp_path / "jobs"),
            *("--disable-sysinfo", "--vfio-cpr-profile", "smoke"),
            "tests/qemu/test_direct.py[1-vectors]",
        ],
        cwd=ROOT,
        env={**os.environ, "VFIO_CPR_CACHE": str(cache.root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (one,) = results(tmp_path)["tests"]
    assert one["status"] == "WARN"
    assert "vfio-user-shows-no-pending-bits" in one["fail_reason"]
    assert list((Path(one["logdir"]) / "evidence").iterdir())
