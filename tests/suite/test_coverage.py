# SPDX-License-Identifier: GPL-2.0-or-later
"""Which points a module is tried on, by profile and by name; and what a lab host needs for them."""

from __future__ import annotations

import pytest

from fixtures.bench import equipment
from fixtures.coverage import MESSAGES, MOVABLE, MSI, MSIX, Coverage
from fixtures.matrix import Point
from images.errors import BadInputError

COVERAGE = Coverage("msix:1", "msix:64", irq=("msix:1", "msix:64"), apic=("xapic",))


def names(coverage: Coverage, profile: str, *named: str) -> list[str]:
    return [str(p) for p in coverage.points(profile, [Point.parse(text) for text in named])]


def test_the_main_profile_has_what_the_module_says() -> None:
    assert names(COVERAGE, "main") == ["msix:1", "msix:64"]


def test_the_quick_profile_begins_with_them_and_has_pairs_within_the_limits() -> None:
    points = COVERAGE.points("quick")
    assert [str(point) for point in points[:2]] == ["msix:1", "msix:64"]
    assert {(p.irq, p.iommu) for p in points} == {
        (irq, iommu)
        for irq in ("msix:1", "msix:64")
        for iommu in ("intel-iommu", "amd-iommu", "virtio-iommu")
    }
    assert {point.apic for point in points} == {"xapic"}


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
