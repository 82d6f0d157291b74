# SPDX-License-Identifier: GPL-2.0-or-later
"""Which points a module is tried on, by profile and by name; and what a lab host needs for them."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.bench import LabBench, equipment
from fixtures.coverage import MESSAGES, MOVABLE, MSI, MSIX, Coverage
from fixtures.matrix import Point
from fixtures.several import ARRANGEMENTS
from images.errors import BadInputError

ROOT = Path(__file__).parents[2]
COVERAGE = Coverage("msix:1", "msix:64", irq=("msix:1", "msix:64"), apic=("xapic",))


def names(coverage: Coverage, profile: str, *named: str) -> list[str]:
    return [str(p) for p in coverage.points(profile, [Point.parse(text) for text in named])]


def test_the_main_profile_has_what_the_module_says() -> None:
    assert names(COVERAGE, "main") == ["msix:1", "msix:64"]


def test_the_quick_profile_begins_with_them_and_has_each_value_within_the_limits() -> None:
    points = COVERAGE.points("quick")
    assert [str(point) for point in points[:2]] == ["msix:1", "msix:64"]
    assert {point.iommu for point in points} == {"intel-iommu", "amd-iommu", "virtio-iommu"}
    assert {point.container for point in points} == {"type1", "iommufd"}
    assert {point.apic for point in points} == {"xapic"}
    assert len(points) <= 4


def test_the_quick_profile_has_pairs_where_that_is_wanted() -> None:
    coverage = Coverage("msix:1", "msix:64", irq=("msix:1", "msix:64"), apic=("xapic",), strength=2)
    points = coverage.points("quick")
    assert [str(point) for point in points[:2]] == ["msix:1", "msix:64"]
    assert {(p.irq, p.iommu) for p in points} == {
        (irq, iommu)
        for irq in ("msix:1", "msix:64")
        for iommu in ("intel-iommu", "amd-iommu", "virtio-iommu")
    }
    assert {point.apic for point in points} == {"xapic"}


def test_the_quick_profile_also_has_what_a_module_wants_in_any_case() -> None:
    coverage = Coverage("msix:1", also=("msix:64+amd-iommu",), irq=("msix:1", "msix:64"))
    assert names(coverage, "main") == ["msix:1"]
    assert names(coverage, "quick")[:2] == ["msix:1", "msix:64+amd-iommu"]


def test_the_full_profile_has_every_point_within_the_limits() -> None:
    points = COVERAGE.points("full")
    assert set(COVERAGE.points("quick")) < set(points)
    assert len(set(points)) == len(points)


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_what_a_known_issue_breaks_is_only_where_it_is_wanted(profile: str) -> None:
    assert not any(point.is_apart for point in COVERAGE.points(profile))
    assert any(point.is_apart for point in Coverage(irq=("msix:8",), apart=True).points(profile))


def test_named_points_are_tried_wherever_they_are_within_the_limits() -> None:
    assert names(COVERAGE, "main", "msix:64+amd-iommu", "msix:8", "msix:1+smp") == [
        "msix:64+amd-iommu"
    ]


def test_a_main_point_that_cannot_be_is_refused() -> None:
    with pytest.raises(BadInputError, match="rules out"):
        Coverage("msi:8+ivshmem")


def test_the_kinds_of_interrupts_are_told_apart() -> None:
    assert set(MSIX) | set(MSI) == set(MESSAGES)
    assert set(MSIX).isdisjoint(MSI)
    assert "intx" in MOVABLE
    assert "intx" not in MESSAGES


def test_points_that_differ_in_the_device_need_different_equipment() -> None:
    points = [
        Point.parse(t) for t in ("msix:8", "msix:64", "msi:8", "msi:8+flr", "msix:8+vfio-user")
    ]
    assert len({equipment(point) for point in points}) == len(points)
    assert equipment(Point()) == equipment(Point.parse("iommufd+smp+trap"))


def collected(*options: str) -> list[tuple[str, str, str]]:
    """Module, name and point of the tests that a run would have, in its order."""
    argv = [sys.executable, "-m", "pytest", "tests/qemu", *options]
    listing = subprocess.run(
        [*argv, "--collect-only", "-q", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout
    return re.findall(r"^tests/qemu/(\w+)\.py::(\w+)\[(.*)\]$", listing, re.M)


def test_at_named_points_nothing_else_is_tried() -> None:
    ids = collected("--point", "msix:8", "--point", "msi:8+smp")
    assert ids
    named, several = ("msix:8", "msi:8+smp+vfio-user"), tuple(ARRANGEMENTS)
    assert all(point.endswith((*named, *several)) for _, _, point in ids)


def test_what_shares_a_takeover_is_tried_together_and_what_shares_a_lab_host_too() -> None:
    """Else a takeover is set up once more for each of its tests that stands alone."""
    ids = collected("--profile", "quick")
    takeovers = [(module, point) for module, _, point in ids if module == "test_takeover"]
    assert len(set(takeovers)) > 30
    assert len(list(groupby(takeovers))) == len(set(takeovers))
    iommus = [Point.parse(point).iommu for _, point in takeovers]
    assert [iommu for iommu, _ in groupby(iommus)] == ["amd-iommu", "virtio-iommu", "intel-iommu"]
    # In the order of the module: what comes last disturbs what comes before it.
    ends = [
        (names[0], names[-1])
        for (module, _), tests in groupby(ids, key=lambda each: each[::2])
        if module == "test_takeover" and (names := [name for _, name, _ in tests])
    ]
    assert len(ends) == len(set(takeovers))
    assert set(ends) == {
        (
            "test_each_vector_was_delivered_exactly_once_before_cpr",
            "test_they_can_be_disabled_and_enabled_again_after_cpr",
        )
    }


def test_a_qemu_without_a_mode_lacks_the_points_of_that_mode() -> None:
    subject: Any = SimpleNamespace(capabilities=SimpleNamespace(modes=("normal", "cpr-transfer")))
    bench = LabBench(subject)
    assert bench.lacks(Point()) is None
    assert bench.lacks(Point(mode="cpr-exec")) == "this QEMU has no cpr-exec"
