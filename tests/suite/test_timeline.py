# SPDX-License-Identifier: GPL-2.0-or-later
"""Timelines: clocks that do not agree, what a guest took when, and how it is drawn."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.bench import Witness
from fixtures.cpr import Transfer
from fixtures.evidence import timeline
from fixtures.evidence.drawing import FROM, LED_TO, Row, draw, ranges
from fixtures.evidence.timeline import bounds, taken_at
from fixtures.guests.probe import Look, ProbeGuest
from fixtures.hosts.base import HostLostError
from fixtures.machines import Machine as RealMachine

#: What the host's clock is behind ours, in seconds.
BEHIND = 0.8


@dataclass
class Host:
    """A host whose time we are told after a while; it may be gone."""

    now: float = 0.0
    gone: bool = False
    busybox: bool = False

    def run(self, *_: Any, **__: Any) -> SimpleNamespace:
        if self.gone:
            raise HostLostError("it is gone")
        self.now += 0.01
        theirs = self.now - BEHIND
        answer = SimpleNamespace(out=f"{theirs:.9f}\n")
        if self.busybox:
            parts = int(theirs), round(theirs % 1 * 1e6)
            answer.out = "    mode: 0\n    time.tv_sec:  {}\n    time.tv_usec: {}\n".format(*parts)
        self.now += 0.03
        return answer


_paths = (f"{number}.log" for number in itertools.count())


@dataclass
class Machine:
    """A QEMU: what it said, by its host's clock, and when we heard it, by ours."""

    host: Host
    role: str
    said_by_qmp: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    traced: str = ""
    logged: str = ""
    history: list[tuple[float, str]] = field(default_factory=list)
    is_started: bool = True
    ended: str | None = None
    log_path: str = field(default_factory=lambda: next(_paths))

    @property
    def _monitor(self) -> Any:
        return SimpleNamespace(_client=SimpleNamespace(transcript=self.said_by_qmp))

    def _trace_bytes(self, _: int) -> bytes:
        return self.traced.encode()

    def said(self) -> str:
        return self.logged

    def died(self) -> str | None:
        return self.ended


def event(name: str, at: float, heard: float) -> tuple[float, str, dict[str, Any]]:
    stamp = {"seconds": int(at - BEHIND), "microseconds": round((at - BEHIND) % 1 * 1e6)}
    return heard, "<-", {"event": name, "timestamp": stamp}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(now=1000.0)
    monkeypatch.setattr(timeline, "time", lambda: host.now)
    return host


def of(*machines: Machine, **more: Any) -> dict[str, Any]:
    rig: Any = SimpleNamespace(machines=list(machines), table=lambda: "", **more)
    witness: Witness = rig
    told = timeline.of(witness)
    json.dumps(told)
    return told


def times(told: dict[str, Any]) -> dict[str, float]:
    return {moment["what"]: moment["time"] for moment in told["moments"]}


def test_a_reading_bounds_a_clock_from_both_sides() -> None:
    assert bounds([(10.0, 9.5, 10.5), (20.0, 19.3, 20.1)]) == pytest.approx((0.7, 0.8))


def test_moments_of_a_host_are_put_on_our_clock(host: Host) -> None:
    old = Machine(
        host,
        "old QEMU",
        [(989.99, "->", {"execute": "stop"}), event("STOP", 990.0, 990.02)],
        traced="1970-01-01T00:16:29.300000Z vfio_msi_interrupt  (0000:01:00.0) vector 6 0xfee/0x36",
        logged="1970-01-01T00:16:29.400000Z qemu: no\nand no time",
        history=[(980.0, "old QEMU is started")],
    )
    told = of(old)
    (machine,) = told["machines"]
    assert machine["clock"]["offset_s"] == pytest.approx(BEHIND, abs=0.02)
    assert 0 <= machine["clock"]["offset_s"] - BEHIND <= machine["clock"]["within_s"] < 0.041
    found = times(told)
    assert found["STOP"] == pytest.approx(990.0, abs=0.021)
    assert found["qemu: no"] == pytest.approx(990.2, abs=0.021)
    assert found["old QEMU is started"] == 980.0
    (trace,) = (moment for moment in told["moments"] if moment["kind"] == "trace")
    assert (trace["vector"], trace["source"]) == (6, "qemu-0")
    assert [m["time"] for m in told["moments"]] == sorted(m["time"] for m in told["moments"])


