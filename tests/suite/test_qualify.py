# SPDX-License-Identifier: GPL-2.0-or-later
"""The catalogue of faults, and how one gets into a source tree and out again."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.qualify import QUICK, Fault, edited, load
from images.errors import BadInputError

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
