# SPDX-License-Identifier: GPL-2.0-or-later
"""Shares for several runners: together they are everything, none is tried twice, and what shares a
takeover is not divided."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from fixtures.shards import BEHAVIOUR_S, TAKEOVER_S, Records, Shard
from images.cache import Cache
from images.errors import BadInputError

ROOT = Path(__file__).parents[2]

#: Collects once, and prints of each share of each number of shares: what loads and groups it has,
#: and the tests.
SHARES = """
import json, sys
import pytest
from fixtures import plugin
from fixtures.shards import Records, Shard

class Shares:
    def pytest_collection_finish(self, session):
        def tell(items):
            return [(plugin._load_of(i), plugin._group_of(i), i.nodeid) for i in items]
        found = {0: [tell(session.items)]}
        for of in (1, 2, 3, 7):
            numbers = range(1, of + 1)
            shares = [plugin._share(session.items, Shard(n, of), Records()) for n in numbers]
            found[of] = [
                tell(i for i in session.items if plugin._load_of(i) in share) for share in shares
            ]
        json.dump(found, open(sys.argv[1], "w"))

sys.exit(pytest.main([*sys.argv[2:], "--collect-only", "-qq"], plugins=[Shares()]))
"""


@pytest.mark.parametrize(
    "text", ["", "1", "0/2", "3/2", "-1/2", "1/0", "a/b", "1/2/3", " 1/2", "\uff11/2"]
)
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(BadInputError, match="a shard is I/N with I from 1 to N"):
        Shard.parse(text)


def test_a_shard_is_a_number_of_a_number() -> None:
    assert Shard.parse("2/13") == Shard(2, 13)


def test_shares_take_about_the_same_time() -> None:
    loads = {f"load {n}": float(n) for n in range(1, 20)} | {"long": 60.0}
    times = [sum(loads[load] for load in Shard(n, 4).of_loads(loads)) for n in range(1, 5)]
    assert sum(times) == sum(loads.values())
    assert max(times) - min(times) <= 1.0


def test_a_share_does_not_depend_on_the_order_of_what_is_shared() -> None:
    loads = dict.fromkeys("abcdefg", 1.0) | {"h": 3.0}
    backwards = dict(reversed(loads.items()))
    for number in (1, 2, 3):
        assert Shard(number, 3).of_loads(loads) == Shard(number, 3).of_loads(backwards)


def test_more_runners_than_loads_have_nothing_to_do() -> None:
    assert [set(Shard(n, 3).of_loads({"a": 1.0, "b": 2.0})) for n in (1, 2, 3)] == [
        {"b"},
        {"a"},
        set(),
    ]


TAKEOVER = "tests/qemu/test_takeover.py::test_the_guest_keeps_running[msix:8]"
NEIGHBOUR = "tests/qemu/test_takeover.py::test_config_space_is_the_same[msix:8]"
ELSEWHERE = "tests/qemu/test_takeover.py::test_the_guest_keeps_running[msix:64]"


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Path]:
    """Writes a verdict with these seconds for `TAKEOVER`, as `fixtures.evidence.verdict` does."""

    def write(name: str, seconds: Any) -> Path:
        case = {
            "group": "takeover",
            "behaviour": "the guest keeps running",
            "point": "msix:8",
            "seconds": seconds,
        }
        path = tmp_path / name
        path.write_text(json.dumps({"cases": [case]}))
        return path

    return write


def test_without_records_a_takeover_counts_and_each_behaviour() -> None:
    records = Records.load([])
    assert records.estimate([]) == 0
    assert records.estimate([TAKEOVER, NEIGHBOUR]) == TAKEOVER_S + 2 * BEHAVIOUR_S
    assert records.estimate([TAKEOVER, ELSEWHERE]) == 2 * TAKEOVER_S + 2 * BEHAVIOUR_S


def test_what_is_recorded_counts_with_its_takeover(record: Callable[..., Path]) -> None:
    records = Records.load([record("verdict.json", 7.5)])
    assert records.estimate([TAKEOVER]) == 7.5
    assert records.estimate([NEIGHBOUR, TAKEOVER]) == 7.5 + BEHAVIOUR_S
    assert records.estimate([ELSEWHERE]) == TAKEOVER_S + BEHAVIOUR_S


def test_of_several_records_the_middle_counts(record: Callable[..., Path], tmp_path: Path) -> None:
    paths = [record("a.json", 1), record("b.json", 99), record("c.json", 5)]
    assert Records.load(paths).estimate([TAKEOVER]) == 5
    assert Records.load([tmp_path]) == Records.load(reversed(paths))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cases": [1]}', '{"cases": [{}]}', "\0"])
def test_what_is_no_verdict_is_refused(tmp_path: Path, content: str) -> None:
    (path := tmp_path / "other.json").write_text(content)
    with pytest.raises(BadInputError, match=r"other\.json: not a verdict"):
        Records.load([path])


@pytest.mark.parametrize("profile", ["smoke", "main", "quick"])
def test_all_shares_are_everything_once(cache: Cache, tmp_path: Path, profile: str) -> None:
    """Not of the profile full, whose 360,000 cases take minutes to collect."""
    found = tmp_path / "shares.json"
    subprocess.run(
        [
            *(sys.executable, "-c", SHARES, str(found), "tests/qemu", "--profile", profile),
            *("--cache", str(cache.root)),
        ],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    shares = json.loads(found.read_text())
    (everything,) = shares.pop("0")
    for several in shares.values():
        assert sorted(test for share in several for test in share) == sorted(everything)
        for one, other in combinations(several, 2):
            for column in (0, 1):  # loads, groups
                assert not {t[column] for t in one} & {t[column] for t in other}


def test_runners_make_out_their_shares_by_themselves(
    cache: Cache, tmp_path: Path, record: Callable[..., Path]
) -> None:
    record("last.json", 40)

    def listing(*arguments: str) -> list[str]:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "fixtures.verify", "--list-groups"),
                *("--cache", str(cache.root), *arguments),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    take = ("--group", "tests/qemu/test_takeover.py", "--group", "tests/qemu/test_pending.py")
    recorded = ("--durations-from", str(tmp_path))
    shares = [listing(*take, "--shard", f"{n}/2", *recorded) for n in (1, 2)]
    assert sorted(shares[0] + shares[1]) == sorted(listing(*take))
    # What took 40 s the last time is as much as all the rest.
    assert shares[0] == [line for line in shares[0] if "test_takeover.py[msix:8] " in line] != []