@pytest.mark.parametrize("busybox", [False, True])
def test_a_host_of_which_nobody_has_told_is_asked_for_its_time(host: Host, busybox: bool) -> None:
    host.busybox = busybox
    (machine,) = of(Machine(host, "old QEMU"))["machines"]
    assert 0 <= machine["clock"]["offset_s"] - BEHIND <= machine["clock"]["within_s"] < 0.041


def test_one_that_is_gone_has_ours(host: Host) -> None:
    host.gone = True
    assert of(Machine(host, "old QEMU"))["machines"][0]["clock"] == {
        "offset_s": 0.0,
        "within_s": None,
    }


def test_an_event_comes_after_its_cause_and_before_it_is_heard(host: Host) -> None:
    said = [
        (989.99, "->", {"execute": "migrate"}),
        event("MIGRATION", 990.0, 990.05),
        event("STOP", 990.5, 990.52),
        event("MIGRATION", 991.0, 991.06),
    ]
    clock = of(Machine(host, "old QEMU", said))["machines"][0]["clock"]
    assert clock == {"offset_s": pytest.approx(0.82), "within_s": pytest.approx(0.03)}


def test_without_a_cause_an_event_is_as_late_as_it_can_be(host: Host) -> None:
    heard = [event("STOP", 990.0, 990.02), event("RESUME", 991.0, 991.3)]
    told = of(Machine(host, "old QEMU", heard))
    assert told["machines"][0]["clock"]["within_s"] is None
    assert times(told)["STOP"] == pytest.approx(990.02)


def test_where_the_clock_trembles_causes_come_first(host: Host) -> None:
    said = [
        (990.02, "->", {"execute": "stop"}),
        event("STOP", 990.0, 990.05),
        event("RESUME", 992.0, 992.001),
    ]
    told = of(Machine(host, "old QEMU", said))
    assert times(told)["STOP"] >= times(told)["stop"]
    assert told["machines"][0]["clock"]["within_s"] == pytest.approx(0.019)


def test_what_one_qemu_says_of_its_host_holds_for_another_there(host: Host) -> None:
    host.gone = True
    old = Machine(host, "old QEMU", [event("STOP", 990.0, 990.02)])
    new = Machine(host, "new QEMU", logged="1970-01-01T00:16:29.200000Z qemu: no")
    assert times(of(old, new))["qemu: no"] == pytest.approx(990.02)


def test_a_source_that_cannot_be_had_does_not_take_the_rest_along(host: Host) -> None:
    old = Machine(host, "old QEMU", history=[(980.0, "old QEMU is started")])
    old._trace_bytes = lambda _: 1 / 0  # type: ignore[assignment, method-assign]
    told = of(old)
    assert "old QEMU is started" in times(told)
    assert told["lacks"] == ["qemu-0.trace: ZeroDivisionError: division by zero"]


def test_commands_are_told_and_questions_are_not(host: Host) -> None:
    said: list[tuple[float, str, dict[str, Any]]] = [
        (985.0, "<-", {"QMP": {}}),
        (986.0, "->", {"execute": "query-status", "id": 1}),
        (986.1, "<-", {"return": {}, "id": 1}),
        (987.0, "->", {"execute": "migrate", "arguments": {"uri": "x" * 999}}),
        (987.1, "<-", {"error": {"class": "GenericError", "desc": "blocked"}}),
    ]
    moments = of(Machine(host, "old QEMU", said))["moments"]
    assert [m["kind"] for m in moments] == ["event", "command", "refused"]
    assert len(moments[1]["what"]) < 400


def test_a_device_tells_of_this_guest_alone(host: Host) -> None:
    """That of a lab host outlives its guests."""
    old = Machine(host, "old QEMU", history=[(980.0, "old QEMU is started")])
    endpoint = SimpleNamespace(fired=[(970.0, 1), (985.0, 2)])
    moments = of(old, endpoint=endpoint)["moments"]
    assert [m["what"] for m in moments if m["source"] == "device"] == ["vector 2 fired"]


def test_each_of_several_devices_is_named(host: Host) -> None:
    old = Machine(host, "old QEMU", history=[(980.0, "old QEMU is started")])
    family = [
        SimpleNamespace(
            endpoint=SimpleNamespace(fired=[(985.0 + n, n)]),
            device=SimpleNamespace(address=f"0000:0{n}:00.0"),
        )
        for n in range(2)
    ]
    moments = of(old, family=family)["moments"]
    assert [m["what"] for m in moments if m["source"] == "device"] == [
        "0000:00:00.0 vector 0 fired",
        "0000:01:00.0 vector 1 fired",
    ]


