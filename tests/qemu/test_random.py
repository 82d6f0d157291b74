# SPDX-License-Identifier: GPL-2.0-or-later
"""Steps come in random sequences, on functions of any kind; what fails is shrunk to a script."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import strategies as st

from fixtures.bench import ACKNOWLEDGE, LabBench
from fixtures.coverage import SOUND, Coverage
from fixtures.direct import DirectBench
from fixtures.endpoints.vfio_user import Bar, Description, Msi, Msix
from fixtures.matrix import Point
from fixtures.oracle.model import InterruptModel, IntxModel, MsiModel, MsixModel
from fixtures.rig import intx, msi, msix
from fixtures.sequences import sequences, takes_gaps
from fixtures.statemachine import Plan, Scene, Setting, play, source

pytestmark = pytest.mark.random

POINTS = Coverage(
    irq=("msix:8", "msix:33", "msi:8", "intx"),
    container=("type1",),
    **SOUND,
    iommu=("intel-iommu",),
    reset=("bus",),
    irqchip=("full",),
    apic=("xapic",),
    bars=("mmap",),
    endpoint=("vfio-user",),
)

DIRECT = """\
from fixtures.endpoints.vfio_user import Bar, Description, Msi, Msix
from fixtures.oracle.model import InterruptModel, IntxModel, MsiModel, MsixModel
from fixtures.rig import intx, msi, msix


def test_a_sequence_found_by_chance(request, direct_bench) -> None:"""


def direct(description: Description, kind: str, model: InterruptModel, vectors: int) -> Setting:
    # Known issue vfio-user-shows-no-pending-bits.
    made = f"{source(description)}, request.addfinalizer, {kind}, pba=False"
    return Setting(f"rig = direct_bench.rig({made})", partial(copy.deepcopy, model), vectors, False)


@st.composite
def an_msix_function(draw: st.DrawFn) -> Setting:
    size = draw(st.sampled_from((1, 2, 31, 32, 33, 64)) | st.integers(1, 64))
    table_bar, pba_bar = draw(st.sampled_from((1, 0, 2, 4))), draw(st.sampled_from((1, 0, 2, 4)))
    table = 8 * draw(st.integers(2, 0x400))
    pba = 8 * draw(st.integers(0x1000, 0x1FFF))
    bars = tuple(
        Bar(n, 0x10000, wide=n != 1 and n + 1 not in (table_bar, pba_bar) and draw(st.booleans()))
        for n in sorted({0, table_bar, pba_bar})
    )
    description = Description(bars, Msix(size, table_bar, table, pba_bar, pba))
    return direct(description, "msix", MsixModel(size), size)


@st.composite
def an_msi_function(draw: st.DrawFn) -> Setting:
    order = draw(st.integers(0, 5))
    function = Msi(1 << order, wide=draw(st.booleans()), maskable=draw(st.booleans()))
    granted = 1 << draw(st.integers(0, order))
    model = MsiModel(function.count, granted=granted, maskable=function.maskable)
    return direct(Description(msix=None, msi=function), f"msi({granted})", model, granted)


@st.composite
def an_intx_function(draw: st.DrawFn) -> Setting:
    description = Description(msix=None, intx=draw(st.integers(1, 4)), acknowledge=ACKNOWLEDGE)
    bar, offset = ACKNOWLEDGE
    return direct(description, f"intx({bar}, {offset:#x}, 1)", IntxModel(), 1)


FUNCTIONS = {"msix": an_msix_function(), "msi": an_msi_function(), "intx": an_intx_function()}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_any_sequence_of_steps_is_as_the_specification_says(
    kind: str,
    request: pytest.FixtureRequest,
    direct_bench: DirectBench,
    plan: Plan,
    keep_script: Callable[[str], None],
) -> None:
    known = (Bar, Description, Msi, Msix, intx, msi, msix)
    names = {each.__name__: each for each in known} | {"direct_bench": direct_bench}
    scene = Scene(FUNCTIONS[kind], names, DIRECT, cpr=False, gaps=takes_gaps(direct_bench))
    play(scene, plan, request.addfinalizer, keep_script)


def test_any_sequence_of_steps_with_cpr_is_as_the_specification_says(
    request: pytest.FixtureRequest,
    bench: LabBench,
    point: Point,
    plan: Plan,
    keep_script: Callable[[str], None],
) -> None:
    play(sequences(bench, point), plan, request.addfinalizer, keep_script)
