# SPDX-License-Identifier: GPL-2.0-or-later
"""Storms, without a guest."""

from __future__ import annotations

from types import SimpleNamespace

from fixtures.guests.probe import LOG_SIZE
from fixtures.storm import PACE_S, Storm


def test_it_is_steady_for_long_and_does_not_outgrow_the_guests_log() -> None:
    storm = Storm(SimpleNamespace())  # type: ignore[arg-type]
    paces = []
    while len(storm.raised) < LOG_SIZE:
        paces.append(storm._pace_s)
        storm.raised.append(0.0)
    assert set(paces[: LOG_SIZE // 2]) == {PACE_S}
    assert sum(paces) > 60