def test_a_log_that_two_share_is_told_once(host: Host) -> None:
    """As after a cpr-exec."""
    both = "1970-01-01T00:16:29.100000Z of old\n1970-01-01T00:16:29.300000Z of new"
    stamps = ("29.000000", "29.200000")
    old, new = (
        Machine(host, "QEMU", traced=f"1970-01-01T00:16:{at}Z trace", logged=both, log_path="log")
        for at in stamps
    )
    said = [(m["source"], m["what"]) for m in of(old, new)["moments"] if m["kind"] == "said"]
    assert said == [("qemu-0", "of old"), ("qemu-1", "of new")]


def test_the_end_of_a_process_is_told(host: Host) -> None:
    old = Machine(host, "old QEMU", ended="ended with 1; its last words:\nno")
    new = Machine(host, "new QEMU", is_started=False)
    ends = [machine["end"] for machine in of(old, new)["machines"]]
    assert ends == ["ended with 1", "was never started"]


#: A counter of 1,000 a second, looked at every second; it stood still from 12.2 to 12.7.
LOOKS = [
    Look(10.0, 10_000, 0),
    Look(11.0, 11_000, 1),
    Look(12.0, 12_000, 3),
    Look(13.0, 12_500, 5),
    Look(14.0, 13_500, 5),
    Look(15.0, 14_500, 7),
]


@pytest.mark.parametrize(
    ("number", "tsc", "when"),
    [
        (0, 10_400, 10.4),
        (2, 11_900, 11.9),
        (3, 12_100, 12.1),  # before it stood still
        (4, 12_400, 12.9),  # after that
        (5, 13_600, 14.1),
        (7, 14_600, 15.0),  # later than the last look
    ],
)
def test_when_a_guest_took_an_interrupt(number: int, tsc: int, when: float) -> None:
    assert taken_at(LOOKS, number, tsc, [12.2]) == pytest.approx(when)


def test_an_interrupt_before_the_first_look() -> None:
    assert taken_at(LOOKS[2:], 0, 11_500) == pytest.approx(11.5)


def test_a_single_look_is_all_there_is_to_say() -> None:
    assert taken_at(LOOKS[:1], 0, 99) == 10.0


# How it is drawn.


def told(*moments: tuple[float, str, str, str], machines: int = 2) -> dict[str, Any]:
    return {
        "format": 1,
        "machines": [
            {
                "name": f"qemu-{n}",
                "role": "new QEMU" if n else "old QEMU",
                "end": None,
                "clock": {"offset_s": 0.0, "within_s": 0.001},
            }
            for n in range(machines)
        ],
        "moments": [
            {"time": at, "source": source, "kind": kind, "what": what}
            for at, source, kind, what in moments
        ],
        "lacks": [],
    }


def labels(rows: Any) -> list[str]:
    return [row.label for row in rows]


def test_numbers_in_a_few_words() -> None:
    assert ranges([3, 1, 2, 7, 7, 9, 10]) == "1-3, 7, 9-10"
    assert ranges([]) == ""


def test_time_is_counted_from_the_last_cpr() -> None:
    drawing = draw(
        told(
            (1.0, "harness", "step", "old QEMU is started"),
            (2.0, "harness", "step", "cpr-transfer: starting new QEMU"),
            (3.0, "harness", "step", "cpr-transfer: running"),
            (4.0, "harness", "step", "cpr-transfer: starting new QEMU"),
            (4.25, "harness", "step", "cpr-transfer: running"),
            (4.5, "guest", "taken", "vector 0 taken"),
        )
    )
    assert [row.at for row in drawing.rows][-3:] == ["+0.0", "+250.0", "+500.0"]
    assert [(phase.what, phase.ms) for phase in drawing.phases] == [
        ("starting new QEMU", 250.0),
        ("running", 250.0),
    ]


def test_who_runs_the_guest_and_when_nobody_does() -> None:
    drawing = draw(
        told(
            (1.0, "harness", "step", "cpr-transfer: starting new QEMU"),
            (2.0, "qemu-0", "event", "STOP"),
            (2.5, "qemu-1", "event", "RESUME"),
            (3.0, "guest", "taken", "vector 0 taken"),
        )
    )
    stop, resume = (row.y for row in drawing.rows[1:3])
    ran = {lane.title: lane.ran for lane in drawing.lanes}
    assert [end for _, end in ran["old QEMU"]] == [stop]
    assert [begin for begin, _ in ran["new QEMU"]] == [resume]
    assert drawing.stopped == (stop, resume, pytest.approx(500.0))


