# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences are such as a driver may do, and a failure is shrunk to a script that fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.endpoints.vfio_user import Bar, Description, Msi, Msix, ResetBy
from fixtures.oracle.model import InterruptModel, IntxModel, MsiModel, MsixModel
from fixtures.oracle.observation import Mismatch
from fixtures.statemachine import MOST_CPRS, Plan, Scene, Setting, play, source
from images.errors import EnvironmentFault

HEADING = "def test_a_sequence_found_by_chance(request, bench) -> None:"


class FakeRig:
    """A rig that is a model beside a model; ``faults`` of the other one show.

    It knows what a driver may do.
    """

    shows_pending = True

    def __init__(self, make: Callable[[], InterruptModel], faults: Faults) -> None:
        self.model, self.other = make(), make()
        self.faults = faults
        self.vectors = range(self.model.size)
        self.function = SimpleNamespace(can_mask=True)
        self.verbs: list[str] = []
        self.closed = self.had_gaps = False
        self._used: set[int] = set()

    def enable(self) -> None:
        self._guest("enable")
        masked = [n in self.model.masked for n in self.vectors]
        self.had_gaps |= masked != sorted(masked)
        for model in (self.model, self.other):
            model.set_control(enable=True)

    def disable(self) -> None:
        self._guest("disable")
        assert not self.model.pending
        for model in (self.model, self.other):
            model.set_control(enable=False)
        self._used.clear()

    def function_mask(self, masked: bool) -> None:
        self._guest("function_mask")
        assert self.model.enabled
        for model in (self.model, self.other):
            assert isinstance(model, MsixModel)
            model.set_control(enable=True, function_mask=masked)

    def program(self, *_vectors: int) -> None:
        self._guest("program")

    def change_message(self, *vectors: int) -> None:
        self._guest("change_message")
        if isinstance(self.model, MsixModel):
            assert not any(map(self.model.can_deliver, vectors))
        else:
            assert not any(map(self.model.can_deliver, self.vectors))

    def mask(self, *vectors: int) -> None:
        self._guest("mask")
        for model in (self.model, self.other):
            model.set_mask(True, *vectors)

    def unmask(self, *vectors: int) -> None:
        self._guest("unmask")
        for model in (self.model, self.other):
            model.set_mask(False, *vectors)

    def unmask_and_look(self, vector: int) -> set[int]:
        self.unmask(vector)
        return self.other.pending

    def expect_pending(self, seen: set[int]) -> None:
        self.verbs.append("expect_pending")
        if seen != self.model.pending:
            raise Mismatch("pending bits")

    def fire(self, *vectors: int) -> None:
        self.verbs.append("fire")
        assert self._used.issuperset(vectors)
        for vector in vectors:
            self.faults.fire(self, vector)
            for model in (self.model, self.other):
                model.fire(vector)

    def burst(self, *vectors: int) -> None:
        self.fire(*vectors)
        self.verbs[-1] = "burst"
        assert len(set(vectors)) == len(vectors)

    def stop(self) -> None:
        self._guest("stop")
        for model in (self.model, self.other):
            model.stop()

    def cont(self) -> None:
        self.verbs.append("cont")
        assert self.model.stopped
        for model in (self.model, self.other):
            model.cont()

    def take_over(self) -> FakeRig:
        self._guest("take_over")
        assert self.verbs.count("take_over") <= MOST_CPRS
        assert not (isinstance(self.model, MsiModel) and self.model.pending)
        self.faults.take_over(self)
        return self

    def expect_same(self) -> None:
        pass

    def account(self) -> None:
        if not self.model.stopped:
            self.check()
            self.model.delivered.clear()
            self.other.delivered.clear()
        self._used.update(filter(self.model.can_deliver, self.vectors))

    def check(self) -> None:
        for what in ("delivered", "pending", "masked"):
            must, was = (getattr(model, what) for model in (self.model, self.other))
            if must != was:
                raise Mismatch(f"{what}: must be {must}, was {was}")

    def close(self) -> None:
        self.closed = True

    def _guest(self, verb: str) -> None:
        assert not self.model.stopped, "a stopped guest does nothing"
        self.verbs.append(verb)


class Faults:
    """None."""

    def fire(self, _rig: FakeRig, _vector: int) -> None:
        pass

    def take_over(self, _rig: FakeRig) -> None:
        pass


class PendingIsLost(Faults):
    def take_over(self, rig: FakeRig) -> None:
        rig.other.pending.clear()


class NothingAnswers(Faults):
    def fire(self, _rig: FakeRig, _vector: int) -> None:
        raise EnvironmentFault("the host has gone")


class FiresTwiceAtFirst(Faults):
    def __init__(self) -> None:
        self.times = itertools.count()

    def fire(self, rig: FakeRig, vector: int) -> None:
        if next(self.times) == 0:
            rig.other.delivered.append(vector)


@dataclass
class FakeBench:
    """What a scene is played on.

    :ivar rigs: all that were set up.
    :ivar scripts: what was kept.
    """

    make: Callable[[], InterruptModel] = lambda: MsixModel(4)
    faults: Faults = field(default_factory=Faults)
    rigs: list[FakeRig] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    ends: list[Callable[[], None]] = field(default_factory=list)

    def rig(self, at_end: Callable[[Callable[[], None]], object]) -> FakeRig:
        assert all(rig.closed for rig in self.rigs), "each has the host for itself"
        self.rigs.append(FakeRig(self.make, self.faults))
        at_end(self.rigs[-1].close)
        return self.rigs[-1]

    def play(
        self, *, seed: int = 0, sequences: int = 60, shrinking_s: float = 60, gaps: bool = True
    ) -> None:
        line = "rig = bench.rig(request.addfinalizer)"
        setting = Setting(line, self.make, self.make().size, True)
        scene = Scene(st.just(setting), {"bench": self}, HEADING, cpr=True, gaps=gaps)
        plan = Plan(30, sequences, seed, shrinking_s)
        play(scene, plan, self.ends.append, self.scripts.append)

    @property
    def played(self) -> list[list[str]]:
        return [rig.verbs for rig in self.rigs]


