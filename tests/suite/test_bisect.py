# SPDX-License-Identifier: GPL-2.0-or-later
"""The command for ``git bisect run``: what it tells git of a commit, on trees that are no QEMU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import verify
from fixtures.bisect import main

ROOT = Path(__file__).parents[2]

#: The commits of a tree, the first of them good and the last bad.
COMMITS = 16
BAD_SINCE, BROKEN = 11, (4, 5)
#: ``ci/bisect``, where a "binary" says itself what its verdict is.
COMMAND = """\
import sys
from pathlib import Path
from fixtures import bisect, verify

verify.main = lambda argv: int(Path(argv[argv.index("--qemu") + 1]).read_text())
sys.exit(bisect.main(sys.argv[1:]))
"""


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "nobody")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "nobody@localhost")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")

    def call(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(tmp_path / "tree"), *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    return call


@pytest.fixture
def tree(tmp_path: Path, git: Callable[..., str]) -> Path:
    """A tree of some commits, each of which says what its verdict is, or does not build."""
    tree = tmp_path / "tree"
    (tree / "hw/vfio").mkdir(parents=True)
    git("init", "-q", ".")
    for number in range(COMMITS):
        (tree / "hw/vfio/verdict").write_text(f"{int(number >= BAD_SINCE)}\n")
        (tree / "hw/vfio/build").write_text(
            f"false # {number}\n" if number in BROKEN else f"cp hw/vfio/verdict qemu # {number}\n"
        )
        git("add", "hw")
        git("commit", "-q", "-m", f"commit {number}")
    return tree


@pytest.fixture
def arguments(tree: Path, tmp_path: Path) -> list[str]:
    return [
        *("--tree", str(tree), "--build", "sh hw/vfio/build", "--binary", "qemu"),
        *("--cache", str(tmp_path / "cache")),
    ]


@pytest.mark.parametrize(
    ("verdict", "told"), [(0, 0), (1, 1), (2, 125), (3, 125), (130, 130), (4, 125)]
)
def test_git_is_told_what_the_verdict_means_to_it(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, verdict: int, told: int
) -> None:
    monkeypatch.setattr(verify, "main", lambda _argv: verdict)
    assert main(arguments) == told


def test_the_binary_and_what_is_not_ours_go_to_the_verdict(
    tree: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(verify, "main", lambda argv: seen.extend(argv) or 0)
    assert main([*arguments, "--point", "msix:8", "-k", "takeover"]) == 0
    assert seen[:2] == ["--qemu", str(tree / "qemu")]
    assert " ".join(seen).count("--point msix:8 -k takeover --cache") == 1


@pytest.mark.parametrize(
    ("more", "workers"),
    [
        (["--point", "msix:8", "-k", "takeover"], "0"),
        (["--point", "msix:8", "-k", "takeover", "-n", "2"], "2"),
        (["--point", "msix:8"], None),
        (["--point", "msix:8", "--point", "msi:8", "-ktakeover"], None),
        (["-k", "takeover"], None),
    ],
)
def test_what_is_little_is_tried_in_one_lab_host(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    workers: str | None,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(verify, "main", lambda argv: seen.extend(argv) or 0)
    assert main([*arguments, *more]) == 0
    assert verify.parser().parse_known_args(seen)[0].workers == workers


def test_a_commit_that_does_not_build_cannot_be_told(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[3] = "echo 'error: no such header' >&2; false"
    assert main(arguments) == 125
    assert "error: no such header" in capsys.readouterr().err


def test_a_build_that_leaves_no_binary_cannot_be_told(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[3] = "true"
    assert main(arguments) == 125
    assert "there is no " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tree", "/"], "is in no git tree"),
        (["--tree", str(ROOT)], "is not a QEMU tree"),
        (["--point", "msix:3"], "no axis has the value 'msix:3'"),
        (["--profile", "none"], "invalid choice: 'none'"),
        (["--no-such-option"], "--no-such-option"),
        (["--tree"], "expected one argument"),
    ],
)
def test_what_is_wrong_for_every_commit_ends_the_bisection(
    arguments: list[str], capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert main([*arguments, *more]) == 128
    assert says in capsys.readouterr().err


def test_git_finds_the_commit(arguments: list[str], git: Callable[..., str]) -> None:
    git("bisect", "start", "HEAD", f"HEAD~{COMMITS - 1}")
    said = git("bisect", "run", sys.executable, "-c", COMMAND, *arguments)
    assert f"commit {BAD_SINCE}\n" in said.partition("is the first bad commit")[2]
    told = [line for line in said.splitlines() if line.startswith("ci/bisect: ")]
    assert 3 <= len(told) <= 6
    assert "some 3 steps to go, about " in told[0]
    assert "some 0 steps to go" in told[-1]