def test_a_guest_that_goes_on_in_old_qemu_has_no_blackout_between_two() -> None:
    drawing = draw(
        told(
            (1.0, "harness", "step", "cpr-transfer: starting new QEMU"),
            (2.0, "qemu-0", "event", "STOP"),
            (2.5, "qemu-0", "event", "RESUME"),
            (2.6, "qemu-1", "said", "it failed"),
        )
    )
    assert drawing.stopped is None
    assert len(next(lane.ran for lane in drawing.lanes if lane.title == "old QEMU")) == 2


def test_small_moments_are_gathered_between_others() -> None:
    small = [
        (10 + n / 10 + after, source, kind, what)
        for n in range(5)
        for after, source, kind, what in (
            (0.00, "device", "fired", f"vector {n} fired"),
            (0.01, "qemu-0", "trace", "vfio_msi_interrupt x"),
        )
    ]
    content = told((9.0, "qemu-0", "event", "STOP"), *small, (12.0, "qemu-0", "event", "RESUME"))
    for n, moment in enumerate(content["moments"][1:-1]):
        moment["vector"] = n // 2
    assert labels(draw(content).rows) == [
        "STOP",
        "5 x fired: vectors 0-4 within 400 ms",
        "5 x vfio_msi_interrupt: vectors 0-4 within 400 ms",
        "RESUME",
    ]


def test_a_long_story_is_cut_where_least_is_lost() -> None:
    steps = [(float(n), "qemu-0", "command", f"command {n}") for n in range(1000)]
    zero = (500.5, "harness", "step", "cpr-transfer: starting new QEMU")
    drawing = draw(told(*steps, zero))
    shown = labels(drawing.rows)
    assert "cpr-transfer: starting new QEMU" in shown
    assert shown[-1] == "command 999"
    assert sum(isinstance(row, Row) and row.kind == "cut" for row in drawing.rows) == 2
    assert f"command {501 - LED_TO}" in shown
    assert f"command {500 + FROM - 1}" in shown
    assert any("rows are left out" in remark for remark in drawing.remarks)


def test_of_a_chain_only_those_who_take_part_have_a_lane() -> None:
    steps = [(float(n), f"qemu-{n // 100}", "command", f"command {n}") for n in range(1000)]
    zero = (950.5, "harness", "step", "cpr-transfer: starting new QEMU")
    titles = [lane.title for lane in draw(told(*steps, zero, machines=10)).lanes]
    assert titles == ["harness", "QEMU 9"]


@pytest.mark.parametrize("content", [{}, {"moments": []}, {"moments": [{}]}, {"moments": 7}, []])
def test_what_is_no_timeline_is_not_drawn(content: Any) -> None:
    with pytest.raises((LookupError, TypeError, ValueError, AttributeError)):
        draw(content)


# Of a real one.


def test_the_timeline_of_a_real_cpr(
    old: tuple[RealMachine, ProbeGuest], request: pytest.FixtureRequest
) -> None:
    """Of two QEMUs on this machine, whose clock is ours."""
    machine, guest = old
    transfer = Transfer(machine)
    request.addfinalizer(transfer.new.close)
    transfer.run()
    rig: Any = SimpleNamespace(
        machines=[machine, transfer.new],
        guest=guest,
        table=lambda: "",
    )
    told = timeline.of(rig)
    assert told["lacks"] == []
    for each in told["machines"]:
        assert 0 <= each["clock"]["offset_s"] <= each["clock"]["within_s"] < 0.1
    names = [(moment["source"], moment["what"].split()[0]) for moment in told["moments"]]
    order = [("harness", "old"), ("qemu-0", "migrate"), ("qemu-0", "STOP")]
    assert [names.index(each) for each in order] == sorted(names.index(each) for each in order)
    assert ("qemu-0", "cpr_transfer_output") in names
    assert ("qemu-1", "cpr_transfer_input") in names
    drawing = draw(json.loads(json.dumps(told)))
    assert [lane.title for lane in drawing.lanes] == ["harness", "old QEMU", "new QEMU"]
    assert [phase.what for phase in drawing.phases] == [step.value for step in transfer.times]
