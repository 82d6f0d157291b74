# SPDX-License-Identifier: GPL-2.0-or-later
"""Two verdicts side by side."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fixtures.evidence.diff import Difference, compare, slower
from fixtures.evidence.saved import Saved
from fixtures.evidence.verdict import FORMAT
from fixtures.report import main

SAME, BROKE, UNTOLD = 0, 1, 3


def case(result: str, behaviour: str = "holds", **more: Any) -> dict[str, Any]:
    return {
        "group": "takeover",
        "behaviour": behaviour,
        "point": "msix:8",
        "result": result,
        "phase": "call",
        "seconds": 1.0,
        "text": "" if result == "ok" else "why",
        "notes": {},
    } | more


def run(*cases: dict[str, Any], **facts: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "started": "",
        "seconds": 1.0,
        "facts": facts,
        "scenes": {},
        "incidents": [],
        "exit": 0,
        "cases": list(cases),
    }


def between(a: dict[str, Any], b: dict[str, Any]) -> Difference:
    return compare(Saved.of(a), Saved.of(b))


def said(difference: Difference) -> str:
    page = io.StringIO()
    difference.print(Console(file=page, width=100))
    return page.getvalue()


@pytest.mark.parametrize(
    ("a", "b", "kind", "code"),
    [
        ("ok", "FAIL", "broke", BROKE),
        ("ok", "crashed", "broke", BROKE),
        ("ok", "known", "broke", BROKE),
        ("known", "FAIL", "broke", BROKE),
        ("FAIL", "crashed", "broke", BROKE),
        ("FAIL", "ok", "fixed", SAME),
        ("crashed", "ok", "fixed", SAME),
        ("known", "ok", "fixed", SAME),
        ("ok", "error", "untold", UNTOLD),
        ("ok", "skip", "untold", UNTOLD),
        ("FAIL", "known", "changed", SAME),
        ("crashed", "FAIL", "changed", SAME),
        ("skip", "FAIL", "changed", SAME),
        ("error", "known", "changed", SAME),
        ("ok", "ok", None, SAME),
        ("FAIL", "FAIL", None, SAME),
        ("known", "known", None, SAME),
        ("skip", "ok", None, SAME),
        ("error", "skip", None, SAME),
    ],
)
def test_what_became_of_a_behaviour(a: str, b: str, kind: str | None, code: int) -> None:
    difference = between(run(case(a)), run(case(b)))
    kinds = ("broke", "fixed", "untold", "changed")
    assert [each for each in kinds if getattr(difference, each)] == ([kind] if kind else [])
    assert difference.exit_code == code
    assert (f"{a} -> {b}" in said(difference)) == bool(kind)


def test_another_known_issue_is_another_failure() -> None:
    a, b = (run(case("known", notes={"known": name})) for name in ("one", "other"))
    assert len(between(a, b).changed) == 1
    assert not between(a, a).changed


def test_what_broke_counts_more_than_what_could_not_be_told() -> None:
    a = run(case("ok"), case("ok", "other"))
    assert between(a, run(case("FAIL"), case("error", "other"))).exit_code == BROKE


def test_what_is_new_and_what_is_gone() -> None:
    a, b = run(case("ok"), case("FAIL", "old")), run(case("ok"), case("FAIL", "new"))
    difference = between(a, b)
    assert [each.behaviour for each in difference.new] == ["new"]
    assert [each.behaviour for each in difference.gone] == ["old"]
    assert difference.exit_code == SAME
    assert "new in B (1)\n  takeover: 1 FAIL at msix:8\n" in said(difference)


def test_a_takeover_that_fails_as_a_whole_is_told_once() -> None:
    names = [f"behaviour {n}" for n in range(9)]
    a = run(*(case("ok", name) for name in names))
    b = run(*(case("FAIL", name, phase="setup", text="it died") for name in names))
    text = said(between(a, b))
    assert "broke (9)\n  takeover [msix:8] behaviour 0 and 8 more: ok -> FAIL: it died\n" in text


def test_the_facts_that_differ_are_said() -> None:
    text = said(between(run(QEMU="10.2.2", host="lab"), run(QEMU="11.1.3", host="lab")))
    assert "QEMU                 10.2.2  ->  11.1.3" in text
    assert "lab" not in text


def test_a_text_that_looks_like_markup_is_told_as_it_is() -> None:
    a, b = run(case("ok", point="[red]x[/red]")), run(case("FAIL", point="[red]x[/red]"))
    assert "takeover [[red]x[/red]] holds" in said(between(a, b))


TEN = {f"module {n}": 3.0 for n in range(10)}


def test_what_takes_longer_than_all_the_rest_is_slower() -> None:
    found, pace = slower(TEN, {**TEN, "module 3": 9.0}, 1.0, "s")
    assert [(each.what, each.a, each.b) for each in found] == [("module 3", 3.0, 9.0)]
    assert pace == 1.0


def test_a_machine_that_is_slower_as_a_whole_makes_nothing_slower() -> None:
    found, pace = slower(TEN, dict.fromkeys(TEN, 7.5), 1.0, "s")
    assert (found, pace) == ([], 2.5)


def test_on_a_slower_machine_what_became_slower_still_shows() -> None:
    found, _ = slower(TEN, {**dict.fromkeys(TEN, 6.0), "module 3": 15.0}, 1.0, "s")
    assert [each.what for each in found] == ["module 3"]


def test_a_little_is_not_slower() -> None:
    short = dict.fromkeys(TEN, 0.1)
    assert slower(short, {**short, "module 3": 0.9}, 1.0, "s")[0] == []


def test_too_few_to_compare_are_not_slower() -> None:
    assert slower({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 90.0}, 1.0, "s") == ([], None)


def test_a_takeover_is_compared_with_all_its_behaviours() -> None:
    """The first of them pays for the takeover, and need not be the same one."""
    many = [case("ok", point=f"msix:{n}", seconds=2.0) for n in (1, 2, 8, 32, 64)]
    a = run(*many, case("ok", seconds=5.0, point="x"), case("ok", "other", seconds=0.1, point="x"))
    b = run(*many, case("ok", seconds=0.1, point="x"), case("ok", "other", seconds=5.0, point="x"))
    assert between(a, b).slower == []


def test_a_blackout_that_became_longer_is_slower() -> None:
    def told(guest_ms: float) -> list[dict[str, Any]]:
        ordinary = [
            case("ok", point=f"msix:{n}", notes={"blackout": {"guest_ms": 30.0, "qemu_ms": None}})
            for n in range(9)
        ]
        return [*ordinary, case("ok", point="x", notes={"blackout": {"guest_ms": guest_ms}})]

    found = between(run(*told(30.0)), run(*told(400.0))).slower
    assert [each.what for each in found] == ["blackout of takeover [x] (guest's)"]
    assert "30.0 -> 400.0 ms" in said(between(run(*told(30.0)), run(*told(400.0))))


def test_the_command_ends_with_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(run(case("ok"))))
    bad.write_text(json.dumps(run(case("FAIL"))))
    assert main(["diff", str(good), str(bad)]) == BROKE
    assert capsys.readouterr().out.splitlines()[-1] == "BROKE: of 1 cases in both: 1 broke"
    assert main(["diff", str(bad), str(good)]) == SAME
    assert main(["diff", str(good), str(good)]) == SAME
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "NOTHING BROKE: of 1 cases in both: the same"


def test_the_command_without_a_command_says_how_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fixtures.report"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "COMMAND" in done.stderr
