# SPDX-License-Identifier: GPL-2.0-or-later
"""The matrix: no point that cannot be, every pair that can, and names that lead back."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fixtures.matrix import AXES, RULES, Point, count, covering, listing, product
from images.errors import BadInputError

NAMES = [axis.name for axis in AXES]
Values = tuple[str, ...]
Pair = frozenset[tuple[str, str]]


def can_be(point: Mapping[str, str]) -> bool:
    """The rules once more, in other words."""
    interrupts, _, vectors = point["irq"].partition(":")
    if point["accel"] == "tcg" and (point["path"], point["irqchip"]) != ("qemu", "full"):
        return False
    if point["endpoint"] == "ivshmem" and (interrupts, point["reset"]) != ("msix", "bus"):
        return False
    if (point["irq"], point["path"], point["bars"]) == ("intx", "qemu", "mmap"):
        return False
    if (point["iommu"], point["container"], point["endpoint"]) == (
        "amd-iommu",
        "iommufd",
        "vfio-user",
    ):
        return False
    return not (point["iommu"] == "virtio-iommu" and interrupts == "msi" and vectors != "1")


def fails(point: Values) -> bool:
    """A known issue breaks it."""
    values = dict(zip(NAMES, point, strict=True))
    return values["mode"] != "cpr-reboot" and (
        (values["container"], values["bars"]) == ("iommufd", "mmap")
        or values["accel"] == "tcg"
        or (values["path"] == "qemu" and values["irq"] != "intx")
        or values["reset"] == "pm"
    )


#: Every point that can be, in order.
ALL: list[Values] = [
    values
    for values in itertools.product(*(axis.values for axis in AXES))
    if can_be(dict(zip(NAMES, values, strict=True)))
]


def values_of(point: Point) -> Values:
    return tuple(getattr(point, name) for name in NAMES)


def within(restrict: Mapping[str, Collection[str]]) -> list[Values]:
    limits = [restrict.get(axis.name, axis.values) for axis in AXES]
    return [
        point
        for point in ALL
        if all(value in limit for value, limit in zip(point, limits, strict=True))
    ]


def met(points: Iterable[Values]) -> set[Pair]:
    """Every two values that meet in a point, the kind of its interrupts apart from their number."""
    pairs = set()
    for point in points:
        values = dict(zip(NAMES, point, strict=True))
        kind, _, number = values.pop("irq").partition(":")
        values |= {"kind": kind, "number": number or "1"}
        pairs |= set(map(frozenset, itertools.combinations(values.items(), 2)))
    return pairs


#: Some values of some axes.
RESTRICTIONS = st.fixed_dictionaries(
    {},
    optional={
        axis.name: st.lists(st.sampled_from(list(axis.values)), min_size=1, unique=True)
        for axis in AXES
    },
)


# Points


def test_the_points_are_those_that_can_be() -> None:
    assert [values_of(point) for point in product()] == ALL
    assert count() == len(ALL)


def test_points_are_in_the_order_of_the_axes_and_their_values() -> None:
    points = list(product(irq=("msix:2", "msix:150", "msi:1"), container=("type1", "iommufd")))
    assert sorted(set(points)) == points
    assert Point(irq="msix:2") < Point(irq="msix:150") < Point(container="iommufd", irq="msix:1")


def test_equal_points_are_one_key() -> None:
    assert len({Point(), Point(), Point(irq="msix:2")}) == 2


def test_no_other_point_can_be_made() -> None:
    possible = set(ALL)
    made = 0
    for values in itertools.product(*(axis.values for axis in AXES)):
        try:
            Point(*values)
        except BadInputError:
            assert values not in possible
        else:
            made += 1
    assert made == len(possible)


def test_each_rule_forbids_something_that_no_other_does() -> None:
    combinations = [
        dict(zip(NAMES, values, strict=True))
        for values in itertools.product(*(axis.values for axis in AXES))
    ]
    for rule in RULES:
        others = [other for other in RULES if other is not rule]
        assert any(
            not rule.allows(point) and all(other.allows(point) for other in others)
            for point in combinations
        )


# Names


def test_the_name_of_a_point_leads_back_to_it() -> None:
    names = {str(point): point for point in product()}
    assert len(names) == count()
    # Each seventh: a number that no axis has, so that each value comes with each.
    for name, point in itertools.islice(names.items(), 0, None, 7):
        assert Point.parse(name) == point


def test_a_point_is_found_by_all_its_values() -> None:
    for point in itertools.islice(product(irqchip=("split",)), 0, None, 7):
        assert Point.parse(",".join(f"{n}={getattr(point, n)}" for n in NAMES)) == point


@pytest.mark.parametrize(
    ("point", "name"),
    [
        (Point(), "msix:8"),
        (Point(irq="msix:64", container="iommufd"), "msix:64+iommufd"),
        (
            Point(irq="msi:32", path="qemu", accel="tcg", reset="flr", endpoint="vfio-user"),
            "msi:32+qemu+tcg+flr+vfio-user",
        ),
    ],
)
def test_a_name_tells_the_interrupts_and_what_is_unusual(point: Point, name: str) -> None:
    assert str(point) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("irq=msix:1", "msix:1"),
        ("container=iommufd,irq=msi:32,path=qemu", "msi:32+iommufd+qemu+vfio-user"),
        ("accel=tcg", "msix:8+qemu+tcg"),
        ("reset=flr", "msix:8+flr+vfio-user"),
        ("intx,tcg", "intx+qemu+tcg+trap+vfio-user"),
        ("smp+iommu=amd-iommu", "msix:8+amd-iommu+smp"),
        ("irq=intx,intx", "intx+vfio-user"),
    ],
)
def test_what_is_not_named_is_as_usual_or_as_it_must_be(text: str, name: str) -> None:
    assert str(Point.parse(text)) == name


def test_what_is_not_named_is_as_usual_wherever_it_can_be() -> None:
    usual = tuple(axis.default for axis in AXES)
    fewest: dict[tuple[tuple[str, str], ...], int] = {}
    for point in ALL:
        unusual = sum(a != b for a, b in zip(point, usual, strict=True))
        for pair in itertools.combinations(zip(NAMES, point, strict=True), 2):
            fewest[pair] = min(unusual, fewest.get(pair, unusual))
    for pair, unusual in fewest.items():
        found = values_of(Point.parse(",".join(f"{name}={value}" for name, value in pair)))
        assert set(pair) <= set(zip(NAMES, found, strict=True))
        assert sum(a != b for a, b in zip(found, usual, strict=True)) == unusual


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (
            "endpoint=ivshmem,irq=msi:32",
            "endpoint=ivshmem rules out irq=msi:32: an ivshmem-doorbell has MSI-X alone",
        ),
        (
            "flr,ivshmem",
            "endpoint=ivshmem rules out reset=flr: an ivshmem-doorbell has no reset of its own",
        ),
        (
            "path=kvm,accel=tcg",
            "accel=tcg rules out path=kvm: without KVM, QEMU delivers every interrupt",
        ),
        (
            "accel=tcg,irqchip=split",
            "accel=tcg rules out irqchip=split: without KVM, QEMU has the whole of it",
        ),
        (
            "irq=msi:2,iommu=virtio-iommu",
            "iommu=virtio-iommu rules out irq=msi:2: "
            "without interrupt remapping, Linux gives a function one MSI vector",
        ),
        ("iommu=none", "iommu has no value 'none': there are intel-iommu, amd-iommu, virtio-iommu"),
        (
            "guest=linux",
            "no axis 'guest': there are "
            "mode, container, irq, path, accel, iommu, reset, irqchip, apic, bars, endpoint",
        ),
        (
            "msi:3",
            "no axis has the value 'msi:3': the axes are "
            "mode, container, irq, path, accel, iommu, reset, irqchip, apic, bars, endpoint",
        ),
        ("kvm", "which kvm is meant: path=kvm or accel=kvm?"),
        ("irq=intx,irq=msi:1", "irq is both intx and msi:1"),
    ],
)
def test_a_text_that_names_no_point_is_refused(text: str, refusal: str) -> None:
    with pytest.raises(BadInputError) as caught:
        Point.parse(text)
    assert str(caught.value) == refusal


# Pairs


def test_any_two_values_that_can_meet_do_meet() -> None:
    sound = [values_of(point) for point in covering() if not fails(values_of(point))]
    assert met(sound) == met(point for point in ALL if not fails(point))
    assert {point.irq for point in covering()} == {point.irq for point in product()}


def test_what_is_known_to_fail_is_one_point_each_near_the_usual() -> None:
    assert [str(point) for point in covering() if fails(values_of(point))] == [
        "msix:8+iommufd",
        "msix:8+qemu+tcg",
        "msix:8+qemu",
        "msix:8+pm+vfio-user",
    ]
    assert all(point.is_apart == fails(values_of(point)) for point in product())


def test_there_are_hardly_more_points_than_the_two_longest_axes_need() -> None:
    numbers = {point.vectors for point in product()}
    longest = sorted(len(axis.values) for axis in AXES if axis.name != "irq")[-1]
    assert len(covering()) - 4 <= 1.2 * len(numbers) * longest


# To shrink what fails would take minutes.
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(RESTRICTIONS, st.data())
def test_so_they_do_within_any_restriction_that_leaves_a_point(
    restrict: Mapping[str, Collection[str]], data: st.DataObject
) -> None:
    left = within(restrict)
    if not left:
        with pytest.raises(BadInputError, match=r" rules out "):
            covering(**restrict)
        return
    seeds = [Point(*p) for p in data.draw(st.lists(st.sampled_from(left), max_size=3, unique=True))]
    points = covering(seeds=seeds, **restrict)
    assert list(points[: len(seeds)]) == seeds
    assert len(set(points)) == len(points)
    assert set(map(values_of, points)) <= set(left)
    sound = [point for point in left if not fails(point)]
    assert met(sound) <= met(map(values_of, points)) <= met(left)
    assert any(map(fails, left)) == any(fails(values_of(point)) for point in points)


def test_one_value_of_each_axis_leaves_one_point() -> None:
    point = Point.parse("msi:1+pm+x2apic")
    only = {name: (getattr(point, name),) for name in NAMES}
    assert list(product(**only)) == [point]
    assert covering(**only) == covering(seeds=[point, point], **only) == (point,)


def test_seeds_come_first_and_once() -> None:
    seeds = [Point.parse("intx+qemu"), Point(), Point()]
    assert covering(seeds=seeds)[:3].count(Point()) == 1
    assert covering(seeds=seeds)[:2] == (seeds[0], Point())


def test_a_seed_outside_of_the_restriction_is_refused() -> None:
    with pytest.raises(BadInputError) as caught:
        covering(seeds=[Point()], irq=("msix:64", "msix:1"))
    assert str(caught.value) == "msix:8 is not within irq=msix:1|msix:64"


@pytest.mark.parametrize(
    ("restrict", "refusal"),
    [
        ({"irq": ()}, "irq is limited to no value at all"),
        (
            {"irq": ("intx", "msi:1"), "endpoint": ("ivshmem",)},
            "endpoint=ivshmem rules out irq=msi:1|intx: an ivshmem-doorbell has MSI-X alone",
        ),
        (
            {"apic": ("smp", "msi")},
            "apic has no value 'msi': there are xapic, x2apic, logical, smp",
        ),
        (
            {"guest": ("linux",)},
            "no axis 'guest': there are "
            "mode, container, irq, path, accel, iommu, reset, irqchip, apic, bars, endpoint",
        ),
    ],
)
def test_a_restriction_that_leaves_no_point_is_refused_at_once(
    restrict: dict[str, Collection[str]], refusal: str
) -> None:
    for refuse in (covering, product, count):
        with pytest.raises(BadInputError) as caught:
            refuse(**restrict)
        assert str(caught.value) == refusal


def test_pairs_are_the_same_in_any_process(pytestconfig: pytest.Config) -> None:
    script = "from fixtures.matrix import covering; print(*covering())"
    outputs = [
        subprocess.run(
            [sys.executable, "-B", "-c", script],
            cwd=pytestconfig.rootpath,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1")
    ]
    assert outputs == [" ".join(map(str, covering())) + "\n"] * 2


def test_with_a_strength_of_one_each_value_is_in_some_point() -> None:
    points = covering(strength=1)
    assert len(points) < len(covering()) / 2
    for axis in AXES:
        assert {getattr(point, axis.name) for point in points} == set(axis.values)


def test_pairs_are_computed_once() -> None:
    assert covering(irq=("msi:1", "msix:1")) is covering(irq=["msix:1", "msi:1"])


# The text of --list-axes


def test_the_list_has_every_value_with_its_meaning_then_the_rules() -> None:
    lines = iter(listing().splitlines())
    for axis in AXES:
        assert next(lines) == f"{axis.name} (default {axis.default})"
        for value, meaning in axis.values.items():
            assert next(lines).split(maxsplit=1) == [value, meaning]
    assert next(lines) == "rules"
    rules = [line.strip() for line in lines]
    assert len(rules) == len(RULES)
    assert rules[0] == "accel=tcg rules out path=kvm: without KVM, QEMU delivers every interrupt"
