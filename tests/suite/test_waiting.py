# SPDX-License-Identifier: GPL-2.0-or-later
"""Nothing waits without a deadline, and what ends a waiting says so."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time

import pytest

from fixtures.waiting import DeadlineError, event_loop, soon, until


def test_the_first_true_answer_is_returned() -> None:
    answers = iter([None, 0, "", "yes", "later"])
    assert until(lambda: next(answers), "an answer", 10) == "yes"


def test_the_question_is_asked_at_least_once() -> None:
    assert until(lambda: "at once", "an answer", 0) == "at once"


def test_a_missed_deadline_names_what_was_waited_for() -> None:
    with pytest.raises(DeadlineError, match=r"^waited 0\.05 s for a sign$"):
        until(lambda: None, "a sign", 0.05)


def test_a_reason_why_it_is_in_vain_ends_the_waiting() -> None:
    with pytest.raises(DeadlineError, match=r"^waiting for a sign is in vain: it has died$"):
        until(lambda: None, "a sign", 600, but=lambda: "it has died")


def test_the_answer_counts_more_than_the_reason() -> None:
    assert until(lambda: "yes", "a sign", 10, but=lambda: "it has died") == "yes"


def test_what_the_question_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        until(lambda: 1 // 0, "a sign", 10)


def test_between_two_questions_there_is_a_pause() -> None:
    asked: list[float] = []
    until(lambda: asked.append(time.monotonic()) or len(asked) == 3, "it", 10, pause_s=0.02)
    assert all(b - a >= 0.02 for a, b in itertools.pairwise(asked))


def test_before_the_first_question_there_is_a_rest_within_the_deadline() -> None:
    began = time.monotonic()
    assert until(lambda: time.monotonic() - began, "it", 10, first_s=0.05) >= 0.05
    with pytest.raises(DeadlineError):
        until(lambda: None, "a sign", 0.05, first_s=600)


def test_soon_is_now_or_in_a_moment_or_not_at_all() -> None:
    assert soon(lambda: "now") == "now"
    later = time.monotonic() + 0.1
    assert soon(lambda: "later" if time.monotonic() > later else None) == "later"
    assert soon(lambda: None) is None


# The event loop


async def answer(value: object, after_s: float = 0.0) -> object:
    await asyncio.sleep(after_s)
    return value


def test_work_runs_in_another_thread_and_returns_its_result() -> None:
    async def where() -> int:
        return threading.get_ident()

    assert event_loop().run(answer(7), "work", 10) == 7
    assert event_loop().run(where(), "work", 10) != threading.get_ident()
    assert event_loop() is event_loop()


def test_work_that_misses_its_deadline_is_cancelled() -> None:
    ended = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()

    with pytest.raises(DeadlineError, match=r"^waited 0\.05 s for the work$"):
        event_loop().run(work(), "the work", 0.05)
    assert ended.wait(10)


def test_a_timeout_of_the_work_itself_is_no_missed_deadline() -> None:
    with pytest.raises(TimeoutError):
        event_loop().run(asyncio.wait_for(answer(1, 600), 0.01), "the work", 10)


def test_what_the_work_raises_is_raised() -> None:
    async def fail() -> None:
        raise KeyError("it")

    with pytest.raises(KeyError, match="it"):
        event_loop().run(fail(), "the work", 10)


def test_only_the_end_of_a_connection_is_passed_over_in_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = event_loop()._loop
    for lost in (EOFError(), ConnectionResetError()):
        loop.call_exception_handler({"message": "never retrieved", "exception": lost})
    assert caplog.records == []
    loop.call_exception_handler({"message": "never retrieved", "exception": KeyError()})
    assert "never retrieved" in caplog.text
