# SPDX-License-Identifier: GPL-2.0-or-later
"""What the verdict tests share."""

from __future__ import annotations

import pytest

from fixtures.rig import TakenOver


@pytest.fixture(autouse=True)
def _each_behaviour_counts_for_itself(taken_over: TakenOver) -> None:
    """Deliveries are counted from the start of each test: one failure does not cause more."""
    taken_over.rig.begin()
