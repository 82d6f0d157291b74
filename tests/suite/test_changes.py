# SPDX-License-Identifier: GPL-2.0-or-later
"""What a change of QEMU can break first is known from the faults of the catalogue."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.changes import Concern, changed_in
from fixtures.matrix import Point
from fixtures.qualify import load
from images.cache import Cache
from images.errors import BadInputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def chosen(cache: Cache) -> Callable[..., set[str]]:
    """The modules and points that ``--changed`` chooses."""

    def choose(*files: str) -> set[str]:
        words = [word for file in files for word in ("--changed", file)]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "tests/qemu", "--collect-only", "-q"),
                *("--cache", str(cache.root), *words),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        cases = re.findall(r"tests/qemu/test_(\w+)\.py::\w+(?:\[(.*)\])?", done.stdout)
        return {" ".join(case).strip() for case in cases}

    return choose


def test_the_catalogue_names_tests_by_words_alone() -> None:
    """As `Concern.has` has it."""
    faults = Concern.of({fault.file for fault in load()}).faults
    assert len(faults) > 100
    for fault in faults:
        assert not re.search(r"\b(or|not)\b|[()]", fault.tests), fault.id


@pytest.mark.parametrize("path", ["hw/pci/msi.c", "/home/me/qemu/hw/pci/msi.c"])
def test_a_change_is_tried_where_the_faults_of_its_file_are_seen(
    chosen: Callable[..., set[str]], path: str
) -> None:
    assert chosen(path) == {f"takeover msi:{vectors}+vfio-user" for vectors in (2, 8, 32)}


def test_it_is_tried_on_the_main_path_where_that_sees_them(
    chosen: Callable[..., set[str]],
) -> None:
    cases = chosen("hw/vfio/cpr.c")
    assert {"takeover msix:64", "takeover intx+vfio-user", "pending msix:8"} <= cases
    assert "pending intx+vfio-user" not in cases


def test_what_takes_several_functions_is_tried_where_the_first_is_at_the_fault_s_point(
    chosen: Callable[..., set[str]],
) -> None:
    several = {case for case in chosen("hw/vfio/iommufd.c") if case.startswith("several ")}
    assert "several msix:8+iommufd+trap+twins" in several
    assert all("several msix:8+iommufd+trap+" in case for case in several)


def test_what_is_mended_by_a_change_is_not_what_it_can_break() -> None:
    mended = {fault.file for fault in load() if fault.mends}
    assert not any(fault.mends for fault in Concern.of(mended).faults)


def test_more_files_mean_all_of_theirs(chosen: Callable[..., set[str]]) -> None:
    both = chosen("hw/pci/msi.c", "migration/cpr-exec.c")
    assert both == chosen("hw/pci/msi.c") | chosen("migration/cpr-exec.c")


def test_a_file_without_faults_is_told() -> None:
    concern = Concern.of(["hw/vfio/cpr.c", "hw/net/igb.c", "cpr.c"])
    assert concern.unknown == ["hw/net/igb.c", "cpr.c"]
    assert {fault.file for fault in concern.faults} == {"hw/vfio/cpr.c"}
    assert Point.parse("intx") in concern.points


def test_git_names_what_is_not_committed_or_was_committed_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "nobody")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "nobody@localhost")
    (tmp_path / "hw").mkdir()

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init")
    for name in ("first", "hw/second"):
        (tmp_path / name).touch()
        git("add", name)
        git("commit", "-m", name)
    assert changed_in(tmp_path / "hw") == ["hw/second"]
    (tmp_path / "first").write_text("changed")
    assert changed_in(tmp_path) == ["first"]


def test_a_place_without_git_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="Not a git repository"):
        changed_in(tmp_path)