KINDS: dict[str, Callable[[], InterruptModel]] = {
    "msix": lambda: MsixModel(4),
    "msi": lambda: MsiModel(4, granted=4),
    "intx": IntxModel,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_driver_may_do_what_is_played(make: Callable[[], InterruptModel]) -> None:
    """The fake rig refuses anything else; and each rig is gone before the next one comes."""
    bench = FakeBench(make)
    bench.play()
    assert len(bench.rigs) >= 60
    assert all(rig.closed for rig in bench.rigs)
    assert max(map(len, bench.played)) >= 30


@pytest.mark.parametrize("gaps", [False, True])
def test_vectors_are_enabled_above_masked_ones_where_that_can_be(gaps: bool) -> None:
    bench = FakeBench()
    bench.play(gaps=gaps)
    assert any(rig.had_gaps for rig in bench.rigs) == gaps


def test_every_kind_of_step_is_played() -> None:
    bench = FakeBench()
    bench.play()
    verbs = "program enable disable mask unmask function_mask fire burst change_message stop cont"
    assert {verb for verbs in bench.played for verb in verbs} == {
        *verbs.split(),
        "expect_pending",
        "take_over",
    }


def test_a_seed_says_which_sequences_are_played() -> None:
    first, again, other = FakeBench(), FakeBench(), FakeBench()
    first.play(seed=1)
    again.play(seed=1)
    other.play(seed=2)
    assert first.played == again.played != other.played


def test_a_failure_is_shrunk_to_the_steps_that_it_takes() -> None:
    bench = FakeBench(faults=PendingIsLost())
    with pytest.raises(Mismatch, match="pending: must be") as failure:
        bench.play()
    program, *ready, hold, raise_one, take_over = bench.played[-1]
    assert (program, sorted(ready), take_over) == ("program", ["enable", "unmask"], "take_over")
    assert hold in ("mask", "function_mask")
    assert raise_one in ("fire", "burst")
    assert not bench.rigs[-1].closed, "evidence is collected from it"
    assert bench.scripts == failure.value.__notes__
    assert "# seed 0, shrunk from " in bench.scripts[0]


def test_the_script_of_a_failure_is_a_test_that_fails() -> None:
    bench = FakeBench(faults=PendingIsLost())
    with pytest.raises(Mismatch):
        bench.play()
    bench.ends.pop()()
    pasted: dict[str, Callable[..., None]] = {}
    exec(bench.scripts[0], pasted)
    request = SimpleNamespace(addfinalizer=bench.ends.append)
    with pytest.raises(Mismatch, match="pending: must be"):
        pasted["test_a_sequence_found_by_chance"](request, bench)
    assert bench.played[-1] == bench.played[-2]


def test_shrinking_ends_when_its_time_is_over() -> None:
    bench = FakeBench(faults=PendingIsLost())
    with pytest.raises(Mismatch, match="pending: must be"):
        bench.play(shrinking_s=0)
    failed = [n for n, rig in enumerate(bench.rigs) if rig.other.pending != rig.model.pending]
    assert failed == [len(bench.rigs) - 2, len(bench.rigs) - 1], "found, and played once more"
    assert bench.played[-1] == bench.played[-2]


def test_a_failure_that_does_not_come_again_is_one_all_the_same() -> None:
    bench = FakeBench(faults=FiresTwiceAtFirst())
    with pytest.raises(Mismatch, match="delivered: must be") as failure:
        bench.play()
    assert "When played once more, it did not fail." in failure.value.__notes__[0]


def test_a_fault_of_the_environment_is_raised_at_once() -> None:
    bench = FakeBench(faults=NothingAnswers())
    with pytest.raises(EnvironmentFault, match="the host has gone"):
        bench.play()
    assert ["fire" in verbs for verbs in bench.played].count(True) == 1
    assert bench.rigs[-1].closed
    assert bench.scripts == []


places = st.integers(0, 3).map(lambda n: 8 * n)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.builds(
        Description,
        bars=st.sampled_from(((Bar(0, 0x1000), Bar(1, 0x10000)), (Bar(0, 64), Bar(1, 1 << 20)))),
        msix=st.none() | st.builds(Msix, st.integers(1, 64), table_offset=places),
        msi=st.none() | st.builds(Msi, st.sampled_from((1, 8)), st.booleans(), st.booleans()),
        acknowledge=st.none() | st.just((0, 16)),
        reset=st.sampled_from(ResetBy),
    )
)
def test_the_source_of_a_description_is_that_description(description: Description) -> None:
    names = {each.__name__: each for each in (Bar, Description, Msi, Msix, ResetBy)}
    assert eval(source(description), names) == description


def test_what_is_as_by_default_is_left_out() -> None:
    assert source(Description(msix=None, msi=Msi(8))) == "Description(msix=None, msi=Msi(count=8))"
    assert source(Bar(0, 16)) == "Bar(index=0, size=16)"
